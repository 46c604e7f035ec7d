"""The logits of a model where TRL scores tokens with its fused LM head."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LogitsOfCompletion:
    """Stands in for the model in TRL's `_get_per_token_logps_and_entropies`, which builds the inputs of any model.

    A call runs `model` (as wrapped for training; `unwrapped` says what its forward takes) without its fused head and
    hands the logits of the completion, [batch, completion, vocab], a view whose position t predicts token t, and its
    token ids to `score`. What that returns, log-probability and entropy [batch, completion], goes back to TRL.
    """

    def __init__(self, model: Any, unwrapped: Any, completion: int, score: Score) -> None:
        self._model, self._completion, self._score = model, completion, score
        base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
        # One more than the completion has: the last logits predict what would follow it.
        keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._kept = {"logits_to_keep": completion + 1} if keeps else {}

    def __call__(self, *, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        outputs = self._model(input_ids=input_ids, use_cache=False, **self._kept, **inputs)
        logits = outputs.logits[:, -(self._completion + 1) : -1]
        logprob, entropy = self._score(logits, input_ids[:, -self._completion :])
        return SimpleNamespace(log_probs=logprob, entropy=entropy, aux_loss=getattr(outputs, "aux_loss", None))


def run_outside_autocast(head: Any) -> None:
    """Makes `head` keep the precision of its weights; TRL's cast_lm_head_to_fp32 does so in its fused head only."""
    forward = head.forward

    def outside(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            result: Tensor = forward(hidden)
        return result

    head.forward = outside
