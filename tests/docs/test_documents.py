"""The documents are true: their code runs, their commands exist and run, their links lead somewhere.

Every ```python block runs, all blocks of one page in order and in one namespace. A block that shows a part of a file
stands under `<!-- part of a file -->` and does not. Every line of a ```console block is a command: one of `kldiv` runs
on small data, the others name files and make targets that have to be there.
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from commands import stay_offline
from typer.testing import CliRunner

import kldiv_kernels as kk
from kldiv_kernels.cli import app
from kldiv_kernels.registry import STATISTICS
from kldiv_kernels.trainer import toy_pairs

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

_PART = "<!-- part of a file -->"
_FENCE = re.compile(rf"^(?:{_PART}\n+)?([ ]*)```(\w+)[^\n]*\n(.*?)^\1```", re.S | re.M)
_LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"|^```\{(?:image|figure|include)\} (\S+)", re.M)
_PUBLISHED = ("http://", "https://", "mailto:")

# Trained for minutes, by tests of their own and by CI.
ELSEWHERE = ("kldiv demo",)
# The commands of the pages are long, or want more data than a test has: the same ones on little.
SMALLER = {
    "bench": "--rows 2 --vocab 1000 --dtypes fp32 --peers none --repeats 1 --no-memory",
    "train grpo": "--steps 2 --warm-up-steps 2 --batch-size 2 --group-size 2",
    "train opd": "--steps 2 --batch-size 2 --prompt-length 8 --completion-length 8",
    "train preference": "--steps 2 --batch-size 2 --completion-length 8",
    "train": "--steps 2 --batch-size 2",
    "cache-teacher": "--batch-size 2",
}


def smaller(options: list[str]) -> list[str]:
    given = " ".join([*options, ""])
    less = next((less for name, less in SMALLER.items() if given.startswith(f"{name} ")), "").split()
    if "--block-size" in options:
        less += ["--block-size", "16"]
    return [*less, "--kinds", "forward_kl"] if options[0] == "bench" and "--kinds" not in options else less


def blocks(text: str, language: str) -> list[str]:
    found = [match for match in _FENCE.finditer(text) if match[2] == language]
    return [textwrap.dedent(match[3]) for match in found if not match[0].startswith(_PART)]


def commands_of(text: str) -> list[str]:
    lines = "".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


COMMANDS = {command: name for name, text in reversed(TEXTS.items()) for command in commands_of(text)}


def words_of(command: str) -> list[str]:
    """Without what is set for it (`KLDIV_CUDA=0 make test`), and a launch on several processes as one on one."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "torchrun":
        words = ["kldiv", *words[words.index("kldiv_kernels.cli") + 1 :]]
    return words


RUN_HERE = [x for x in COMMANDS if words_of(x)[0] == "kldiv" and not x.startswith(ELSEWHERE)]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In an empty folder and without the network; what a page registers is gone after it."""
    stay_offline(monkeypatch)
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name, statistic in STATISTICS.items() if not statistic.builtin]:
        kk.unregister_statistic(name)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_the_code_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks(TEXTS[page], "python")):
        # A file, because Triton reads the source of its functions.
        file = tmp_path / f"block_{number}.py"
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)
    if page in ("README.md", "docs/quickstart.md"):
        student = names["student"]
        assert isinstance(student, torch.Tensor)
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert student.grad.any()


@pytest.mark.parametrize("command", RUN_HERE)
def test_the_command_runs(command: str, tmp_path: Path) -> None:
    options = words_of(command)[1:]
    for model, seed in (("student_ce", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(tmp_path / "runs/demo" / model)
        tiny.word_tokenizer().save_pretrained(tmp_path / "runs/demo" / model)
    (tmp_path / "README.md").write_text(tiny.words(2000))
    (tmp_path / "runs/demo/pairs.jsonl").write_text(toy_pairs.jsonl())
    if "--teacher-cache runs/teacher_cache" in command:
        (first,) = [line for line in COMMANDS if line.endswith("--output runs/teacher_cache")]
        _run(words_of(first)[1:])
    if "--resume" in options:
        _run([word for word in options if word != "--resume"])
    _run(options)


def _run(options: list[str]) -> None:
    result = CliRunner().invoke(app, [*options, *smaller(options)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [x for x in COMMANDS if x not in RUN_HERE and not x.startswith(ELSEWHERE)])
def test_the_command_exists(command: str) -> None:
    """Of what is run elsewhere: by CI, by tests/test_packaging.py, by the tests of gpu-check, by other tests."""
    program, *words = words_of(command)
    assert program in ("make", "pip", "python", "python3", "pytest"), f"{program} in {COMMANDS[command]}"
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in words if "=" not in word]
        assert targets
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    if program in ("python", "python3", "pytest"):
        files = [word for word in words if "/" in word or word.endswith(".py")]
        files = [word for word in files if not word.startswith(("-", "runs/"))]
        assert all(list(ROOT.glob(file.split("::")[0])) for file in files)


def anchors(text: str) -> set[str]:
    """The names that GitHub and MyST give to headings."""
    outside = re.sub(r"^([ ]*)```.*?^\1```", "", text, flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_the_links_lead_somewhere(page: str) -> None:
    outside = re.sub(r"`[^`\n]*`", "", TEXTS[page])
    for groups in _LINK.findall(outside):
        link = next(group for group in groups if group)
        if link.startswith(_PUBLISHED):
            continue
        target, _, anchor = link.partition("#")
        # In a page that the site includes, as on GitHub, a path is relative to the page.
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page} has a link to {link}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page} has a link to {link}"


def test_the_readme_is_short_and_counts_right() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 120
    count = sum(statistic.is_divergence and statistic.builtin for statistic in STATISTICS.values())
    assert f"one of {count} divergences" in TEXTS["README.md"]


def test_only_the_docs_say_when_something_was_measured() -> None:
    assert re.findall(r"20\d\d-\d\d", TEXTS["README.md"]) == []


def test_the_readme_has_the_times_of_the_result_files() -> None:
    cases = {}
    for path in ROOT.glob("benchmarks/results/*-2-cores-*.json"):
        for case in json.loads(path.read_text())["cases"]:
            cases[case["kind"], case["dtype"]] = {one["name"]: one for one in case["implementations"]}
    kinds = ("forward_kl", "reverse_kl", "js", "logprob_entropy", "grpo", "topk")
    shown = [line.split("|")[2:7] for line in TEXTS["README.md"].splitlines() if "| **" in line]
    assert len(shown) == len(kinds)
    for kind, row in zip(kinds, shown, strict=True):
        found = cases[kind, "bf16"]
        times = [f"{1e3 * found[name]['seconds']:.0f}" if name in found else "" for name in ("compile", "eager", "trl")]
        memory = [f"{found[name]['peak_extra_units']:.1f}" for name in ("kldiv_kernels", "compile", "eager")]
        ours = f"**{1e3 * found['kldiv_kernels']['seconds']:.0f}**"
        assert [cell.strip() for cell in row] == [ours, *times, ", ".join(memory)], kind


@pytest.mark.parametrize("page", [name for name in TEXTS if name.startswith("docs/")])
def test_the_site_has_the_page(page: str) -> None:
    """Sphinx says so too, but only where the site is built."""
    listed = {"docs/index"}
    for name, text in TEXTS.items():
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.S | re.M):
            entries = [re.sub(r"^.*<(.*)>$", r"\1", line.strip()) for line in block.splitlines()]
            listed |= {(Path(name).parent / entry).as_posix() for entry in entries if entry[:1] not in ("", ":")}
    assert page.removesuffix(".md") in listed


BACKENDS = TEXTS.get("docs/guides/backends.md", "")


def test_the_table_of_compiled_triton_kernels() -> None:
    resources = json.loads((ROOT / "benchmarks/triton_resources.json").read_text())
    assert f"Triton {resources['triton']}" in BACKENDS
    columns = [column for row in resources["kernels"] for column in row.values() if isinstance(column, dict)]
    most = max(spilled for column in columns for _, _, spilled, _ in column.values())
    assert f"the most that any kernel spills is {most} bytes" in BACKENDS
    shown = 0
    for name in ("forward_kl", "js"):
        for kernel in resources["kernels"]:
            if name in kernel["statistics"] and kernel["kernel"] not in ("finish_kernel", "scale_kernel"):
                row = " | ".join(f"{registers} · {programs}" for registers, _, _, programs in kernel["bf16"].values())
                assert f"| {name} | `{kernel['kernel']}` | {row} |" in BACKENDS
                shown += 1
    assert shown >= 6


def test_the_table_of_compiled_cuda_kernels() -> None:
    resources = json.loads((ROOT / "benchmarks/cuda_resources.json").read_text())
    assert f"nvcc {resources['nvcc']}" in BACKENDS
    targets = [name for name in resources["kernels"][0] if name.startswith("sm_")]
    assert f"| | {' | '.join(targets)} |" in BACKENDS
    cells = [kernel[target] for kernel in resources["kernels"] for target in targets if kernel.get(target)]
    assert not any(any(cell[1:4]) for cell in cells), "the page says that no kernel spills or has a stack"
    shown = 0
    for kernel in resources["kernels"]:
        numbers = " | ".join(str(kernel[target][0]) if kernel.get(target) else "" for target in targets)
        name = kernel["kernel"].removesuffix(" bfloat16")
        if f"| `{name}` |" in BACKENDS:
            assert f"| `{name}` | {numbers} |" in BACKENDS
            shown += 1
    assert shown >= 6


def test_the_table_of_instructions() -> None:
    for row in json.loads((ROOT / "benchmarks/cuda_instructions.json").read_text())["kernels"]:
        passes = (f"{row[name]:.1f}" if name in row else "" for name in ("look", "sweep", "sums", "gradient", "total"))
        assert f"| `{row['kernel'].removesuffix(' bfloat16')}` | {' | '.join(passes)} |" in BACKENDS
