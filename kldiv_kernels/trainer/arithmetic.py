"""The task of `kldiv train grpo`: sums such as "12+7=", whose answer a program checks, and a tokenizer for them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Every sum of two numbers below this, 2,500 in all: a warm-up of seconds leaves a small model with much to learn.
OPERANDS = 50
# Held-out pairs of numbers: 243 sums, whose accuracy has a standard error of at most 3.2 points.
HELD_OUT_PAIRS = 125
# Tokens of "49+49=98" and the end.
LONGEST = 9
_PAD, _END = "<|pad|>", "<|end|>"
_IGNORED = -100


class Problem(NamedTuple):
    prompt: str
    answer: str


class Problems(NamedTuple):
    """No sum stands on both sides, nor does 7+12= face 12+7=."""

    train: list[Problem]
    held_out: list[Problem]


def problems() -> Problems:
    """All sums of two numbers below `OPERANDS`. Always the same are held out: a run may go on from another's model."""
    pairs = [(a, b) for a in range(OPERANDS) for b in range(a, OPERANDS)]
    random.Random(0).shuffle(pairs)
    return Problems(_both_ways(pairs[HELD_OUT_PAIRS:]), _both_ways(pairs[:HELD_OUT_PAIRS]))


def _both_ways(pairs: list[tuple[int, int]]) -> list[Problem]:
    orders = (order for a, b in pairs for order in dict.fromkeys([(a, b), (b, a)]))
    return [Problem(f"{a}+{b}=", str(a + b)) for a, b in orders]


def is_correct(completion: str, answer: str) -> bool:
    """Whether the completion begins with the answer, white space aside; what follows the number is not looked at.

    A model that knows the task stops there. One that does not, from the hub say, may go on with a new line.
    """
    number = re.match(r"\s*(-?\d+)", completion)
    return number is not None and number[1] == answer


def exact_match(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward, as TRL calls it: 1 for a correct completion, otherwise 0. `answer` is the data set's column."""
    return [float(is_correct(*pair)) for pair in zip(completions, answer, strict=True)]


def character_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each digit and sign, and for padding and the end: 14."""
    tokens = (_PAD, _END, *"0123456789+=")
    # A BPE without merges takes text apart into its characters.
    characters = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=characters, pad_token=_PAD, eos_token=_END, padding_side="left"
    )


def supervised(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of `LONGEST` tokens with `input_ids`, `attention_mask` and `labels`: the answer and the end are targets."""
    rows = []
    for prompt, answer in problems:
        question, target = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        used = len(question) + len(target)
        rows.append(
            {
                "input_ids": question + target + [tokenizer.pad_token_id] * (LONGEST - used),
                "attention_mask": [1] * used + [0] * (LONGEST - used),
                "labels": [_IGNORED] * len(question) + target + [_IGNORED] * (LONGEST - used),
            }
        )
    return Dataset.from_list(rows)


def answer_length(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest answer, and one to end it."""
    answers = [answer for _, answer in problems]
    return 1 + max(map(len, tokenizer(answers, add_special_tokens=False)["input_ids"]))


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 512
) -> float:
    """The fraction of problems that the model's greedy completions answer. Leaves the random numbers as they are."""
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=answer_length(problems, tokenizer), do_sample=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=model.generation_config.eos_token_id,
    )  # fmt: skip
    correct, training = 0, model.training
    generator: Any = model.eval()  # type: ignore[no-untyped-call]
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        inputs = tokenizer([prompt for prompt, _ in batch], padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        tokens = generator.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
        completions = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        correct += sum(
            is_correct(completion, problem.answer) for completion, problem in zip(completions, batch, strict=True)
        )
    model.train(training)
    return correct / len(problems)
