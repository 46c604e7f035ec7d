"""Small models, ragged batches and a small tokenizer for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, default_data_collator

from kldiv_kernels.trainer import DistillationArguments, DistillationTrainer

VOCAB = 64
LENGTH = 12


def llama(
    seed: int, *, hidden: int = 16, vocab: int = VOCAB, dropout: float = 0.0, tied: bool = True
) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
            attention_dropout=dropout, initializer_range=0.5, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def ragged(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sequences with 1 to all of their labels, now the first and now the last of them.

    Row 0 has a label at position 0, which is nobody's target: a count that forgets the shift is wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        tokens = torch.randint(0, VOCAB, (LENGTH,), generator=generator).tolist()
        kept = 2 + (row * 5) % (LENGTH - 2)
        ignored = [-100] * (LENGTH - kept)
        rows.append(
            {"input_ids": tokens, "labels": tokens[:kept] + ignored if row % 2 == 0 else ignored + tokens[-kept:]}
        )
    return rows


def with_rows(rows: list[dict[str, Any]], k: int = 5, seed: int = 0) -> list[dict[str, Any]]:
    """A teacher known by k random log-probs a position, by none at every fourth."""
    generator = torch.Generator().manual_seed(seed)
    for number, row in enumerate(rows):
        logprobs, ids = torch.randn(LENGTH, VOCAB, generator=generator).log_softmax(-1).topk(k)
        ids[number % 4 :: 4] = -1
        row |= {"topk_ids": ids.tolist(), "topk_logprobs": logprobs.tolist()}
    return rows


def batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in ragged(count, seed)]) for name in ("input_ids", "labels")}


def arguments(folder: Path, **options: Any) -> DistillationArguments:
    defaults: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return DistillationArguments(output_dir=str(folder), **{**defaults, **options})


def trainer(folder: Path, *, student: Any = None, teacher: Any = None, rows: Any = None, **options: Any) -> Any:
    """A `DistillationTrainer` over `ragged` rows; `callbacks` go to it, other options to its arguments.

    Rows that have a teacher get no other.
    """
    callbacks = options.pop("callbacks", None)
    rows = ragged(8) if rows is None else rows
    if teacher is None and "topk_ids" not in rows[0]:
        teacher = llama(2, hidden=24)
    return DistillationTrainer(
        llama(1) if student is None else student,
        teacher,
        arguments(folder, **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """w0 … w62 and an end-of-text token: `VOCAB` tokens."""
    vocab = {"<|endoftext|>": 0, **{f"w{index}": index + 1 for index in range(VOCAB - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{index}" for index in torch.randint(0, VOCAB - 1, (count,), generator=generator).tolist())


def pair(folder: Path) -> Path:
    """A student, a teacher and a text for them, in this folder."""
    for name, seed, hidden in (("student", 1, 16), ("teacher", 2, 24)):
        llama(seed, hidden=hidden).save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(words(2000))
    return folder
