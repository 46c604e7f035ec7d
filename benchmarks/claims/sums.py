"""The sums model of `kldiv train grpo` for these scripts: warmed up, trained further by rewards, and sampled from.

A prompt is "12+7=", an answer at most two digits and the end: 3 tokens of 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from claim import say
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kldiv_kernels.trainer import arithmetic, grpo
from kldiv_kernels.trainer.arithmetic import Problem
from kldiv_kernels.trainer.quiet import quiet

# Models that are made once and used by several scripts; git ignores the folder.
WORK = Path("runs/claims")
TOKENIZER = arithmetic.character_tokenizer()
SUMS = arithmetic.problems()
LENGTH = arithmetic.answer_length([*SUMS.train, *SUMS.held_out], TOKENIZER)


class Answers(NamedTuple):
    """Prompts and sampled answers [B, P + T] with their attention mask; the answers' ids, log-probs and mask [B, T]."""

    inputs: Tensor
    attention: Tensor
    ids: Tensor
    logprobs: Tensor
    mask: Tensor
    correct: Tensor


def warm(seed: int, accuracy: float = 0.6) -> PreTrainedModel:
    """A new model after cross-entropy on sums, until `accuracy` of its greedy answers are right."""
    folder = WORK / f"warm-{seed}"
    if not (folder / "summary.json").exists():
        say(f"  warm-up to {accuracy:.0%} into {folder}")
        grpo.warm_up(folder, grpo.WarmUp(accuracy, 800, seed, "auto"), Console(stderr=True, quiet=True))
    return loaded(folder)


def rewarded(seed: int, steps: int = 100) -> PreTrainedModel:
    """`warm(seed)` after so many steps of `kldiv train grpo`, with its options."""
    folder = WORK / f"dapo-{seed}-{steps}"
    if not (folder / "summary.json").exists():
        start = warm(seed)
        say(f"  {steps} steps of DAPO into {folder}")
        settings = grpo.Settings(
            loss={"loss_type": "dapo", "backend": "auto"}, steps=steps, group_size=8, batch_size=32, updates=2,
            learning_rate=5e-4, kl_coef=0.0, entropy_coef=0.0, seed=seed, log_every=50, eval_every=steps,
        )  # fmt: skip
        grpo.fit(folder, start, TOKENIZER, settings, Console(stderr=True, quiet=True))
    return loaded(folder)


def loaded(folder: Path) -> PreTrainedModel:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits_of(model: PreTrainedModel, inputs: Tensor, attention: Tensor) -> Tensor:
    """Logits of the next token at every position, [B, L, V]; prompts are padded at the left."""
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    return model(input_ids=inputs, attention_mask=attention, position_ids=positions).logits


def answer_logits(model: PreTrainedModel, answers: Answers) -> Tensor:
    """Logits that predict the answers' tokens, [B, T, V]."""
    return logits_of(model, answers.inputs, answers.attention)[:, -LENGTH - 1 : -1]


@torch.no_grad()
def sample(logits: Callable[[Tensor, Tensor], Tensor], sums: Sequence[Problem], generator: torch.Generator) -> Answers:
    """An answer to each sum by the softmax of logits(inputs, attention) [B, L, V] at the last position."""
    encoded = TOKENIZER([x.prompt for x in sums], padding=True, padding_side="left", return_tensors="pt")
    inputs, attention = encoded["input_ids"], encoded["attention_mask"]
    done = torch.zeros(len(sums), dtype=torch.bool)
    chosen, masks = [], []
    for _ in range(LENGTH):
        logprobs = logits(inputs, attention)[:, -1].float().log_softmax(-1)
        token = torch.multinomial(logprobs.exp(), 1, generator=generator)
        token = torch.where(done[:, None], TOKENIZER.pad_token_id, token)
        chosen.append(logprobs.gather(1, token)[:, 0])
        masks.append(~done)
        inputs, attention = torch.cat([inputs, token], 1), torch.cat([attention, (~done)[:, None].long()], 1)
        done = done | (token[:, 0] == TOKENIZER.eos_token_id)
    ids = inputs[:, -LENGTH:]
    texts = TOKENIZER.batch_decode(ids, skip_special_tokens=True)
    right = torch.tensor([arithmetic.is_correct(text, x.answer) for text, x in zip(texts, sums, strict=True)])
    return Answers(inputs, attention, ids, torch.stack(chosen, 1), torch.stack(masks, 1), right)


def by(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda inputs, attention: logits_of(model, inputs, attention)


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> float:
    """The share of held-out sums that greedy answers get right."""
    return arithmetic.accuracy(model, tokenizer, SUMS.held_out)
