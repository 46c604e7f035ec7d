"""`kldiv train grpo` from option to file, and the sums that it trains on."""

from __future__ import annotations

import json
import math
import sys
from importlib import metadata
from pathlib import Path

import commands
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

from kldiv_kernels import cli, trainer
from kldiv_kernels.trainer import arithmetic

STEPS = 4
SMALL = {
    "--steps": str(STEPS), "--warm-up-steps": "2", "--batch-size": "2", "--group-size": "3", "--log-every": "1",
    "--eval-every": "2",
}  # fmt: skip


def kldiv(*arguments: str) -> tuple[int, str]:
    return commands.invoke(cli.app, *arguments)


def grpo(given: dict[str, str]) -> tuple[int, str]:
    return kldiv("train", "grpo", *(word for pair in given.items() for word in pair))


def two_digits(completions: list[str], **_: object) -> list[float]:
    """A reward that a model which knows nothing finds, and learns from in a few steps."""
    return [float(completion[:2].isdigit() and len(completion) >= 2) for completion in completions]


def weights(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("grpo") / "run"
    given = SMALL | {"--output": str(folder), "--entropy-coef": "0.01", "--clip-high": "0.28", "--seed": "3"}
    code, printed = grpo(given)
    assert code == 0, printed
    return folder, printed


def test_a_run_leaves_a_model_metrics_a_summary_and_a_plot(run: tuple[Path, str]) -> None:
    folder, printed = run
    summary = json.loads((folder / "summary.json").read_text())
    evaluated = {entry["step"]: entry["held_out_accuracy"] for entry in lines(folder) if "held_out_accuracy" in entry}
    assert list(evaluated) == [0, 2, 4]
    assert summary["held_out_accuracy"] == {"before": evaluated[0], "after": evaluated[4]}
    assert f"{evaluated[0]:.1%} before, {evaluated[4]:.1%} after" in printed
    logged = [entry for entry in lines(folder) if "loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, STEPS + 1))
    # Each batch of completions serves two steps.
    assert [entry["step"] for entry in logged if "reward" in entry] == [1, 3]
    assert summary["completions"] == 2 * 2 * 3
    assert all(0 < entry["entropy"] <= math.log(14) for entry in logged)
    assert (summary["steps"], summary["seed"]) == (STEPS, 3)
    assert summary["loss"]["clip_high"] == 0.28
    assert summary["loss"]["entropy_coef"] == 0.01
    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert not torch.equal(weights(folder), weights(folder / "start"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("12+7=19")["input_ids"]) == "12+7=19"


def test_a_folder_that_is_not_empty_is_left_alone(run: tuple[Path, str]) -> None:
    before = (run[0] / "summary.json").stat().st_mtime_ns
    code, printed = grpo({"--output": str(run[0])})
    assert (code, "is not empty; choose another folder" in printed) == (2, True), printed
    assert (run[0] / "summary.json").stat().st_mtime_ns == before


def test_a_given_model_is_trained_as_it_is_with_the_exact_kl_to_it(
    run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "exact_match", two_digits)
    start = run[0] / "start"
    given = SMALL | {
        "--model": str(start), "--output": str(tmp_path / "run"), "--loss-type": "gspo", "--kl-coef": "0.1",
        "--kl-estimator": "reverse_kl",
    }  # fmt: skip
    code, printed = grpo(given)
    assert code == 0, printed
    assert not (tmp_path / "run" / "start").exists()
    kl = [entry["kl"] for entry in lines(tmp_path / "run") if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[-1] > 1e-6
    assert not torch.equal(weights(tmp_path / "run"), weights(start))


def test_the_reward_lifts_what_it_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "exact_match", two_digits)
    given = SMALL | {"--output": str(tmp_path / "run"), "--steps": "12", "--batch-size": "8", "--group-size": "8"}
    code, printed = grpo(given | {"--lr": "3e-3", "--eval-every": "12"})
    assert code == 0, printed
    rewards = [entry["reward"] for entry in lines(tmp_path / "run") if "reward" in entry]
    assert rewards[-1] > rewards[0] + 0.3, rewards


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--loss-type": "ppo"}, "for --loss-type: 'ppo'; expected grpo, bnpo, "),
        ({"--clip-low": "-1"}, "for --clip-low: -1.0; expected 0 or more"),
        ({"--clip-high": "2", "--loss-type": "sapo"}, "for --clip-high: 2.0, which loss_type 'sapo' has no use for"),
        ({"--kl-coef": "-0.1"}, "for --kl-coef: -0.1 is below 0"),
        ({"--kl-coef": "nan"}, "for --kl-coef: nan; expected finite"),
        ({"--kl-estimator": "k4"}, "for --kl-estimator: 'k4'; expected k1, k2, "),
        ({"--entropy-coef": "inf"}, "for --entropy-coef: inf; expected finite"),
        ({"--lr": "0"}, "for --lr: 0.0 is not above 0 and finite"),
        ({"--group-size": "1"}, "for '--group-size': "),
        ({"--warm-up-accuracy": "0"}, "for --warm-up-accuracy: 0.0 is not above 0 and at most 1"),
        ({"--warm-up-steps": "0"}, "for '--warm-up-steps': "),
        ({"--backend": "gpu"}, "for --backend: unknown 'gpu'; expected one of auto"),
        ({"--model": "./nowhere"}, "for --model: ./nowhere does not exist"),
        ({"--output": __file__}, "is a file"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_and_nothing_is_written(wrong: dict[str, str], message: str, tmp_path: Path) -> None:
    code, printed = grpo({"--output": str(tmp_path / "run")} | wrong)
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "run").exists()


@pytest.fixture
def _not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not yet run the command."""
    monkeypatch.delitem(sys.modules, "kldiv_kernels.trainer.grpo", raising=False)
    monkeypatch.delattr(trainer, "grpo", raising=False)


@pytest.mark.usefixtures("_not_imported")
def test_without_trl_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.grpo_config", None)
    code, printed = grpo({"--output": str(tmp_path / "run")})
    assert (code, printed) == (2, "kldiv: trl is not installed; run: pip install kldiv_kernels[trl]")


@pytest.mark.usefixtures("_not_imported")
def test_another_trl_than_the_adapter_knows_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.0.0" if name == "trl" else installed(name))
    code, printed = grpo({"--output": str(tmp_path / "run")})
    assert code == 2
    assert printed.startswith("kldiv: kldiv_kernels.adapters.trl.GRPOTrainer: TRL is 2.0.0; expected TRL 1.15 to 1.16")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("completion", "right"),
    [("19", True), (" 19\nThe", True), ("19+", True), ("199", False), ("1", False), ("-19", False), ("", False),
     ("=19", False), ("019", False)],
)  # fmt: skip
def test_the_reward_is_for_a_completion_that_begins_with_the_answer(completion: str, right: bool) -> None:
    assert arithmetic.is_correct(completion, "19") == right
    assert arithmetic.exact_match(completions=[completion, "7"], answer=["19", "7"], prompts=[]) == [right, 1.0]


def test_no_held_out_sum_is_trained_on_either_way_round() -> None:
    train, held_out = arithmetic.problems()
    assert len(train) + len(held_out) == len({*train, *held_out}) == arithmetic.OPERANDS**2
    assert all(str(eval(prompt.removesuffix("="))) == answer for prompt, answer in train + held_out)

    def pair(prompt: str) -> frozenset[str]:
        return frozenset(prompt.removesuffix("=").split("+"))

    assert not {pair(prompt) for prompt, _ in train} & {pair(prompt) for prompt, _ in held_out}
    assert arithmetic.problems() == (train, held_out)


def test_the_warm_up_has_the_answer_and_the_end_for_targets() -> None:
    tokenizer = arithmetic.character_tokenizer()
    row, longest = arithmetic.supervised(
        [arithmetic.Problem("2+7=", "9"), arithmetic.Problem("49+49=", "98")], tokenizer
    )
    assert tokenizer.decode(row["input_ids"]) == "2+7=9" + "<|end|>" + 3 * "<|pad|>"
    assert [label for label in row["labels"] if label != -100] == row["input_ids"][4:6]
    assert row["labels"].index(row["input_ids"][4]) == 4
    assert sum(row["attention_mask"]) == 6
    assert -100 not in longest["labels"][6:]


def test_help_shows_both_commands_and_train_alone_distils() -> None:
    code, printed = kldiv("train", "--help")
    assert code == 0
    for words in ("distill Distil a teacher", "grpo Train a model by rewards", "kldiv train distill --help"):
        assert words in printed
    assert "$ kldiv train grpo --output" in kldiv("train", "grpo", "--help")[1]
    assert "--teacher" in kldiv("train", "distill", "--help")[1]
    assert kldiv("train", "--student", "./nowhere", "--help") == kldiv("train", "distill", "--help")
    code, printed = kldiv("train", "--student", "./nowhere", "--data", "x.txt", "--output", "x", "--ce-weight", "1")
    assert (code, "for --student: ./nowhere does not exist" in printed) == (2, True), printed
    code, printed = kldiv("train", "grop", "--output", "x")
    assert (code, "No such command 'grop'" in printed) == (2, True), printed
