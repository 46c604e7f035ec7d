"""Preference pairs: TRL's columns prompt, chosen and rejected to tokens, and a batch of them.

Text or conversations. Where there is no prompt, or one of another form than the answers, it is what both answers begin
with. A conversation goes through the tokenizer's chat template; a text gets the end-of-text token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kldiv_kernels.distillation import IGNORED
from kldiv_kernels.trainer.data import load_rows

ANSWERS = ("chosen", "rejected")


class Pairs(NamedTuple):
    """Rows of `prompt_ids` and, for chosen and rejected, `_ids` of prompt and answer, `_start` of the answer and, where
    asked for, `_phrases`: 0 where both answers are alike, else the number of the difference."""

    train: Dataset
    held_out: Dataset


def load_pairs(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    phrases: bool = False,
    held_out: float = 0.1,
    seed: int = 0,
    config: str | None = None,
) -> Pairs:
    """Training and held-out pairs of JSON, CSV or Parquet files, folders of them, and data sets on the hub.

    Prompt and answer are cut behind `max_length` tokens; a pair of which an answer has none left is dropped. Without a
    validation or test split the pairs are shuffled by `seed`, and the last `held_out` of them, at least one, kept out.

    Raises ValueError, naming the source, for columns or contents that are no pairs.
    """
    found = [load_rows(source, config) for source in sources]

    def encoded(rows: Dataset, source: str) -> Dataset:
        missing = [name for name in ANSWERS if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"data: {source!r} has no column {' and '.join(missing)}; it has {', '.join(rows.column_names)} "
                "(expected prompt, chosen and rejected)"
            )
        tokens = rows.map(
            lambda row: encode(row, tokenizer, max_length=max_length, phrases=phrases),
            remove_columns=rows.column_names, desc="Tokenising",
        )  # fmt: skip
        return tokens.filter(lambda row: all(row[f"{name}_start"] < len(row[f"{name}_ids"]) for name in ANSWERS))

    with_source = list(zip(found, sources, strict=True))
    train = concatenate_datasets([encoded(rows[0], source) for rows, source in with_source])
    apart = [encoded(rows[1], source) for rows, source in with_source if rows[1] is not None]
    if apart:
        pairs = Pairs(train, concatenate_datasets(apart))
    else:
        train = train.shuffle(seed=seed)
        first = len(train) - max(1, round(held_out * len(train)))
        pairs = Pairs(train.select(range(max(0, first))), train.select(range(max(0, first), len(train))))
    if min(len(pairs.train), len(pairs.held_out)) < 1:
        raise ValueError(
            f"data: {', '.join(sources)} makes {len(pairs.train)} pairs for training and {len(pairs.held_out)} held "
            f"out with answers within max_length = {max_length} tokens; expected at least 1 of each"
        )
    return pairs


def encode(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, max_length: int, phrases: bool = False
) -> dict[str, Any]:
    """The tokens of one pair. Prompt and answer are tokenised together; an answer starts where the tokens are no longer
    those of the prompt alone."""
    prompt, texts, is_text = _texts(row, tokenizer)
    end = tokenizer.eos_token_id if is_text else None

    def ids(text: str) -> list[int]:
        # A chat template has the special tokens in it.
        found = tokenizer(text, add_special_tokens=is_text, return_attention_mask=False, verbose=False)["input_ids"]
        return list(found)

    out: dict[str, Any] = {"prompt_ids": ids(prompt)[:max_length]}
    for name, text in zip(ANSWERS, texts, strict=True):
        tokens = ids(text)
        if end is not None and tokens[-1:] != [end]:
            tokens.append(end)
        out[f"{name}_start"] = _alike(out["prompt_ids"], tokens)
        out[f"{name}_ids"] = tokens[:max_length]
    return out | _phrases(out) if phrases else out


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch: `input_ids`, `attention_mask` and unshifted `labels` [2·pairs, T], the chosen answers first.

    Beside them `prompt_ids` and `prompt_mask` [pairs, P], padded on the left, and `phrases` [2·pairs, T] where the rows
    have them.
    """
    sides = [(name, row) for name in ANSWERS for row in rows]
    tokens = [list(row[f"{name}_ids"]) for name, row in sides]
    starts = [int(row[f"{name}_start"]) for name, row in sides]
    # The mask says what padding is, and so token 0 does as well as any.
    batch = {
        "input_ids": _padded(tokens, 0),
        "attention_mask": _padded([[1] * len(ids) for ids in tokens], 0),
        "labels": _padded([[IGNORED] * n + ids[n:] for ids, n in zip(tokens, starts, strict=True)], IGNORED),
    }
    prompts = [list(row["prompt_ids"])[::-1] for row in rows]
    batch["prompt_ids"] = _padded(prompts, 0).flip(-1)
    batch["prompt_mask"] = _padded([[1] * len(ids) for ids in prompts], 0).flip(-1)
    if "chosen_phrases" in rows[0]:
        batch["phrases"] = _padded([list(row[f"{name}_phrases"]) for name, row in sides], 0)
    return batch


def _padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.int64)


def _texts(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, tuple[str, str], bool]:
    """(prompt, (prompt and chosen, prompt and rejected), whether they are text and no conversations)."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, str):
            return prompt, (prompt + chosen, prompt + rejected), True
        # Whole words: what begins with the same letters is not the same.
        words = re.match(r".*(?=\s)", chosen[: _alike(chosen, rejected)], re.DOTALL)
        return "" if words is None else words[0], (chosen, rejected), True
    if not (_is_conversation(chosen) and _is_conversation(rejected)):
        raise ValueError(
            f"data: chosen is {chosen!r:.60} and rejected {rejected!r:.60}; expected two texts, or two lists of "
            "messages with role and content"
        )
    if not tokenizer.chat_template:
        raise ValueError("data: the pairs are conversations, and the tokenizer has no chat template; expected texts")
    if _is_conversation(prompt):
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]  # type: ignore[misc]
    else:
        prompt = chosen[: _alike(chosen, rejected)]
    asks = bool(prompt) and prompt[-1]["role"] != "assistant"  # type: ignore[index]
    begun = _templated(tokenizer, prompt, add_generation_prompt=asks) if prompt else ""
    return begun, (_templated(tokenizer, chosen), _templated(tokenizer, rejected)), False


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements both begin with."""
    apart = (n for n, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)
    return next(apart, min(len(first), len(second)))


def _is_conversation(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(y, Mapping) and "role" in y for y in x)


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _phrases(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """By the shortest edits of the one answer's tokens into the other's."""
    starts = [row[f"{name}_start"] for name in ANSWERS]
    first, second = (row[f"{name}_ids"][start:] for name, start in zip(ANSWERS, starts, strict=True))
    marks = [0] * len(first), [0] * len(second)
    edits = [x for x in SequenceMatcher(None, first, second, autojunk=False).get_opcodes() if x[0] != "equal"]
    for number, (_, i, j, k, m) in enumerate(edits, start=1):
        marks[0][i:j], marks[1][k:m] = [number] * (j - i), [number] * (m - k)
    return {f"{n}_phrases": [0] * s + mark for n, s, mark in zip(ANSWERS, starts, marks, strict=True)}
