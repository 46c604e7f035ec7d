"""The notebook of the examples runs from top to bottom as a script, and is stored without what a run leaves in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
README = (ROOT / "examples" / "README.md").read_text()


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_learns(path: Path, tmp_path: Path) -> None:
    """Its cells are plain Python, so that an interpreter is enough; with fewer steps than a user's run."""
    cells = code_of(path)
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join(re.sub(r"^STEPS = \d+$", "STEPS = 12", cell, flags=re.M) for cell in cells))
    assert script.read_text().count("STEPS = 12") == 1
    # The picture goes into a file, for there is no display.
    with script.open("a") as file:
        file.write("\nfigure.savefig('figure.png')\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("KLDIV_", "TRITON_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::UserWarning", script],
        cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ((before, after),) = re.findall(r"([\d.]+) before, ([\d.]+) after$", done.stdout, re.M)
    assert 0 < float(after) < 0.97 * float(before)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    eager, ours = (int(x) for x in re.findall(r": (\d+) MiB, ", done.stdout))
    assert 0 < 3 * ours < eager


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_a_run(path: Path) -> None:
    """A difference in a stored notebook is one of its text alone: no outputs, no counts, no metadata of an editor."""
    text = path.read_text()
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        left = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        assert cell == {key: cell[key] for key in ("cell_type", "id", "source")} | {"metadata": {}} | left
        assert "".join(cell["source"]).splitlines(keepends=True) == cell["source"]
        assert not cell["source"][-1].endswith("\n")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_and_the_readme(path: Path) -> None:
    assert f"({path.name})" in README
    text = "".join(line for cell in json.loads(path.read_text())["cells"] for line in cell["source"])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    assert all((path.parent / link).exists() for link in links)


def test_there_is_one() -> None:
    assert [path.name for path in NOTEBOOKS] == ["distil_from_hidden_states.ipynb"]
