"""The demo: a small teacher trained on text that every Python carries, and two students of one size.

One student is distilled from the teacher, the other trained by cross-entropy alone, from the same weights, over the
same batches, for the same number of steps. Both are measured on the same held-out files, and what comes out is
reported.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed

from kldiv_kernels.trainer import loss_cost, run, toy_pairs
from kldiv_kernels.trainer.data import Blocks, pack, split_blocks
from kldiv_kernels.trainer.plots import plot_comparison, plot_final
from kldiv_kernels.trainer.quiet import quiet

# Tests are repetitive, code pages are tables of numbers, and site-packages differ from machine to machine.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
_END_OF_TEXT = "<|endoftext|>"
# Folder of each stage, and what a reader calls it.
_STAGES = {
    "teacher": "teacher",
    "student_distilled": "student, distilled",
    "student_ce": "student, cross-entropy alone",
}
_LOSS_COST = "loss_cost"
# Preferences for `kldiv train preference`.
PAIRS = "pairs.jsonl"


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of a Llama; the feed-forward layer is 8/3 as wide, rounded up to 64."""

    hidden: int
    layers: int
    heads: int

    def build(self, tokenizer: PreTrainedTokenizerBase, block_size: int, seed: int) -> LlamaForCausalLM:
        set_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=self.hidden,
                intermediate_size=-(-self.hidden * 8 // 3 // 64) * 64,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=block_size,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )


@dataclass(frozen=True)
class Settings:
    """Sized so that the whole demo takes minutes on a processor."""

    # Of each student. The teacher takes 5/2 as many: after the students' number it is no better than they are (a
    # small model learns as fast at first), and there is nothing to distil.
    steps: int = 400
    seed: int = 0
    batch_size: int = 8
    block_size: int = 128
    vocab_size: int = 4096
    # Enough for one pass: the byte-level BPE makes a token of three to four characters.
    characters_a_token: int = 4
    held_out_blocks: int = 128
    teacher: Size = Size(192, 4, 4)
    student: Size = Size(128, 2, 4)
    learning_rate: float = 2e-3

    @property
    def teacher_steps(self) -> int:
        return self.steps * 5 // 2


def open_demo(folder: Path, settings: Settings, *, resume: bool) -> None:
    """Check the folder against the settings, and without `resume` replace an earlier demo in it.

    Raises ValueError when the folder holds something else, or a demo with other settings is to be resumed.
    """
    options: dict[str, Any] = {"demo": asdict(settings)}
    if not resume and (folder / run.OPTIONS).exists() and "demo" in run.read_json(folder / run.OPTIONS):
        shutil.rmtree(folder)
    run.check_run(folder, options, resume=resume)
    run.begin_run(folder, options)


def run_demo(folder: Path, settings: Settings, console: Console | None = None) -> dict[str, Any]:
    """Every stage that is not finished; then the summary of all of them, printed and left in `folder`."""
    console = console or Console()
    run.write_whole(folder / PAIRS, toy_pairs.jsonl())
    with quiet():
        tokenizer, blocks = _text(folder, settings, console)
    for number, (stage, name) in enumerate(_STAGES.items(), start=1):
        console.rule(f"{number}/{len(_STAGES)} {name}")
        if run.is_finished(folder / stage):
            console.print("finished before")
            continue
        size, steps = (
            (settings.teacher, settings.teacher_steps) if stage == "teacher" else (settings.student, settings.steps)
        )
        with quiet():
            teacher = None if stage == "teacher" else LlamaForCausalLM.from_pretrained(folder / "teacher")
        run.fit(
            size.build(tokenizer, settings.block_size, settings.seed),
            teacher,
            blocks,
            run.training_arguments(
                folder / stage,
                steps=steps,
                batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                log_every=max(1, steps // 50),
                eval_every=max(1, steps // 5),
                save_every=max(1, steps // 5),
                kind="forward_kl",
                ce_weight=0.0 if stage == "student_distilled" else 1.0,
            ),
            tokenizer=tokenizer,
            console=console,
        )
    with quiet():
        cost = _loss_cost(folder, settings, blocks, console)
    summaries = _report(folder, cost, console)
    console.print(
        "\nWhat to try next, with these models, a page of Python's documentation and a toy set of preferences:"
    )
    for command in next_commands(folder, settings):
        console.print(f"  {command}", highlight=False, markup=False, soft_wrap=True)
    return summaries


def next_commands(folder: Path, settings: Settings) -> list[str]:
    """Another divergence, a teacher on disk, preferences. The runs stand beside `folder`, which the next replaces."""
    topics = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    teacher, student = folder / "teacher", folder / "student_ce"
    js, cache, cached, tdpo = (folder.with_name(f"{folder.name}_{name}") for name in ("js", "cache", "cached", "tdpo"))
    data = ("--data", topics, "--block-size", settings.block_size)
    commands: list[tuple[Any, ...]] = [
        ("train", "distill", "--student", student, "--teacher", teacher, *data, "--kind", "js", "--steps", 100,
         "--output", js),
        ("cache-teacher", "--teacher", teacher, *data, "--k", 64, "--output", cache),
        ("train", "distill", "--student", student, "--teacher-cache", cache, "--steps", 100, "--output", cached),
        ("train", "preference", "--model", student, "--data", folder / PAIRS, "--recipe", "tdpo",
         "--lr", 3e-4, "--steps", 80, "--output", tdpo),
    ]  # fmt: skip
    return [shlex.join(map(str, ("kldiv", *words))) for words in commands]


def standard_library_text() -> Iterator[tuple[str, str]]:
    """(path inside the standard library, content) of its sources, documentation topics included, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _SKIPPED_FOLDERS & set(inside.parts):
            try:
                yield str(inside), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _text(folder: Path, settings: Settings, console: Console) -> tuple[PreTrainedTokenizerBase, Blocks]:
    documents = Dataset.from_list([{"text": text} for _, text in standard_library_text()])
    documents = documents.shuffle(seed=settings.seed)
    tokens = (settings.teacher_steps * settings.batch_size + settings.held_out_blocks) * settings.block_size
    kept = list(_first(documents["text"], tokens * settings.characters_a_token))
    console.print(f"text: {len(kept)} files of the standard library, {sum(map(len, kept)):,} characters")
    with console.status("training the tokenizer"):
        tokenizer = _tokenizer(folder / "tokenizer", kept, settings.vocab_size)
    blocks = pack(Dataset.from_dict({"text": kept}), tokenizer, settings.block_size)
    split = split_blocks(blocks, settings.held_out_blocks / len(blocks))
    console.print(
        f"blocks of {settings.block_size} tokens: {len(split.train):,} for training, {len(split.held_out)} held out"
    )
    return tokenizer, split


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _tokenizer(folder: Path, texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE trained on the text; read back on resume, so that it is the one the teacher saw."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[_END_OF_TEXT],
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
            length=len(texts),
        )
        beside = folder.with_name(f".{folder.name}.part")
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END_OF_TEXT).save_pretrained(beside)  # type: ignore[no-untyped-call]
        beside.rename(folder)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _loss_cost(folder: Path, settings: Settings, blocks: Blocks, console: Console) -> dict[str, Any]:
    """Measured in seconds, on one batch; what an earlier call measured is kept, as finished stages are."""
    kept = folder / f"{_LOSS_COST}.json"
    if kept.exists():
        return dict(run.read_json(kept))
    teacher, student = (LlamaForCausalLM.from_pretrained(folder / stage) for stage in ("teacher", "student_distilled"))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    batch = torch.tensor(blocks.train[: settings.batch_size]["input_ids"], device=device)
    with console.status("measuring the loss's share of a step"):
        for model in (student, teacher):
            model.to(device)  # type: ignore[arg-type]
        cost = loss_cost.measure(student, teacher, batch)
    run.write_json(kept, cost)
    return cost


def _report(folder: Path, cost: dict[str, Any], console: Console) -> dict[str, Any]:
    summaries = {stage: run.read_json(folder / stage / run.SUMMARY) for stage in _STAGES}
    histories = {
        stage: [json.loads(line) for line in (folder / stage / run.METRICS).read_text().splitlines()]
        for stage in _STAGES
    }
    run.write_whole(
        folder / run.METRICS,
        "".join(json.dumps({"stage": stage, **entry}) + "\n" for stage in _STAGES for entry in histories[stage]),
    )
    run.write_json(folder / run.SUMMARY, {**summaries, _LOSS_COST: {**cost, "sentence": loss_cost.sentence(cost)}})
    rows = [
        (
            _STAGES[stage],
            f"{summary['parameters']:,}",
            f"{summary['steps']:,}",
            f"{summary['held_out_loss']:.4f}",
            f"{summary['held_out_perplexity']:.1f}",
            "—" if summary["teacher_student_kl"] is None else f"{summary['teacher_student_kl']:.4f}",
        )
        for stage, summary in summaries.items()
    ]
    head = ("model", "parameters", "steps", "held-out loss", "perplexity", "KL(teacher ∥ student)")
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    run.write_whole(folder / "summary.md", "\n".join((*lines, "", loss_cost.sentence(cost))) + "\n")
    plot_comparison(folder / "loss_curves.png", {name: histories[stage] for stage, name in _STAGES.items()})
    plot_final(
        folder / "comparison.png",
        {
            _STAGES[stage]: {
                "held-out cross-entropy": summary["held_out_loss"],
                "KL(teacher ∥ student)": summary["teacher_student_kl"],
            }
            for stage, summary in summaries.items()
        },
    )
    # In 80 columns the names wrap between words.
    table = Table(Column(head[0], min_width=13), *head[1:], title=str(folder), pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(loss_cost.sentence(cost), highlight=False)
    for name in ("summary.md", "loss_curves.png", "comparison.png"):
        console.print(folder / name, highlight=False)
    return summaries
