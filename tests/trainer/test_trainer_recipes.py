"""A recipe in the place of the trainer's loss, and `kldiv train opd`: gradients, options, and that they learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import cli
from kldiv_kernels.trainer import DistillationTrainer, recipe_options
from kldiv_kernels.trainer.opd import OnPolicyArguments, OnPolicyTrainer
from kldiv_kernels.trainer.recipe_loss import RecipeLoss, settable

NEEDED: dict[str, dict[str, Any]] = {"bidirectional_kl": {"forward_weights": (1.0, 0.5), "reverse_weights": (0.5, 1.0)}}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.pair(tmp_path_factory.mktemp("models"))


def kldiv(*arguments: str) -> tuple[int, str]:
    return commands.invoke(cli.app, *arguments)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def gradient(trainer: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count)).backward()
    found = trainer.model.get_input_embeddings().weight.grad
    return found.clone()


@pytest.mark.parametrize("name", recipe_options.DISTILLATION)
def test_the_loss_is_the_recipe_on_shifted_labels(name: str, tmp_path: Path) -> None:
    """On ragged labels: those that nobody predicts, and those that are ignored, are out."""
    options, batch = NEEDED.get(name, {}), tiny.batch(4)
    trainer = tiny.trainer(tmp_path, recipe=recipe_options.short_name(name), recipe_options=options)
    assert not trainer.fused_linear
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    found = gradient(trainer, batch, int((labels != -100).sum()))
    logits = trainer.model(input_ids=batch["input_ids"]).logits
    with torch.no_grad():
        theirs = trainer.teacher_model(input_ids=batch["input_ids"]).logits
    others = () if name == "dft_loss" else (theirs,)
    recipe = getattr(kk.recipes, name)
    takes_labels = name not in ("bidirectional_kl",)
    told = {"labels": labels} if takes_labels else {"mask": labels != -100}
    trainer.model.zero_grad()
    recipe(logits, *others, **told, **options).backward()
    wanted = trainer.model.get_input_embeddings().weight.grad
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(("name", "options"), [("asft", {}), ("entropy_aware", {"gamma": 0.3})], ids=str)
def test_micro_batches_are_one_step(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of equally long sequences, where a mean of means is the mean."""
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in tiny.ragged(8)]
    ends = []
    for size, accumulation in ((8, 1), (2, 4)):
        trainer = tiny.trainer(
            tmp_path / str(size), rows=rows, recipe=name, recipe_options=options, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, learning_rate=1e-2, optim="sgd",
            max_grad_norm=0.0,
        )  # fmt: skip
        start = trainer.model.get_input_embeddings().weight.detach().clone()
        trainer.train()
        ends.append(trainer.model.get_input_embeddings().weight.detach() - start)
    assert ends[0].abs().max() > 1e-4
    assert (ends[0] - ends[1]).abs().max() <= 1e-4 * ends[0].abs().max()


def test_distill_by_a_recipe_from_option_to_file(models: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = [
        "train", "distill", "--student", str(models / "student"), "--teacher", str(models / "teacher"), "--data",
        str(models / "text.txt"), "--output", str(output), "--steps", "30", "--batch-size", "8", "--block-size", "16",
        "--lr", "2e-2", "--eval-every", "15",
    ]  # fmt: skip
    code, printed = kldiv(*given, "--recipe", "entropy_aware", "--set", "confidence_k=32")
    assert code == 0, printed
    summary = json.loads((output / "summary.json").read_text())
    assert summary["loss"] == {"recipe": "entropy_aware_kl", "confidence_k": 32}
    kls = [entry["eval_kl"] for entry in lines(output) if "eval_kl" in entry]
    assert kls[-1] < 0.7 * kls[0]
    for more, option, message in (
        (["--recipe", "entropi_aware"], "--recipe", "did you mean entropy_aware?"),
        (["--recipe", "asft", "--set", "kl_cof=1"], "--set", "kl_cof is no option of asft_loss; did you mean kl_coef?"),
        (["--recipe", "asft", "--set", "kind=js"], "--set", "kind is 'js'; expected reverse_kl or forward_kl"),
        (["--recipe", "asft", "--set", "kl_coef"], "--set", "'kl_coef' is no name=value"),
        (["--recipe", "bidirectional"], "--set", "has no default of forward_weights, reverse_weights"),
        (["--set", "kl_coef=1"], "--set", "given without --recipe"),
        (["--recipe", "asft", "--kind", "js"], "--kind", "not with --recipe, which is the loss"),
        (["--recipe", "asft", "--fused-linear"], "", "fused_linear is True, but the recipe"),
    ):
        fresh = [*given[:8], "--output", str(tmp_path / "other"), *given[10:]]
        code, printed = kldiv(*fresh, *more)
        assert (code != 0, option in printed, message in printed) == (True, True, True), printed
        assert not (tmp_path / "other").exists()


def test_options_of_recipes() -> None:
    assert set(settable("asft_loss")) == {"kl_coef", "kind", "temperature"}
    assert {"baseline", "k", "loss_type", "clip_high"} <= set(settable("vopd_loss"))
    assert "teacher_logits" not in settable("kd_loss")
    assert recipe_options.parsed(["a=1e-3", "b = (1, 2)", "c=None", "d=text", "e=x=y"]) == {
        "a": 1e-3, "b": (1, 2), "c": None, "d": "text", "e": "x=y",
    }  # fmt: skip
    for name in recipe_options.DISTILLATION:
        assert recipe_options.function_of("w", name, recipe_options.DISTILLATION) == name
        RecipeLoss(name, NEEDED.get(name, {})).check("w")
    with pytest.raises(ValueError, match="w: recipe is 'kl'; expected asft, bidirectional, "):
        recipe_options.function_of("w", "kl", recipe_options.DISTILLATION)


def on_policy(folder: Path, recipe: str, base: Any = None, **options: Any) -> OnPolicyTrainer:
    arguments: dict[str, Any] = {"report_to": "none", "use_cpu": True, "save_strategy": "no", **options}
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in tiny.ragged(16)]
    return OnPolicyTrainer(
        tiny.llama(1), tiny.llama(2, hidden=24),
        OnPolicyArguments(output_dir=str(folder), recipe=recipe, prompt_length=3, completion_length=6, **arguments),
        base_model=base, train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip


def test_what_the_student_wrote_is_scored_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a definition on the sequences: prompts, and what stands behind an end of text, have no loss."""
    trainer = on_policy(tmp_path, "gopd", tiny.llama(3), recipe_options={"extrapolation": 1.5})
    prompts = torch.tensor([[5, 6, 7, 1, 1], [8, 9, 3, 2, 2]])
    # The second ends after two tokens: 0 is the end of text.
    written = torch.tensor([[5, 6, 7, 11, 12, 13, 14, 15, 16], [8, 9, 3, 21, 0, 30, 31, 32, 33]])
    monkeypatch.setattr(trainer, "_written", lambda model, given: written)
    found = gradient(trainer, {"input_ids": prompts, "labels": prompts}, 10)
    logits = trainer.model(input_ids=written).logits.double().log_softmax(-1)
    with torch.no_grad():
        assert trainer.base_model is not None
        assert trainer.teacher_model is not None
        teacher, base = (
            m(input_ids=written).logits.double().log_softmax(-1) for m in (trainer.teacher_model, trainer.base_model)
        )
    rows = ((logits.exp() * (logits - 1.5 * teacher + 0.5 * base)).sum(-1))[:, 2:-1]
    kept = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]) > 0
    trainer.model.zero_grad()
    rows[kept].mean().backward()
    wanted = trainer.model.get_input_embeddings().weight.grad
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_student_samples_from_itself(tmp_path: Path) -> None:
    """The frequencies of its first tokens are those of its softmax, at the sampling temperature."""
    trainer = on_policy(tmp_path, "opd", sampling_temperature=2.0)
    prompt = torch.tensor([[5, 6, 7]])
    trainer.model.train()
    written = trainer._written(trainer.model, prompt.expand(20_000, 3))
    assert trainer.model.training
    assert written.shape == (20_000, 9)
    expected = (trainer.model(input_ids=prompt).logits[0, -1].detach() / 2.0).softmax(-1)
    frequencies = written[:, 3].bincount(minlength=tiny.VOCAB) / 20_000
    assert (frequencies - expected).abs().sum() / 2 < 0.05


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("opd", []), ("vopd", ["--set", "baseline=top_k", "--set", "k=8"]), ("gopd", ["--set", "extrapolation=1.1"]),
     ("tsd_kd", ["--set", "k=5", "--set", "entropy_coef=0"])],
    ids=["opd", "vopd", "gopd", "tsd_kd"],
)  # fmt: skip
def test_opd_learns_and_resumes(recipe: str, options: list[str], models: Path, tmp_path: Path) -> None:
    def train(output: Path, steps: int, *more: str) -> None:
        code, printed = kldiv(
            "train", "opd", "--student", str(models / "student"), "--teacher", str(models / "teacher"), "--data",
            str(models / "text.txt"), "--output", str(output), "--recipe", recipe, *options, "--steps", str(steps),
            "--batch-size", "16", "--prompt-length", "4", "--completion-length", "8", "--lr", "2e-2", "--log-every",
            "5", "--eval-every", "20", "--save-every", "20", *more,
        )  # fmt: skip
        assert code == 0, printed

    train(tmp_path / "run", 40)
    metrics = lines(tmp_path / "run")
    sampled = [entry["sampled_kl"] for entry in metrics if "sampled_kl" in entry]
    assert len(sampled) == 8
    assert sum(sampled[-2:]) < 0.92 * sum(sampled[:2])
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss"]["recipe"] == recipe
    if recipe != "vopd":
        return
    # Killed after 20 steps and continued: the same numbers, sampling included.
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-40")
    train(tmp_path / "killed", 40, "--resume")
    again = [entry["sampled_kl"] for entry in lines(tmp_path / "killed") if "sampled_kl" in entry]
    assert again == sampled


@pytest.mark.parametrize(
    ("more", "option", "message"),
    [
        (["--recipe", "vodp"], "--recipe", "did you mean vopd?"),
        (["--recipe", "vopd", "--set", "baseline=half"], "--set", "expected full, top_k or none"),
        (["--base", "nowhere"], "--base", "only with --recipe gopd, not opd"),
        (["--sampling-temperature", "0"], "--sampling-temperature", "0.0 is not above 0 and finite"),
        (["--teacher", "./nowhere"], "--teacher", "./nowhere does not exist"),
    ],
    ids=["recipe", "set", "base", "temperature", "teacher"],
)
def test_wrong_options_of_opd(more: list[str], option: str, message: str, models: Path, tmp_path: Path) -> None:
    given = {
        "--student": str(models / "student"), "--teacher": str(models / "teacher"), "--data": str(models / "text.txt"),
        "--output": str(tmp_path / "run"),
    } | dict(zip(more[::2], more[1::2], strict=True))  # fmt: skip
    code, printed = kldiv("train", "opd", *(word for pair in given.items() for word in pair))
    assert (code, option in printed, message in printed) == (2, True, True), printed
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model is None, with the recipe 'gopd'; expected one"):
        on_policy(tmp_path, "gopd")
    with pytest.raises(ValueError, match="base_model is given, with the recipe 'opd'; expected none"):
        on_policy(tmp_path, "opd", tiny.llama(3))
    with pytest.raises(ValueError, match="teacher_model is None; the recipe 'asft_loss' takes its logits"):
        DistillationTrainer(tiny.llama(1), None, tiny.arguments(tmp_path, recipe="asft"))
    rows = tiny.with_rows(tiny.ragged(4))
    with pytest.raises(ValueError, match="data that have topk_ids and topk_logprobs; expected none"):
        DistillationTrainer(tiny.llama(1), None, tiny.arguments(tmp_path, recipe="dft"), train_dataset=rows)
    with pytest.raises(ValueError, match=r"recipe_options is .*, without a recipe"):
        tiny.arguments(tmp_path, recipe_options={"k": 1})
