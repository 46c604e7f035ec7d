"""`kldiv train preference`: losses by definition, and that it learns and resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerFast, TrainerControl, TrainerState

from kldiv_kernels import cli
from kldiv_kernels.trainer import PreferenceArguments, PreferenceTrainer, pairs, preference, toy_pairs
from kldiv_kernels.trainer.pair_loss import MADE, PairLoss
from kldiv_kernels.trainer.recipe_loss import settable
from kldiv_kernels.trainer.recipe_options import PREFERENCE
from kldiv_kernels.trainer.reference_reset import ResetReference

# Prompt and answers of several lengths: of three pairs the second has a rejected answer of one token.
ROWS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w4 w9 w7"},
    {"prompt": "w3", "chosen": " w8 w8", "rejected": ""},
    {"prompt": "w5 w6", "chosen": " w7", "rejected": " w10 w11 w12 w13 w14"},
]


@pytest.fixture(autouse=True)
def _as_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, and on one thread: two runs are compared bit by bit."""
    commands.stay_offline(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of the toy set, and that set."""
    folder = tmp_path_factory.mktemp("models")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    rows = list(toy_pairs.toy_pairs())
    texts = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "model")
    tiny.llama(1, vocab=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "other")
    tiny.llama(1, vocab=len(tokenizer), hidden=24).save_pretrained(folder / "other")
    (folder / "pairs.jsonl").write_text(toy_pairs.jsonl())
    return folder


def kldiv(*arguments: str) -> tuple[int, str]:
    return commands.invoke(cli.app, *arguments)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trainer(folder: Path, recipe: str, **options: Any) -> PreferenceTrainer:
    recipe_options = options.pop("recipe_options", {})
    rows = [pairs.encode(row, tiny.word_tokenizer(), max_length=20, phrases=recipe == "rrpo") for row in ROWS]
    return PreferenceTrainer(
        tiny.llama(1), tiny.llama(2),
        PreferenceArguments(
            output_dir=str(folder), recipe=recipe, recipe_options=recipe_options, completion_length=4,
            report_to="none", use_cpu=True, save_strategy="no", per_device_eval_batch_size=2, **options,
        ),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip


def log_softmax(model: Any, ids: list[int]) -> Tensor:
    """[tokens, vocab] in float64 of one sequence by itself, without padding: row t predicts token t + 1."""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def by_definition(made: PreferenceTrainer, recipe: str, online: list[list[int]]) -> Tensor:
    """Pair by pair and token by token; online: the answers that were written, [3 pairs][tokens]."""
    total = torch.zeros((), dtype=torch.float64)
    for row, extra in zip(made.train_dataset, online, strict=True):
        ratios, kls, phrase_ratios = [], [], []
        for name in pairs.ANSWERS:
            ids = row[f"{name}_ids"]
            own = log_softmax(made.model, ids)
            with torch.no_grad():
                reference = log_softmax(made.teacher_model, ids)
            at = range(row[f"{name}_start"] - 1, len(ids) - 1)
            each = {t: own[t, ids[t + 1]] - reference[t, ids[t + 1]] for t in at}
            ratios.append(sum(each.values()))
            kls.append(sum((reference[t].exp() * (reference[t] - own[t])).sum() for t in at))
            marks = row.get(f"{name}_phrases", [1] * len(ids))
            phrase_ratios.append(sum(x for t, x in each.items() if marks[t + 1]))
        margin = 0.1 * (ratios[0] - ratios[1])
        if recipe == "tdpo":
            margin = margin - 0.05 * (kls[1] - kls[0].detach())
        if recipe == "f_dpo":
            links = [torch.tensor(2.0).log() + logsigmoid(x) for x in ratios]
            margin = 0.3 * (links[0] - links[1])
        if recipe == "rrpo":
            margin = 0.1 * (phrase_ratios[0] - phrase_ratios[1])
        loss = -logsigmoid(margin)
        if recipe == "rrpo":
            loss = loss + 0.01 * kls[0]
        if recipe in ("hypo", "xpo"):
            ids, start = row["prompt_ids"] + extra, len(row["prompt_ids"])
            own = log_softmax(made.model, ids)
            reference = log_softmax(made.teacher_model, ids).detach()
            at = range(start - 1, len(ids) - 1)
            written = sum(own[t, ids[t + 1]] for t in at)
            apart = sum(own[t, ids[t + 1]] - reference[t, ids[t + 1]] for t in at).detach()
            loss = loss + 0.05 * (written * apart if recipe == "hypo" else written)
        total = total + loss / len(ROWS)
    return total


OPTIONS: dict[str, dict[str, Any]] = {
    "f_dpo": {"divergence": "js", "beta": 0.3}, "hypo": {"kl_coef": 0.05}, "xpo": {"alpha": 0.05}
}  # fmt: skip


@pytest.mark.parametrize("recipe", PREFERENCE)
def test_the_loss_and_its_gradient_are_those_of_the_definition(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a padded batch against one sequence after another, and with answers that end early (0 ends a text)."""
    made = trainer(tmp_path, recipe, recipe_options=OPTIONS.get(recipe, {}))
    online, writers = [[20, 21, 22, 23], [24, 0], [0]], []

    def written(model: Any, prompts: Tensor, mask: Tensor, *, length: int) -> Tensor:
        writers.append(model)
        assert [row[keep > 0].tolist() for row, keep in zip(prompts, mask, strict=True)] == [
            row["prompt_ids"] for row in made.train_dataset
        ]
        return torch.cat([prompts, torch.tensor([row + [9] * (length - len(row)) for row in online])], dim=1)

    monkeypatch.setattr(preference, "sampled", written)
    loss = made.compute_loss(made.model, pairs.collate(made.train_dataset))
    made.model.zero_grad()
    loss.backward()
    found = made.model.get_input_embeddings().weight.grad.clone()
    wanted_loss = by_definition(made, recipe, online)
    made.model.zero_grad()
    wanted_loss.backward()
    wanted = made.model.get_input_embeddings().weight.grad
    assert abs(loss.item() - wanted_loss.item()) <= 1e-5 * max(1.0, abs(wanted_loss.item()))
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert writers == {"hypo": [made.model], "xpo": [made.teacher_model]}.get(recipe, [])


def test_answers_to_prompts_that_were_padded_on_the_left() -> None:
    """For models whose positions count from the first place."""
    tokens = torch.tensor([[9, 9, 5, 6, 7, 0], [1, 2, 3, 4, 0, 9]])
    mask, written = torch.tensor([[0, 0, 1], [1, 1, 1]]), torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0
    moved, known, answers = preference._to_the_right(tokens, mask, written)
    assert moved[0, :4].tolist() == [5, 6, 7, 0]
    assert moved[1].tolist() == tokens[1].tolist()
    assert known.tolist() == [[True] * 4 + [False] * 2, [True] * 5 + [False]]
    assert answers.tolist() == [[False] + [True] * 3 + [False] * 2, [False] * 3 + [True] * 2 + [False]]


def test_held_out_numbers_are_those_of_the_definition(tmp_path: Path) -> None:
    """In batches of two of three pairs; and where the model is its reference."""
    made = trainer(tmp_path, "tdpo", recipe_options={"beta": 0.5})
    margins, kl, tokens = [], 0.0, 0
    for row in made.train_dataset:
        ratios = []
        for name in pairs.ANSWERS:
            ids = row[f"{name}_ids"]
            own, reference = (log_softmax(m, ids).detach() for m in (made.model, made.teacher_model))
            at = range(row[f"{name}_start"] - 1, len(ids) - 1)
            ratios.append(sum((own - reference)[t, ids[t + 1]].item() for t in at))
            kl += sum((own[t].exp() * (own[t] - reference[t])).sum().item() for t in at)
            tokens += len(at)
        margins.append(0.5 * (ratios[0] - ratios[1]))
    found = made.evaluate()
    wanted = {
        "eval_reward_margin": sum(margins) / 3,
        "eval_accuracy": sum(x > 0 for x in margins) / 3,
        "eval_policy_kl": kl / tokens,
        "eval_loss": -logsigmoid(torch.tensor(margins, dtype=torch.float64)).mean().item(),
    }
    for name, value in wanted.items():
        assert abs(found[name] - value) <= 1e-5 * max(1.0, abs(value)), name
    made.teacher_model.load_state_dict(made.model.state_dict())
    assert (made.evaluate()["eval_accuracy"], made.evaluate()["eval_policy_kl"]) == (0.5, 0.0)


def command(folder: Path, output: Path, recipe: str, steps: int, *more: str) -> tuple[int, str]:
    return kldiv(
        "train", "preference", "--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl"), "--output",
        str(output), "--recipe", recipe, "--steps", str(steps), "--batch-size", "8", "--lr", "1e-2", "--log-every",
        "5", "--eval-every", "10", "--save-every", "10", "--completion-length", "4", *more,
    )  # fmt: skip


@pytest.mark.parametrize("recipe", PREFERENCE)
def test_it_learns_and_resumes(recipe: str, models_folder: Path, tmp_path: Path) -> None:
    more = {"f_dpo": ["--set", "divergence=js", "--set", "beta=0.3"], "hypo": ["--set", "kl_coef=1e-3"]}.get(recipe, [])

    def train(output: Path, *flags: str) -> None:
        code, printed = command(models_folder, output, recipe, 30, *more, *flags)
        assert code == 0, printed

    train(tmp_path / "run")
    metrics = lines(tmp_path / "run")
    held_out = [entry["eval_accuracy"] for entry in metrics if "eval_accuracy" in entry]
    assert held_out[0] == 0.5
    # Half of the pairs are right for who has not read their prompts. rrpo has fewer tokens to learn from.
    assert held_out[-1] > (0.6 if recipe == "rrpo" else 0.8)
    accuracy = [entry["accuracy"] for entry in metrics if "accuracy" in entry]
    assert accuracy[-1] > (0.7 if recipe == "rrpo" else 0.9)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["held_out_accuracy"] == {"before": 0.5, "after": held_out[-1]}
    assert summary["policy_reference_kl"] > 0
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    if recipe == "hypo":
        # Sampling included, relative to the same reference.
        kill(tmp_path / "run", tmp_path / "killed", 20)
        train(tmp_path / "killed", "--resume")
        assert numbers(tmp_path / "killed") == numbers(tmp_path / "run")


def kill(run: Path, killed: Path, step: int) -> None:
    """A copy of a finished run as it was after the last checkpoint but one, at this step."""
    shutil.copytree(run, killed)
    (killed / "summary.json").unlink()
    shutil.rmtree(killed / f"checkpoint-{step + 10}")
    assert (killed / f"checkpoint-{step}").is_dir()


def numbers(folder: Path) -> list[dict[str, Any]]:
    """Without those of the clock."""
    kept = ("step", "loss", "accuracy", "reward_margin", "policy_kl", "eval_loss", "eval_policy_kl", "grad_norm",
            "reference_resets")  # fmt: skip
    return [{name: entry[name] for name in kept if name in entry} for entry in lines(folder)]


def test_a_reference_that_was_reset_stays_so_through_a_resume(models_folder: Path, tmp_path: Path) -> None:
    """At a learning rate at which held-out pairs get worse now and then."""

    def train(output: Path, *flags: str) -> None:
        more = ["--lr", "0.2", "--eval-every", "1", "--reset-reference", "1", "--log-every", "1"]
        code, printed = command(models_folder, output, "tdpo", 20, *more, *flags)
        assert code == 0, printed

    train(tmp_path / "run")
    resets = [entry["reference_resets"] for entry in lines(tmp_path / "run") if "reference_resets" in entry]
    # Line 11 tells of the evaluations up to step 10, which are before the checkpoint.
    assert 0 < resets[10] < resets[-1]
    kill(tmp_path / "run", tmp_path / "killed", 10)
    train(tmp_path / "killed", "--resume")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "run")


def test_what_a_reference_waits_for_is_in_the_checkpoint(tmp_path: Path) -> None:
    def made() -> tuple[ResetReference, Any]:
        given = {"model": tiny.llama(1), "optimizer": torch.optim.SGD([torch.zeros(1)])}
        state = TrainerState(global_step=3, max_steps=9)
        reset = ResetReference(given["model"], tiny.llama(2), 2)
        return reset, lambda loss: reset.on_evaluate(None, state, TrainerControl(), {"eval_loss": loss}, **given)

    reset, evaluated = made()
    evaluated(1.0)
    evaluated(2.0)
    reset.save(tmp_path / "checkpoint-3")
    again, evaluated = made()
    again.load(tmp_path / "checkpoint-3")
    evaluated(1.5)
    assert (reset.count, again.count) == (0, 1)
    weights = (m.get_input_embeddings().weight for m in (again.reference, tiny.llama(1)))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("more", "option", "message"),
    [
        (["--recipe", "tpdo"], "--recipe", "did you mean tdpo?"),
        (["--recipe", "f_dpo"], "--set", "f_dpo_loss has no default of beta; set it"),
        (["--set", "alpa=1"], "--set", "alpa is no option of tdpo_loss; did you mean alpha?"),
        (["--set", "version=3"], "--set", "version is 3; expected 1 or 2"),
        (["--set", "temperature=2"], "--set", "temperature is no option of tdpo_loss"),
        (["--max-length", "65"], "--max-length", "65 is above the 64 tokens that the model takes"),
        (["--recipe", "hypo", "--completion-length", "64"], "--completion-length", "above the 64 that the model takes"),
        (["--reference", "./nowhere"], "--reference", "./nowhere does not exist"),
        (["--reference", "{other}", "--reset-reference", "1"], "--reset-reference", "cannot take its weights"),
        (["--data", "{text}"], "--data", "has no column chosen and rejected"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[-1],
)
def test_wrong_options(more: list[str], option: str, message: str, models_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1")
    given = {
        "--model": str(models_folder / "model"), "--data": str(models_folder / "pairs.jsonl"),
        "--output": str(tmp_path / "run"),
    }  # fmt: skip
    for name, value in zip(more[::2], more[1::2], strict=True):
        given[name] = value.format(text=tmp_path / "text.txt", other=models_folder / "other")
    code, printed = kldiv("train", "preference", *(word for pair in given.items() for word in pair))
    assert (code, option in printed, message in printed) == (2, True, True), printed
    assert not (tmp_path / "run").exists()


def test_what_recipes_take_is_what_the_trainer_makes() -> None:
    for function, options in PREFERENCE.values():
        loss = PairLoss(function, {"beta": 0.1, **options})
        loss.check("w")
        tensors = {n for n, p in loss.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert tensors <= MADE.keys()
        assert not MADE.keys() & settable(function).keys()
    with pytest.raises(ValueError, match="recipe is None; expected tdpo, dpo"):
        PreferenceArguments(output_dir="none", recipe=None)
    with pytest.raises(ValueError, match="reference_model is None; rewards are relative to it"):
        PreferenceTrainer(tiny.llama(1), None, PreferenceArguments(output_dir="none", use_cpu=True))
