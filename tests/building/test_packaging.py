"""The package as others get it: an sdist and a wheel, installed where the source tree is not.

PyTorch is not installed anew: the clean environment reads it from this one.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import wheels

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".git", ".venv", ".*_cache", "__pycache__", "build", "dist", "runs", "*.egg-info", "*.so")
# What lies in a tree that was worked in, and belongs neither into an sdist nor into a wheel.
LEFT_OVER = (
    "kldiv_kernels/libkldiv_kernels.so", "kldiv_kernels/_C.cpython-39-x86_64-linux-gnu.so",
    "build/lib/kldiv_kernels/gone.py", "docs/_build/conf.py", "runs/demo/metrics.json", ".venv/lib/other.py",
)  # fmt: skip
BESIDE_THE_PACKAGE = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
# Everything that an installation needs is in this environment.
PIP_INSTALL = ("install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")

pytestmark = pytest.mark.packaging

SMOKE = """
import sys
sys.modules.update(numpy=None, triton=None)
import torch, kldiv_kernels as kk
from pathlib import Path
assert Path(kk.__file__).is_relative_to({installed!r}), kk.__file__
def run(backend):
    torch.manual_seed(0)
    student = torch.randn(4, 1001, dtype=torch.bfloat16).mul_(3).requires_grad_()
    teacher = torch.randn(4, 1001, dtype=torch.bfloat16).mul_(3)
    loss = kk.js_divergence(student, teacher, beta=0.3, backend=backend)
    loss.backward()
    return loss, student.grad
mine, reference = run({backend!r}), run("reference")
assert mine[1].abs().max() > 0
for one, other in zip(mine, reference):
    torch.testing.assert_close(one, other)
print(kk.backends()["cpu"])
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KLDIV_BUILD", "CXX")}
    # Away from the source tree: `python -c` imports from the current folder first.
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=os.sep,
        # The CUDA part is compiled where the environment of these tests is made; here it would take minutes each time.
        env={**inherited, "KLDIV_CUDA": "0", **environment},
    )  # fmt: skip


def succeeds(*command: str | Path, **environment: str) -> str:
    done = run(*command, **environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The source tree as after some work in it: what was built there is stale, or another Python's."""
    tree = Path(shutil.copytree(ROOT, tmp_path / "sources", ignore=shutil.ignore_patterns(*NOT_SOURCES)))
    for name in LEFT_OVER:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("raise SystemExit('stale')")
    # setuptools reads the list of the last sdist and adds to it.
    (tree / "kldiv_kernels.egg-info").mkdir()
    (tree / "kldiv_kernels.egg-info" / "SOURCES.txt").write_text("\n".join([*LEFT_OVER, "tests/conftest.py"]))
    return tree


def files(tree: Path, *folders: str) -> set[str]:
    found = {str(path.relative_to(tree)) for folder in folders for path in (tree / folder).rglob("*") if path.is_file()}
    return found.difference(LEFT_OVER)


def without_metadata(names: list[str]) -> set[str]:
    """The packed files; "setup.cfg" and "PKG-INFO" are the packers' own."""
    own = re.compile(r".*/$|.*\.(egg|dist)-info/|(PKG-INFO|setup\.cfg)?$")
    return {name for name in names if not own.match(name)}


def test_sdist_and_wheels_install_and_work(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    dist = tmp_path / "dist"
    succeeds(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist, sources)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
        archive.extractall(tmp_path, filter="data")
    assert without_metadata(packed) == files(sources, "csrc", "kldiv_kernels") | BESIDE_THE_PACKAGE
    # The wheels are made from the sdist: what the sdist lacks is missed here.
    (unpacked,) = tmp_path.glob("kldiv_kernels-*")
    monkeypatch.setenv("KLDIV_CUDA", "0")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    own = wheels.made("this python", unpacked, dist).path
    # In the same tree: nothing of the first gets into the second.
    every = wheels.made("any python", unpacked, dist).path
    module, library = f"kldiv_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "kldiv_kernels/libkldiv_kernels.so"
    for wheel, compiled in ((own, {library, module}), (every, {library})):
        with zipfile.ZipFile(wheel) as archive:
            installed = archive.namelist()
            (metadata,) = [archive.read(name) for name in installed if name.endswith(".dist-info/METADATA")]
        assert without_metadata(installed) == files(sources, "kldiv_kernels") | compiled
        assert any(name.endswith("/LICENSE") for name in installed)
        _readable_on_an_index(email.message_from_string(metadata.decode()))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"kldiv_kernels-[\d.]+-{python}-{python}-manylinux_2_\d+_\w+\.whl", own.name)
    assert re.fullmatch(r"kldiv_kernels-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", every.name)
    _works_alone(every, tmp_path / "clean")


def _works_alone(wheel: Path, environment: Path) -> None:
    """In an environment that has PyTorch, and no compiler."""
    succeeds(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    succeeds(python, "-m", "pip", *PIP_INSTALL, wheel)
    site = Path(succeeds(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    # Lines of a .pth file come after the environment's own packages, and the .pth files there are not read.
    (site / "borrowed.pth").write_text(str(Path(torch.__file__).parent.parent))
    nowhere = {"PATH": str(environment / "bin"), "CXX": "/nonexistent/g++"}
    said = succeeds(python, ROOT / "tests" / "building" / "compat_suite.py", **nowhere)
    assert json.loads(said.splitlines()[-1])["comparisons"] > 100
    assert "forward_kl" in succeeds(environment / "bin" / "kldiv", "plan", "--help", **nowhere)


def _readable_on_an_index(metadata: email.message.Message) -> None:
    """The README's words and code, and of its links those that lead somewhere from there."""
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown, readme = str(metadata.get_payload()), (ROOT / "README.md").read_text()
    fences = re.compile(r"^```.*?^```", re.S | re.M)
    assert fences.findall(shown) == fences.findall(readme)
    prose = fences.sub("", shown)
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", prose))
    assert not re.search(r"<(img|a) |^\[[^\]]*\]:", prose, re.M), "links of these kinds are not looked after"
    assert re.findall(r"\w+", prose) == re.findall(
        r"\w+", re.sub(r"\]\((?!https:)[^)]*\)", "]", fences.sub("", readme))
    )


def test_without_the_compiled_part(sources: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    # As on a machine without compilers, of any system: KLDIV_BUILD=0 must not look for one.
    nowhere = {"KLDIV_BUILD": "0", "CXX": "/nonexistent", "PATH": str(tmp_path / "nothing")}
    succeeds(sys.executable, "-m", "pip", *PIP_INSTALL, "--target", target, sources, **nowhere)
    (tags,) = [path.read_text() for path in target.glob("*.dist-info/WHEEL")]
    assert re.findall(r"^Tag: (.*)$", tags, re.M) == ["py3-none-any"]
    smoke = SMOKE.format(installed=str(target), backend="auto")
    said = succeeds(sys.executable, "-c", smoke, PYTHONPATH=str(target))
    assert "KLDIV_BUILD=0" in said
    package = {f"kldiv_kernels/{path.name}" for path in (target / "kldiv_kernels").iterdir() if path.is_file()}
    assert package == {name for name in files(sources, "kldiv_kernels") if name.count("/") == 1}


def test_no_compiler_says_what_to_install(sources: Path, tmp_path: Path) -> None:
    done = run(
        sys.executable, "-m", "pip", *PIP_INSTALL, "--target", tmp_path / "site", sources, CXX="/nonexistent/g++"
    )
    assert done.returncode != 0
    assert "apt-get install g++" in done.stdout + done.stderr
    assert "KLDIV_BUILD=0" in done.stdout + done.stderr
