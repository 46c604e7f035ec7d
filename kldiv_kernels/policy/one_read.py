"""The policy losses whose gradient comes out of the pass that reads the logits: those of a token by itself.

The gradient of such a loss by the token's log-probability follows from that log-probability and from what is known
before the pass, so a kernel can go from the values of a row to its gradient while the row is on chip: one read of the
logits, one write of their gradient. `csrc/policy.h` has the formulas of the coefficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels.policy.inputs import Tensors, prepare
from kldiv_kernels.policy.options import CLIPPED, EXACT_KL, INF, PolicyOptions, bounds
from kldiv_kernels.policy.sequences import Sequences, SequenceSums
from kldiv_kernels.policy.slopes import times
from kldiv_kernels.policy.terms import ratio_bounds
from kldiv_kernels.policy.weights import aggregation_weights, off_policy_weight, summands, weighted
from kldiv_kernels.sources import PolicyTokens

_TERMS = ("cispo", "sapo", "reinforce", "topr", "dppo_tv", "dppo_kl")


def waits(options: PolicyOptions, tensors: Tensors) -> str | None:
    """What a token's gradient depends on beside its own log-probability; None: nothing that the pass finds."""
    if options.loss_type not in (*CLIPPED, *_TERMS) or options.importance_level != "token":
        return "this loss depends on whole sequences"
    if options.cov_selection != "none" or options.entropy_quantile < 1 or options.off_policy_threshold < INF:
        return "its tokens are selected by what the pass finds"
    if tensors.sampling_logprobs is not None and options.off_policy != "none" and tensors.old_logprobs is None:
        return "off_policy without old_logprobs needs the log-probabilities first"
    sampled = options.kl_coef != 0 and options.kl_estimator not in EXACT_KL
    if sampled and tensors.reference_logits is not None:
        return "an estimate of the KL from reference_logits needs their log-probabilities first (give the latter)"
    return None


@dataclass(frozen=True)
class Known:
    """What a loss knows of its tokens before the pass, [N] each: what the pass is told, and what the metrics want.

    valid: of bool. scale: what a token counts in the loss. anchored: whether anchors were given. reference: whether
    there is one for a sampled KL. sums: over sequences.
    """

    tokens: PolicyTokens
    valid: Tensor
    scale: Tensor
    old: Tensor | None
    sampling: Tensor | None
    off_policy_weight: Tensor | None
    token_weights: Tensor | None
    kl_weights: Tensor | None
    anchored: bool
    reference: bool
    sums: SequenceSums


def known(
    tensors: Tensors, valid: Tensor, options: PolicyOptions, stats: tuple[str, ...], sequences: Sequences
) -> Known:
    # The policy's own log-probabilities are not there yet. NaN is what the operator takes for them, where they stand in
    # for the anchor's.
    unknown = torch.zeros(valid.shape, dtype=torch.float32, device=valid.device).masked_fill(valid, torch.nan)
    batch = prepare(tensors, valid, {"logprob": unknown, "entropy": unknown}, sequences)
    sums = sequences.sums(summands(batch, options, batch.valid))
    scale = aggregation_weights(
        batch.valid, batch.logprob.dtype, options.aggregation, batch.normalizer, options.count_empty_sequences, sums
    )
    weight = off_policy_weight(batch, options, sums)
    nothing = torch.zeros_like(scale)
    policy_weight = weighted(scale, weight, options)
    if batch.weights is not None:
        policy_weight = times(policy_weight, batch.weights)
    anchored = tensors.old_logprobs is not None or tensors.anchor_logprobs is not None
    if anchored:
        # A NaN that was given is none of those, and is to be seen.
        policy_weight = torch.where(batch.anchor.isnan(), torch.nan, policy_weight)
    exact = options.kl_estimator in EXACT_KL
    kl_weight = options.kl_coef * scale
    if batch.kl_weights is not None:
        kl_weight = times(kl_weight, batch.kl_weights)
    tokens = [
        policy_weight,
        batch.advantages,
        batch.anchor,
        nothing if batch.reference is None else batch.reference,
        nothing if exact or batch.reference is None else kl_weight,
    ]
    coefficients = dict.fromkeys(stats, nothing)
    if options.entropy_coef != 0:
        how = scale
        if options.entropy_aggregation == "token-mean":
            how = aggregation_weights(batch.valid, scale.dtype, sums=sums)
        coefficients["entropy"] = -options.entropy_coef * how
    if exact and options.kl_coef != 0:
        coefficients[options.kl_estimator] = kl_weight
    low, high = (options.clip_low, options.clip_high) if options.loss_type.startswith("dppo") else ratio_bounds(options)
    told = PolicyTokens(
        _rows([coefficients[name] for name in stats]),
        _rows(tokens),
        "clipped" if options.loss_type in CLIPPED else options.loss_type,
        "k3" if exact else options.kl_estimator,
        [
            low, high, options.delta, options.dual_clip, *bounds(options.log_ratio_clamp), *options.sapo_temperatures,
            options.kl_log_ratio_clamp, options.kl_clamp, float(options.kl_bias_correction),
        ],
    )  # fmt: skip

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1).contiguous()

    return Known(
        told, valid.reshape(-1), scale.reshape(-1).contiguous(),
        None if tensors.old_logprobs is None else flat(batch.old), flat(batch.sampling), flat(weight),
        flat(batch.weights), flat(batch.kl_weights), anchored, batch.reference is not None and not exact,
        sums,
    )  # fmt: skip


def _rows(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.reshape(-1) for tensor in tensors])
