"""Unlikely tokens that a policy loss would push away, though the policy that sampled has a use for them.

ℓ, ℓ_old: log-probabilities of the sampled token under the policy and the policy that sampled, π_old;
ρ = exp(ℓ − ℓ_old); A the advantage; q the policy's softmax. The proxy p̃ is π_old without what is less likely than κ
times its likeliest token (min-p), over its sum. Nats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.choices import Aggregation, Backend
from kldiv_kernels.policy import PolicyLoss, kl_estimate
from kldiv_kernels.recipes.checks import like_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import (
    apart,
    clipped_term,
    composed_loss,
    given,
    of_tokens,
    options_checked,
    sampled_tokens,
)
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, valid_tokens
from kldiv_kernels.recipes.selection import lowest
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        83, "Lp-Reg", "Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable Reward",
        2026, ("lp_reg_loss", "lp_reg_full_loss", "min_p_proxy"), "R1", "code",
        link="github.com/CarlanLark/Lp-Reg-dev",
        differs="lp_reg_loss is the code's: k3 of the sampled token, on the rarest tokens with A < 0. lp_reg_full_loss "
        "is the paper's, quoted by others: the KL over the vocabulary, on those of the rarest tokens that have A < 0. "
        "The code's branch for A > 0, off by default, is left out.",
    ),
)  # fmt: skip

# The ratio is clipped to 0 to 10.
_BOUNDS = {"clip_low": 1.0, "clip_high": 9.0}


@torch.no_grad()
def min_p_proxy(
    old_logits: Tensor,
    token_ids: Tensor,
    *,
    kappa: float = 0.02,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""(log p̃(y), log Z): the sampled token's log-probability by the proxy, −inf where it is left out, and its mass.

    Z is the probability by π_old of what the proxy keeps; KL(p̃‖π_old) = −log Z. Source: paper 83 (Lp-Reg). Once, when
    the answers are sampled; makes a copy of the logits.

    Args: old_logits: [*, V]. token_ids: [*]. kappa: κ, 0 keeps all. temperature: of the rollouts. mask, ignore_index,
        vocab_size, backend: see `kk.token_stats`.

    Returns: two [*]; 0 where masked.

    >>> import torch, kldiv_kernels as kk
    >>> t = torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> kk.recipes.min_p_proxy(t, torch.tensor([1]), kappa=0.2)
    (tensor([-0.6041]), tensor([-0.0714]))
    """
    valid = valid_tokens(token_ids, mask, ignore_index)
    kept, top = _kept(old_logits, kappa, temperature, vocab_size)
    shared: dict[str, Any] = {
        "stats": ("logprob",), "mask": valid, "temperature": temperature, "vocab_size": vocab_size, "backend": backend,
    }  # fmt: skip
    top = torch.where(valid, top, 0)
    both = torch.stack([torch.where(valid, token_ids, 0), top], dim=-1)
    of_token, of_top = token_stats(kept, labels=both, **shared).logprob.unbind(-1)
    return of_token, token_stats(old_logits, labels=top, **shared).logprob - of_top


def lp_reg_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    proxy_logprobs: Tensor,
    beta: float = 1.0,
    fraction: float = 0.01,
    mask: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""−clip(ρ, 0, 10)·A + β·k3(ℓ, log p̃) on the rarest tokens with A < 0 and ℓ < log p̃; paper 83 (Lp-Reg), its code.

    k3 = e^d − d − 1, d = log p̃ − ℓ, at most 10. The rarest: the ⌊fraction·n⌋ with the lowest ℓ of the call's n tokens
    with A < 0; none where that is one.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T]. proxy_logprobs: [B, T],
            `min_p_proxy`'s first; −inf where the token is left out, which is then never chosen.
        fraction: 0.005 for the larger model. mask, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss` with the metric selected_fraction. The logits are read twice.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.lp_reg_loss(
    ...     torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.tensor([-1.0]), fraction=1.0,
    ...     old_logprobs=torch.full((1, 2), 0.25).log(), proxy_logprobs=torch.full((1, 2), 0.5).log())
    >>> round(out.loss.item(), 4)
    1.3069
    """
    _checked("lp_reg_loss", logits, token_ids, fraction, aggregation, old_logprobs, proxy_logprobs=proxy_logprobs)
    stats, valid = sampled_tokens(
        logits, token_ids, mask, ignore_index, temperature=temperature, vocab_size=vocab_size, backend=backend
    )
    logprob, proxy = stats.logprob, given(proxy_logprobs, stats.logprob, valid)
    negative = valid & (of_tokens(advantages, logprob) < 0)
    several = (negative.sum().double() * fraction).floor() > 1
    selected = lowest(logprob, negative, fraction) & several & (logprob.detach() < proxy)
    kl = kl_estimate(logprob, torch.where(selected, proxy, logprob.detach()), "k3", clamp=10.0)
    term = clipped_term(apart(logprob, old_logprobs, valid), advantages, valid, **_BOUNDS)
    per_token = term.per_token + beta * masked(kl, selected)
    return composed_loss(per_token, stats, valid, term, {"selected_fraction": selected}, aggregation, normalizer)


def lp_reg_full_loss(
    logits: Tensor,
    old_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    kappa: float = 0.02,
    beta: float = 1.0,
    fraction: float = 0.01,
    mask: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""−clip(ρ, 0, 10)·A + β·KL(p̃‖q) on rare tokens with A < 0 that the proxy keeps; paper 83 (Lp-Reg), eq. 6.

    Rare: the `fraction` of the call's tokens with the lowest ℓ, at least one.

    Args: logits, old_logits: [B, T, V], of the policy and of π_old; a copy of the latter is made. kappa: κ of the
        proxy. All else: see `lp_reg_loss`.

    Returns: `kk.PolicyLoss` with the metrics selected_fraction and kl, as means over all tokens.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> out = kk.recipes.lp_reg_full_loss(
    ...     s, t, torch.tensor([[1]]), torch.tensor([-1.0]), old_logprobs=torch.tensor([[-1.8423]]), kappa=0.2)
    >>> round(out.metrics["kl"].item(), 4), round(out.loss.item(), 4)
    (0.4533, 1.4532)
    """
    _checked("lp_reg_full_loss", logits, token_ids, fraction, aggregation, old_logprobs)
    like_checked("logits", logits, old_logits=old_logits)
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    kept, _ = _kept(old_logits.detach(), kappa, temperature, vocab_size)
    in_proxy = kept.gather(-1, torch.where(valid, token_ids, 0)[..., None])[..., 0] > -torch.inf
    against = of_tokens(advantages, stats.logprob) < 0
    selected = lowest(stats.logprob, valid, fraction) & against & in_proxy
    kl = token_stats(logits, kept, stats=("forward_kl",), mask=selected, **shared).forward_kl
    term = clipped_term(apart(stats.logprob, old_logprobs, valid), advantages, valid, **_BOUNDS)
    metrics = {"selected_fraction": selected, "kl": kl}
    return composed_loss(term.per_token + beta * kl, stats, valid, term, metrics, aggregation, normalizer)


def _checked(
    where: str,
    logits: Tensor,
    token_ids: Tensor,
    fraction: float,
    aggregation: Aggregation,
    old_logprobs: Tensor,
    **of_tokens: Tensor,
) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"{where}: fraction is {fraction}; expected above 0 and at most 1")
    options_checked(where, logits, aggregation=aggregation)
    of_tokens_checked(token_ids, old_logprobs=old_logprobs, **of_tokens)


def _kept(logits: Tensor, kappa: float, temperature: float, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """(logits with −inf where the proxy leaves a token out, the likeliest token): [*, V] and [*]."""
    if not 0 <= kappa <= 1:
        raise ValueError(f"kappa is {kappa}; expected 0 to 1")
    top = logits[..., :vocab_size].max(-1, keepdim=True)
    least = top.values.float() if logits.dtype in (torch.bfloat16, torch.float16) else top.values
    least = least + (temperature * math.log(kappa) if kappa > 0 else -math.inf)
    return torch.where(logits >= least, logits, -torch.inf), top.indices[..., 0]
