"""The logits of a completion, where TRL would use a head that does not keep them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def completion_logits(model: Any, unwrapped: Any, completion: int, **inputs: Any) -> tuple[Tensor, Any]:
    """Runs `model` (as wrapped for training) on prompt and completion.

    Returns the logits of the completion, [batch, completion, vocab], a view whose position t predicts its token t, and
    the model's output. `unwrapped` is the model whose forward says whether it can leave out the prompt's logits.
    """
    base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    # One more than the completion has: the last logits predict what would follow it.
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    outputs = model(use_cache=False, **({"logits_to_keep": completion + 1} if keeps else {}), **inputs)
    return outputs.logits[:, -(completion + 1) : -1], outputs


class LogitsOfCompletion:
    """Stands in for the model in TRL's `_get_per_token_logps_and_entropies`, which builds the inputs of any model.

    A call hands the logits of the completion and its token ids [batch, completion] to `score`; what that returns,
    log-probability and entropy [batch, completion], goes back to TRL. `model` and `unwrapped` as above.
    """

    def __init__(self, model: Any, unwrapped: Any, completion: int, score: Score) -> None:
        self._model, self._unwrapped, self._completion, self._score = model, unwrapped, completion, score

    def __call__(self, *, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> SimpleNamespace:
        logits, outputs = completion_logits(
            self._model, self._unwrapped, self._completion, input_ids=input_ids, **inputs
        )
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
