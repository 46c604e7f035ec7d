"""Losses of ordered lists and of pairs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kldiv_kernels.recipes.reductions import batch_mean, times, valid_tokens
from kldiv_kernels.stats import TokenStats, token_stats

Link = Literal["logistic", "ipo", "hinge"]


def plackett_luce(logprobs: Tensor, weights: Tensor | None = None, *, tail_logprob: Tensor | None = None) -> Tensor:
    r"""−Σ_k w_k [s_k − log(e^{s_k} + … + e^{s_K} + e^{tail})]: the negative log-likelihood of an order, in nats.

    Plackett–Luce (1975): first, second, … of a list drawn one after the other, each in proportion to e^s.

    Args:
        logprobs: [*, K], the best first; logits do as well, a number added to all of a row changes nothing.
        weights: [*, K], of the places, without gradient; default 1. A place of weight 0 counts nothing, and behind the
            others with s = −inf it is as good as not there.
        tail_logprob: [*], log Σ e^s of what stands behind the list. With K log-probabilities of a row and this, from
            `kk.topk_token_stats`, the first K terms are exact over any vocabulary.

    Returns [*].

    >>> plackett_luce(torch.zeros(3)).exp().round()
    tensor(6.)
    """
    behind = logprobs if tail_logprob is None else torch.cat([logprobs, tail_logprob[..., None]], dim=-1)
    # So that an item without probability gets the gradient 0, not NaN.
    behind = torch.where(behind == -torch.inf, -torch.inf, behind)
    suffix = behind.flip(-1).logcumsumexp(-1).flip(-1)[..., : logprobs.shape[-1]]
    terms = suffix - logprobs
    if weights is not None:
        terms = times(weights.detach(), terms)
    return terms.sum(-1)


def preference_loss(
    margin: Tensor, *, link: Link = "logistic", beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of a pair from the margin of the chosen over the rejected one, element by element.

    logistic: −(1 − ε) log σ(βm) − ε log σ(−βm) (DPO, arXiv 2305.18290, with ε its label smoothing); ipo: (m − 1/(2β))²
    (arXiv 2310.12036); hinge: max(0, 1 − βm) (SLiC).

    Raises ValueError for another link, and for a label smoothing with one that has none.

    >>> round(preference_loss(torch.tensor(0.0)).item(), 4)
    0.6931
    """
    if link == "logistic":
        scaled = beta * margin
        return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)
    if link not in ("ipo", "hinge"):
        raise ValueError(f"preference_loss: link is {link!r}; expected logistic, ipo or hinge")
    if label_smoothing:
        raise ValueError(f"preference_loss: label_smoothing is {label_smoothing}; link {link!r} has none, expected 0")
    if link == "ipo":
        return (margin - 1 / (2 * beta)).square()
    return (1 - beta * margin).clamp_min(0)


def pairs_checked(logits: Tensor) -> None:
    """ValueError for what is not [2B, T, V]: B preferred answers, then the B others."""
    if logits.dim() != 3 or logits.shape[0] % 2:
        raise ValueError(
            f"logits has shape {list(logits.shape)}; expected [2·pairs, tokens, vocab], the preferred first"
        )


def pair_statistics(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    names: tuple[str, ...],
    *,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[TokenStats, Tensor]:
    """(statistics of the tokens of pairs, bool of the tokens that count), [2B, T] each, from one read of both logits.

    Args: logits, reference_logits: [2B, T, V], B preferred answers, then the B others; the reference gets no gradient.
        labels: [2B, T]. names: of the registry. options: of `kk.token_stats`.

    >>> stats, valid = pair_statistics(
    ...     torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), torch.tensor([[1], [-100]]), ("logprob", "forward_kl"))
    >>> stats.logprob.exp().flatten(), valid.flatten()
    (tensor([0.2500, 1.0000]), tensor([ True, False]))
    """
    pairs_checked(logits)
    valid = valid_tokens(labels, mask, ignore_index)
    ids = torch.where(valid, labels, 0)
    return token_stats(logits, reference_logits.detach(), ids, stats=names, mask=valid, **options), valid


def pair_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """The mean of losses [B] over the pairs that have a token in one answer at least, by valid [2B, T]; 0 without one.

    >>> pair_mean(torch.tensor([1.0, 9.0]), torch.tensor([[True], [False], [True], [False]]))
    tensor(1.)
    """
    chosen, rejected = valid.any(-1).chunk(2)
    return batch_mean(losses, chosen | rejected)
