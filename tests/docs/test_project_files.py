"""What stands beside the package is true: the citation, what SECURITY.md says of the code, the templates of issues."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
import test_documents
import yaml

from kldiv_kernels.version import __version__

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text()
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.md"))


def test_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == "kldiv_kernels"
    assert citation["authors"] == [{"name": "The kldiv_kernels authors"}]
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()
    # Nothing that nobody has given yet.
    assert {*citation} == {"cff-version", "message", "type", "title", "abstract", "authors", "version", "license"}


RUNS_CODE = {"eval", "exec", "compile", "__import__"}
LOADS_CODE = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("numpy", "load"), ("np", "load")}
ASKS_A_NETWORK = {"urllib", "http", "requests", "socket", "httpx", "aiohttp", "marshal", "shelve", "dill", "joblib"}


def unsafe(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in RUNS_CODE:
                found.append(called.id)
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                found += [f"{called.value.id}.{called.attr}"] * ((called.value.id, called.attr) in LOADS_CODE)
            found += [word.arg for word in node.keywords if word.arg == "trust_remote_code"]
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.split(".")[0] in ASKS_A_NETWORK]
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch"):
            found += [f"{node.module}.{name.name}" for name in node.names if name.name in ("load", "loads")]
        # Of an options dictionary.
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append("trust_remote_code")
    return found


def test_the_package_loads_no_code() -> None:
    assert unsafe("import pickle\npickle.load(f)") == ["pickle.load"]
    assert unsafe("torch.load(f)\nx(trust_remote_code=True)") == ["torch.load", "trust_remote_code"]
    assert unsafe("from urllib.request import urlopen\nmodel.eval()\neval(x)") == ["urllib.request", "eval"]
    found = {
        path.relative_to(ROOT).as_posix(): names
        for path in (ROOT / "kldiv_kernels").rglob("*.py")
        if (names := unsafe(path.read_text()))
    }
    # The text of Triton kernels, which SECURITY.md names.
    assert {name: set(names) for name, names in found.items()} == {
        "kldiv_kernels/backends/triton/bind.py": {"exec", "compile"}
    }


def test_the_versions_that_security_was_read_in() -> None:
    for package in ("transformers", "datasets"):
        (said,) = re.findall(rf"{package} (\d+\.\d+)", SECURITY.split("## What is not promised")[1])
        assert metadata.version(package).startswith(f"{said}."), f"{package}: is SECURITY.md still so?"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_templates(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A benchmark leaves its results where it runs.
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    _, head, body = text.split("---\n", 2)
    assert {*yaml.safe_load(head)} == {"name", "about", "labels"}
    commands = test_documents.commands_of(body)
    assert "kldiv doctor" in commands
    for command in commands:
        test_documents._run(test_documents.words_of(command)[1:])
    for block in test_documents.blocks(body, "python"):
        exec(compile(block, str(path), "exec"), {"__name__": "template"})
    if path.stem == "wrong_value":
        got, expected, difference, largest = (float(x) for x in capsys.readouterr().out.split()[-4:])
        assert got == pytest.approx(expected, rel=1e-5)
        assert 0 < difference < 0.01 * largest


def test_there_are_three_templates() -> None:
    assert [path.stem for path in TEMPLATES] == ["bug", "performance", "wrong_value"]
