"""What a model writes behind prompts, by sampling from its own softmax over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def sampled(model: Any, prompts: Tensor, mask: Tensor, *, length: int, temperature: float = 1.0) -> Tensor:
    """Prompts [batch, P], padded on the left where `mask` is 0, with `length` tokens behind them: [batch, P + length].

    What ends a text, or token 0 where the model has no such, stands behind the end of a shorter one.
    """
    end, training = (ends_of(model) or [0])[0], model.training
    model.eval()
    try:
        written: Tensor = model.generate(
            input_ids=prompts, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=temperature,
            max_new_tokens=length, pad_token_id=end, use_cache=True,
        )  # fmt: skip
    finally:
        model.train(training)
    return torch.nn.functional.pad(written, (0, prompts.shape[1] + length - written.shape[1]), value=end)


def ends_of(model: Any) -> list[int]:
    """The tokens that end a text of this model."""
    found = model.generation_config.eos_token_id
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [int(found)]


def up_to_the_end(completions: Tensor, ends: list[int]) -> Tensor:
    """Bool: the tokens up to the first that ends a completion, and that one.

    >>> up_to_the_end(torch.tensor([[5, 0, 7]]), [0])
    tensor([[ True,  True, False]])
    """
    ended = torch.zeros_like(completions, dtype=torch.bool)
    for end in ends:
        ended = ended | (completions == end)
    return ended.cumsum(-1) - ended.long() == 0
