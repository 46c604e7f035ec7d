r"""Two tokenizations of one text, cut where both have a boundary, and the distributions of such spans.

    text        t h e   u n t i e d
    student     the|  un|tied|              ends  3     6          10
    teacher     the|  unt|ied|              ends  3       7        10
    spans       ---|---------|              0, 1, 1        0, 1, 1

A span of one token on each side is the same token, written by two models. In one of several, a model's distribution is
that of one of its tokens, times the probabilities of the others that stand there:

    observed    of the first token, times those of the later ones
    bayesian    of the last token, times those of the earlier ones: the chain rule

Neither sums to 1, and is not normalised. As in TRL's GOLD.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.reductions import segment_sum
from kldiv_kernels.stats import selective_log_softmax

Merge = Literal["observed", "bayesian"]


class Spans(NamedTuple):
    """The number of each token's span [B, T] and [B, T_teacher], −1 for none, and how many spans there are [B]."""

    student: Tensor
    teacher: Tensor
    total: Tensor


def align_spans(
    ends: Tensor, teacher_ends: Tensor, *, mask: Tensor | None = None, teacher_mask: Tensor | None = None
) -> Spans:
    """Spans between the places of a text at which a token of both tokenizations ends; without a loop over tokens.

    Args:
        ends, teacher_ends: [B, T] and [B, T_teacher] integers from 0 on, where each token ends in its text: bytes, or
            characters, counted alike on both sides. They do not fall along a row. Tokens that end at one place, such as
            the bytes of one character, are of one span.
        mask, teacher_mask: like them; tokens that are no part of the text: padding, prompts, special tokens.

    Returns: `Spans`. A token behind the last common end, as where one text was cut off, is in none.

    >>> align_spans(torch.tensor([[3, 6, 10]]), torch.tensor([[3, 7, 10]]))
    Spans(student=tensor([[0, 1, 1]]), teacher=tensor([[0, 1, 1]]), total=tensor([2]))
    """
    for name, x in (("ends", ends), ("teacher_ends", teacher_ends)):
        if x.dim() != 2 or x.shape[0] != ends.shape[0]:
            raise ValueError(
                f"align_spans: {name} has shape {list(x.shape)}; expected [batch, tokens], the batch of both alike"
            )
    of_tokens_checked(ends, mask=mask)
    of_tokens_checked(teacher_ends, teacher_mask=teacher_mask)
    sides = []
    for x, kept in ((ends, mask), (teacher_ends, teacher_mask)):
        valid = torch.ones_like(x, dtype=torch.bool) if kept is None else kept != 0
        # A token that does not count ends where the one before it did, before all others −1. One more at the front, so
        # that there is a token before the first, and a row is not empty.
        before = x.new_full((x.shape[0], 1), -1, dtype=torch.long)
        row = torch.cat([before, torch.where(valid, x.long(), -1)], dim=1).cummax(dim=1).values
        sides.append((row, valid))
    found = []
    for (row, valid), (other, _) in (sides, sides[::-1]):
        place = torch.searchsorted(other, row).clamp_max(other.shape[1] - 1)
        common = (other.gather(1, place) == row)[:, 1:] & (row[:, 1:] >= 0)
        new = common & (row[:, 1:] > row[:, :-1])
        # How many common ends there are before the token's own.
        found.append((new.cumsum(1) - common.long(), new.sum(1), valid))
    total = found[0][1]
    numbers = [torch.where(valid & (n < total[:, None]), n, -1) for n, _, valid in found]
    return Spans(numbers[0], numbers[1], total)


def span_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    segments: Tensor,
    count: int,
    *,
    merge: Merge = "observed",
    temperature: float = 1.0,
    floor: float = 1e-8,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """(log-softmax of one row of each span, log-probability of its other tokens): [B, count, V] and [B, count].

    Their sum is the log of the span's distribution; both have gradients. 0 for a span without tokens.

    Args: logits: [B, T, V], row t of token t. token_ids: [B, T]. segments: [B, T], the tokens' spans, −1 for none.
    count: the largest number of spans. merge: which row, see above. floor: of each other token's probability.

    >>> logits = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]).log()
    >>> rows, others = span_logprobs(logits, torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), 1)
    >>> (rows + others[..., None]).exp()
    tensor([[[0.3750, 0.3750]]])
    """
    if merge not in ("observed", "bayesian"):
        raise ValueError(f"span_logprobs: merge is {merge!r}; expected observed or bayesian")
    if not 0 < floor < 1:
        raise ValueError(f"span_logprobs: floor is {floor}; expected a number between 0 and 1")
    of_tokens_checked(logits[..., 0], token_ids=token_ids, segments=segments)
    inside = segments >= 0
    logprob = selective_log_softmax(
        logits, torch.where(inside, token_ids, 0), mask=inside, temperature=temperature, backend=backend
    )
    tokens = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    # The last slot takes what is in no span.
    slots = torch.where(inside, segments, count)
    start = segments.shape[1] if merge == "observed" else -1
    chosen = torch.full((segments.shape[0], count + 1), start, device=segments.device)
    chosen = chosen.scatter_reduce(1, slots, tokens, "amin" if merge == "observed" else "amax")
    others = inside & (chosen.gather(1, slots) != tokens)
    logprob = torch.where(others, logprob, 0.0).clamp_min(math.log(floor))
    chosen = chosen[:, :count]
    there = (chosen >= 0) & (chosen < segments.shape[1])
    rows = logits.gather(1, torch.where(there, chosen, 0)[..., None].expand(-1, -1, logits.shape[-1]))
    rows = torch.where(there[..., None], rows, 0.0).to(logprob.dtype)
    return (rows / temperature).log_softmax(-1), segment_sum(logprob, segments, count)
