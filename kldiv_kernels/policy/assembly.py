"""From per-token values to the policy loss: term, selection, weights, KL, entropy bonus, aggregation, metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels import ops
from kldiv_kernels.policy import terms, weights
from kldiv_kernels.policy.inputs import Batch
from kldiv_kernels.policy.one_read import Known
from kldiv_kernels.policy.options import CLIPPED, DPPO, INF, PolicyOptions
from kldiv_kernels.policy.per_token import TokenLosses, token_log_ratio, token_losses
from kldiv_kernels.policy.sequences import SequenceSums
from kldiv_kernels.policy.slopes import times
from kldiv_kernels.policy.weights import aggregate, highest_entropy, off_policy_weight, on_policy_sequences


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns.

    loss: scalar, differentiable. per_token_loss: [B, T] (or [N]): policy term, weights and KL penalty before
    aggregation and without the entropy bonus, 0 where masked; differentiable with `per_token_gradient=True`. metrics:
    scalars on the logits' device, without gradient; nothing waits for the device until one is read. logprob, entropy:
    [B, T] (or [N]), of this policy, in nats, without gradient; 0 where masked.
    """

    loss: Tensor
    per_token_loss: Tensor
    metrics: dict[str, Tensor]
    logprob: Tensor
    entropy: Tensor


def assemble(batch: Batch, options: PolicyOptions, shape: torch.Size, sums: SequenceSums | None = None) -> PolicyLoss:
    """The loss of a batch; `shape` is that of per_token_loss. `sums`: of a loss that is known before the pass."""
    kept = batch.valid
    if options.entropy_quantile < 1:
        kept = highest_entropy(batch.entropy, batch.valid, options.entropy_quantile, batch.batch_group)
    log_ratio = token_log_ratio(batch.logprob, batch.anchor, batch.own_anchor)
    sums = _sums(batch, options, kept, log_ratio) if sums is None else sums
    weight = off_policy_weight(batch, options, sums)
    losses = token_losses(
        batch.logprob, batch.anchor, batch.advantages, batch.valid, options,
        reference=batch.reference if batch.exact_kl is None else None, weight=weight, own_anchor=batch.own_anchor,
        log_ratio=log_ratio, sums=sums, batch_group=batch.batch_group,
    )  # fmt: skip
    term = losses.per_token if batch.weights is None else times(losses.per_token, batch.weights)
    kl = losses.kl if batch.exact_kl is None else batch.exact_kl

    selected = kept
    if options.off_policy_threshold < INF:
        selected = kept & on_policy_sequences(sums, batch.advantages, options.off_policy_threshold)
    per_token = torch.where(selected, term, 0.0)
    if kl is not None and options.kl_coef != 0:
        penalty = options.kl_coef * kl
        penalty = penalty if batch.kl_weights is None else times(penalty, batch.kl_weights)
        per_token = per_token + torch.where(batch.valid, penalty, 0.0)

    count_empty = options.count_empty_sequences
    loss = aggregate(per_token, batch.valid, options.aggregation, batch.normalizer, count_empty, sums)
    if options.entropy_coef != 0:
        how, normalizer = ("token-mean", None)
        if options.entropy_aggregation == "loss":
            how, normalizer = options.aggregation, batch.normalizer
        name = "kept" if options.entropy_quantile < 1 else "tokens"
        bonus = aggregate(batch.entropy, kept, how, normalizer, count_empty, sums, name)
        loss = loss - options.entropy_coef * bonus
    with torch.no_grad():
        metrics = _metrics(batch, losses, kl, weight)
    logprob, entropy = (x.detach().reshape(shape) for x in (batch.logprob, batch.entropy))
    return PolicyLoss(loss, per_token.reshape(shape), metrics, logprob, entropy)


def outcome(
    known: Known, values: Tensor, stats: tuple[str, ...], backend: str, options: PolicyOptions, shape: torch.Size
) -> PolicyLoss:
    """The same of a loss that is known but for the values [value_rows, N]: one operator, where `assemble` has many."""
    tokens, exact = known.tokens, options.kl_estimator in stats
    per_token, sums, count = ops.policy_outcome(
        backend, values.detach(), tokens.coefficients, tokens.tokens, known.valid, known.scale, known.old,
        known.sampling, known.off_policy_weight, known.token_weights, known.kl_weights, known.anchored,
        known.reference, exact, options.kl_coef, tokens.term, tokens.kl, tokens.bounds,
    )  # fmt: skip
    by_name = dict(zip(ops.POLICY_SUMS, sums.unbind(), strict=True))
    names = ["entropy", "ratio_mean", "approx_kl"]
    if options.loss_type in (*CLIPPED, "cispo", *DPPO):
        names += ["clip_fraction_low", "clip_fraction_high"]
    if options.loss_type in CLIPPED and options.dual_clip < INF:
        names.append("clip_fraction_dual")
    there = {
        "kl": known.reference, "exact_kl": exact, "sampling_kl": known.sampling is not None,
        "off_policy_weight": known.off_policy_weight is not None,
    }  # fmt: skip
    names += [name for name, is_there in there.items() if is_there]
    metrics = {"tokens": count, **{name: by_name[name] for name in names}, "ratio_max": by_name["ratio_max"]}
    logprob, entropy = (x.detach().reshape(shape) for x in values.unbind()[:2])
    return PolicyLoss(by_name["loss"], per_token.reshape(shape), metrics, logprob, entropy)


def _sums(batch: Batch, options: PolicyOptions, kept: Tensor, log_ratio: Tensor) -> SequenceSums:
    """All that is summed over sequences, together: one collective where they lie on several ranks."""
    log_weight = None
    if options.loss_type == "vespo":
        weight = off_policy_weight(batch, options)
        log_weight = None if weight is None else weight.log()
    of_term = terms.summands(log_ratio, batch.advantages, batch.valid, options, log_weight)
    return batch.sequences.sums({**of_term, **weights.summands(batch, options, kept)})


def _metrics(batch: Batch, losses: TokenLosses, kl: Tensor | None, weight: Tensor | None) -> dict[str, Tensor]:
    ratio, moved = losses.level_log_ratio.exp(), batch.logprob - batch.old
    if batch.own_old:
        moved = torch.zeros_like(moved).masked_fill(batch.old.isnan(), torch.nan)
    tokens = {
        "entropy": batch.entropy,
        "ratio_mean": ratio,
        "approx_kl": torch.expm1(moved) - moved,
        **{f"clip_fraction_{name}": where for name, where in losses.clipped.items()},
    }
    if kl is not None:
        tokens["kl" if batch.exact_kl is None else "exact_kl"] = kl
    if batch.sampling is not None:
        tokens["sampling_kl"] = batch.sampling - batch.old
    if weight is not None:
        tokens["off_policy_weight"] = weight
    # Together: on a GPU each operation on so few numbers takes as long as on many.
    table = torch.stack([x.detach().to(ratio.dtype) for x in tokens.values()]).flatten(1)
    table = table.masked_fill(~batch.valid.reshape(1, -1), 0.0)
    count = batch.valid.sum()
    means = dict(zip(tokens, (table.sum(1) / count.clamp_min(1)).unbind(), strict=True))
    # Ratios are positive: a 0 in place of the masked ones leaves the largest alone, and is that of no token.
    ratios = table[list(tokens).index("ratio_mean")]
    return {"tokens": count, **means, "ratio_max": ratios.amax() if ratios.numel() else count.to(ratio.dtype)}
