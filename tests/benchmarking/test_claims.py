"""Claims in miniature: the scripts say how they are run, results are there, and samples are what they say."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "claims"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("claim", "sums"))
RESULTS = ROOT / "benchmarks" / "results" / "claims"


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The scripts import `claim` and `sums`, which are gone again after the test; and threads as before."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("claim", "sums"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example_and_results_are_committed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    path = FOLDER / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 150
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert f"python benchmarks/claims/{name}.py" in capsys.readouterr().out
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.png").stat().st_size > 0
    assert record["seeds"] >= 3
    # The page has the verdict that the results have.
    line = next(x for x in (FOLDER / "README.md").read_text().splitlines() if f"`{name}.py`" in x and x.startswith("|"))
    assert line.endswith(f"| {record['shown']} |")


def test_a_script_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script: dict[str, Any] = runpy.run_path(str(FOLDER / "chi2_proxy.py"))
    main = script["main"]
    main.__globals__.update(ACTIONS=200, HACKS=2, STEPS=2)
    monkeypatch.setattr(sys, "argv", ["chi2_proxy.py", "--seeds", "2", "--output", str(tmp_path)])
    main()
    out = capsys.readouterr()
    assert "published: under χ²" in out.out
    assert "SHOWN at this size" in out.out
    assert "seed 1 of 2" in out.err
    record = json.loads((tmp_path / "chi2_proxy.json").read_text())
    assert record["paper"].startswith("42: ")
    assert len(record["numbers"]["true_improvement"]["KL"]) == 2
    assert (tmp_path / "chi2_proxy.png").stat().st_size > 0


def test_sampled_answers_and_their_logits_belong_together() -> None:
    """Prompts of several lengths: the log-probs of sampling are those of the pass that trains, at the same tokens."""
    pytest.importorskip("trl")
    import sums

    from kldiv_kernels.trainer import arithmetic
    from kldiv_kernels.trainer.demo import Size

    model = Size(16, 1, 2).build(sums.TOKENIZER, arithmetic.LONGEST, 0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    problems = [arithmetic.Problem(f"{a}+{b}=", str(a + b)) for a, b in ((1, 2), (10, 2), (49, 48), (7, 30))] * 20
    answers = sums.sample(sums.by(model), problems, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = sums.answer_logits(model, answers)
    again = logits.log_softmax(-1).gather(-1, answers.ids[..., None])[..., 0]
    torch.testing.assert_close(again[answers.mask], answers.logprobs[answers.mask], rtol=1e-4, atol=1e-4)
    assert answers.mask[:, 0].all()
    # The end is an answer's last token, and nothing follows it.
    ended = answers.ids == sums.TOKENIZER.eos_token_id
    assert ended.any()
    assert torch.equal(answers.mask[:, 1:], ~(ended.cumsum(-1)[:, :-1] > 0))
    one = sums.TOKENIZER(["1+2="], return_tensors="pt")
    alone = sums.logits_of(model, one["input_ids"], one["attention_mask"])
    torch.testing.assert_close(alone[0, -1], logits[0, 0], rtol=1e-4, atol=1e-4)
