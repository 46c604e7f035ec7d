"""A clipped policy loss that looks after the policy's entropy: a bonus, a gate of the KL's penalty, a band.

ℓ, ℓ_old, ℓ_ref: log-probabilities of the sampled token under the policy, the policy that sampled and the reference;
ρ = exp(ℓ − ℓ_old); A the advantage; H the exact entropy of a token's distribution; q and p the policy's and the
reference's softmax. "GRPO" is PPO's clipped surrogate of ρ and A. Nats.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from kldiv_kernels.choices import Backend
from kldiv_kernels.policy import PolicyLoss, policy_loss
from kldiv_kernels.recipes.checks import like_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import apart, clipped_term, composed_loss, options_checked, sampled_tokens
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, masked, valid_tokens, widened
from kldiv_kernels.recipes.schedules import SafeController
from kldiv_kernels.recipes.selection import highest, otsu_threshold, quantile_band
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        1, "SAFE", "SAFE: Stable Alignment Finetuning with Entropy-Aware Predictive Control for RLHF", 2026,
        ("safe_loss", "soft_min", "safe_value_loss"), "R0", "code", link="github.com/ryyzn9/SAFE",
        differs="The penalty of the released code is a number, which pulls nothing (detach_penalty=False has the "
        "gradient that the text implies). Its entropy bonus is over padding, too; here over the mask. Left out: the "
        "phases' detection, the preview that scales the step by the KL, and the paper's asymmetric baseline. "
        "kk.recipes.schedules.SafeController has the threshold.",
    ),
    Recipe(
        81, "SPINE", "SPINE: Token-Selective Test-Time Reinforcement Learning with Entropy-Band Regularization", 2026,
        ("spine_loss", "entropy_band"), "R1", "restated",
        differs="Others' notes of version 1 (threshold='top') and a reimplementation of version 2 ('otsu'); the "
        "authors' code is not to be had. That the top fraction is one of each answer, and that the band of version 1 "
        "is averaged over the batch's chosen tokens, is derived. Both coefficients of the band were not found.",
    ),
)  # fmt: skip


def safe_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    controller: SafeController,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    rollout_entropy: float | Tensor | None = None,
    entropy_coef: float = 0.01,
    clip: float = 0.2,
    detach_penalty: bool = True,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> PolicyLoss:
    r"""GRPO − c·mean H + the penalty of a controller, which looks at mean (ℓ − ℓ_ref) and the entropy; paper 1 (SAFE).

    Args:
        logits: [B, T, V]. token_ids, old_logprobs, reference_logprobs: [B, T]. advantages: [B] or [B, T]; the method's
            are reward − `soft_min` of two critics' values, normalised over the batch.
        controller: gives the penalty and is not changed. `controller.update(reward)` belongs before the loss,
            `controller.record(out.metrics["kl"])` behind it.
        rollout_entropy: mean entropy when the answers were sampled. Default: that of this pass.
        entropy_coef: c. clip: of the ratio, on both sides.
        detach_penalty: True: the penalty is a number, as released. False: the KL's gradient is in it, which takes a
            read without gradient before.
        mask, normalizer, options: of `kk.policy_loss`; the mean over tokens.

    Returns: `kk.PolicyLoss` with the metric penalty; its kl is mean (ℓ − ℓ_ref).

    >>> import torch, kldiv_kernels as kk
    >>> controller = kk.recipes.schedules.SafeController(momentum=0.0)
    >>> out = kk.recipes.safe_loss(
    ...     torch.zeros(1, 1, 4), torch.tensor([[0]]), torch.tensor([0.0]), controller=controller,
    ...     old_logprobs=torch.full((1, 1), 0.25).log(), reference_logprobs=torch.full((1, 1), 0.1).log())
    >>> round(out.metrics["kl"].item(), 4), round(out.metrics["penalty"].item(), 4)
    (0.9163, 0.0511)
    """
    of_tokens_checked(token_ids, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs)
    valid = valid_tokens(token_ids, mask, ignore_index)
    tokens = valid.sum()
    share = (tokens > 0).double() if normalizer is None else tokens.double() / normalizer
    slope, entropy = None, rollout_entropy
    pull: dict[str, Any] = {}
    if not detach_penalty:
        with torch.no_grad():
            read = {name: options[name] for name in ("temperature", "vocab_size", "backend") if name in options}
            stats, _ = sampled_tokens(logits.detach(), token_ids, valid, ignore_index, **read)
        entropy = batch_mean(stats.entropy, valid) if entropy is None else entropy
        slope = controller.slope(batch_mean(apart(stats.logprob, reference_logprobs, valid), valid), entropy)
        pull = {"kl_coef": 1.0, "kl_weights": torch.as_tensor(slope).expand(token_ids.shape)}
    out = policy_loss(
        logits, token_ids, advantages, loss_type="grpo", aggregation="token-mean", old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs, kl_estimator="k1", clip_low=clip, clip_high=clip,
        entropy_coef=entropy_coef, mask=valid, normalizer=normalizer, ignore_index=ignore_index, **pull, **options,
    )  # fmt: skip
    kl = out.metrics["kl"]
    penalty = torch.as_tensor(controller.penalty(kl, out.metrics["entropy"] if entropy is None else entropy))
    # The KL's term is in the loss for its gradient; the penalty is the value.
    beside = share * (penalty if slope is None else penalty - slope * kl)
    return replace(out, loss=out.loss + beside.to(out.loss.dtype), metrics={**out.metrics, "penalty": penalty})


def soft_min(values: Tensor, *, temperature: float = 0.3) -> Tensor:
    r"""−α·(log Σ_k e^{−v_k/α} − log K): between the least and the mean of K critics' values, [*, K] -> [*]; paper 1.

    Args: values: [*, K], with gradient. temperature: α; towards 0 it is the least.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.soft_min(torch.tensor([1.0, 2.0]))
    tensor(1.1974)
    """
    if not temperature > 0:
        raise ValueError(f"soft_min: temperature is {temperature}; expected a number above 0")
    return -temperature * ((-widened(values) / temperature).logsumexp(-1) - math.log(values.shape[-1]))


def safe_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2, huber: float = 0.5
) -> Tensor:
    r"""½·mean[h(v − R) + h(v_clip − R)], v_clip = v_old + clamp(v − v_old, ±clip); paper 1 (SAFE), its code.

    h(x) is ½x² up to |x| = δ and δ·(|x| − δ/2) beyond. SAFE's loss has half of it.

    Args: values: [*], with gradient, `soft_min` of the critics. old_values, returns: like values. huber: δ.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.safe_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.0]))
    tensor(0.1975)
    """
    like_checked("values", values, old_values=old_values, returns=returns)
    values = widened(values)
    old, returns = (x.detach().to(values.dtype) for x in (old_values, returns))
    held = old + (values - old).clamp(-clip, clip)
    plain, clipped = (huber_loss(x, returns, reduction="none", delta=huber) for x in (values, held))
    return 0.5 * batch_mean(plain + clipped)


def spine_loss(
    logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor,
    low_coef: float,
    high_coef: float,
    reference_logits: Tensor | None = None,
    kl_coef: float = 0.0,
    threshold: Literal["top", "otsu"] = "top",
    fraction: float | None = None,
    band: tuple[float, float] | None = None,
    clip: float = 0.2,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""GRPO on each answer's tokens of high entropy, whose entropy is kept in a band; paper 81 (SPINE), restated.

    (1/N)·Σ_F GRPO + mean_F(λ_low·max(l − H, 0) + λ_high·max(H − h, 0)) + κ·mean_F KL(q‖p). F: the chosen tokens, N:
    all. Version 2 ("otsu") divides the band's sum by N, too.

    Args:
        logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T].
        low_coef, high_coef: λ. reference_logits: [B, T, V], read at the chosen tokens alone; given where kl_coef, κ, is
            not 0.
        threshold: "top": the `fraction` (0.2) of highest entropy, at least one, and the band between two quantiles of
            their entropies, `band` (0.1, 0.5). "otsu": from Otsu's threshold on, and the band from 1.4826 median
            absolute deviations below their median to the median.
        clip: of the ratio, on both sides; not found for this method. mask, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss` with the metrics selected_fraction, band and, with κ, kl, as means over all tokens.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.spine_loss(
    ...     torch.zeros(1, 2, 4), torch.tensor([[0, 1]]), torch.tensor([1.0]),
    ...     old_logprobs=torch.full((1, 2), 0.25).log(), low_coef=0.1, high_coef=0.1, fraction=0.5)
    >>> out.loss.item()
    -0.5
    """
    if threshold not in ("top", "otsu"):
        raise ValueError(f"spine_loss: threshold is {threshold!r}; expected top or otsu")
    if threshold == "otsu" and (fraction is not None or band is not None):
        raise ValueError(f"spine_loss: fraction is {fraction}, band {band}; threshold 'otsu' has none, expected None")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"spine_loss: fraction is {fraction}; expected above 0 and at most 1")
    if (kl_coef != 0) != (reference_logits is not None):
        given = "None" if reference_logits is None else "given"
        raise ValueError(f"spine_loss: reference_logits is {given}, kl_coef is {kl_coef}; expected both or neither")
    options_checked("spine_loss", logits, clip_low=clip, clip_high=clip, aggregation="seq-mean-token-mean")
    of_tokens_checked(token_ids, old_logprobs=old_logprobs)
    shared: dict[str, Any] = {"temperature": temperature, "vocab_size": vocab_size, "backend": backend}
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, **shared)
    if threshold == "top":
        selected = highest(stats.entropy, valid, 0.2 if fraction is None else fraction, per_sequence=True)
        low, high = quantile_band(stats.entropy, selected, *((0.1, 0.5) if band is None else band))
    else:
        selected = valid & (stats.entropy.detach() >= otsu_threshold(stats.entropy, valid, per_sequence=True)[:, None])
        high, _ = quantile_band(stats.entropy, selected, 0.5, 0.5)
        deviation, _ = quantile_band((stats.entropy - high[:, None]).abs(), selected, 0.5, 0.5)
        low = (high - (1.4826 * deviation).clamp_min(1e-6)).clamp_min(0)
    term = clipped_term(
        apart(stats.logprob, old_logprobs, valid), advantages, valid, clip_low=clip, clip_high=clip
    )  # fmt: skip
    bands = entropy_band(stats.entropy, selected, low, high, low_coef=low_coef, high_coef=high_coef)
    # From a mean over all tokens to one over the chosen ones.
    of_selected = valid.sum().double() / selected.sum().clamp_min(1)
    per_token = masked(term.per_token, selected) + bands * (of_selected if threshold == "top" else 1.0)
    metrics = {"selected_fraction": selected, "band": bands}
    if reference_logits is not None:
        metrics["kl"] = token_stats(
            logits, reference_logits.detach(), stats=("reverse_kl",), mask=selected, **shared
        ).reverse_kl
        per_token = per_token + kl_coef * of_selected * metrics["kl"]
    return composed_loss(per_token, stats, valid, term, metrics, "token-mean", None)


def entropy_band(
    entropy: Tensor,
    selected: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    *,
    low_coef: float,
    high_coef: float,
) -> Tensor:
    r"""λ_low·max(low − H, 0) + λ_high·max(H − high, 0) at the selected tokens, 0 elsewhere: [B, T]; paper 81 (SPINE).

    Args: entropy: [B, T], with gradient. selected: [B, T] bool. low, high: a number, or [B] of each sequence; without
        gradient.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.entropy_band(
    ...     torch.tensor([[0.5, 1.5, 3.0]]), torch.tensor([[True, True, True]]), 1.0, 2.0, low_coef=0.1, high_coef=0.2)
    tensor([[0.0500, 0.0000, 0.2000]])
    """
    of_tokens_checked(entropy, selected=selected)
    entropy = widened(entropy)
    bounds = []
    for name, bound in (("low", low), ("high", high)):
        x = bound.detach().to(entropy.dtype) if isinstance(bound, Tensor) else entropy.detach().new_full((), bound)
        if x.dim() > 0 and x.shape != entropy.shape[:1]:
            raise ValueError(f"entropy_band: {name} has shape {list(x.shape)}; expected [] or [{entropy.shape[0]}]")
        bounds.append(x[:, None] if x.dim() > 0 else x)
    held = masked(entropy, selected)
    # relu, whose slope is 0 at 0: on the bound there is no pull.
    below, above = (bounds[0] - held).relu(), (held - bounds[1]).relu()
    return masked(low_coef * below + high_coef * above, selected)
