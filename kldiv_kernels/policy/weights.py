r"""What stands beside the policy term: KL estimators, off-policy corrections, token selection and aggregation.

x = log π_ref − log π of the sampled token, y ~ π. The gradient that autograd gives, in expectation (the sample is
fixed, so a good estimate of a value need not have the gradient of what it estimates):

    k1       −x                      KL(π‖π_ref)      0: useless as a loss
    k2       x²/2                    biased           ∇KL(π‖π_ref)
    k3       e^x − x − 1             KL(π‖π_ref)      ∇KL(π_ref‖π), the other direction
    abs      |x|                     biased           ∇ of no KL
    k3_plus  k3·exp(lp − sg[lp])     KL(π‖π_ref)      ∇KL(π‖π_ref); the gradient of k2 token by token
    r·k3     (kl_bias_correction)    KL(π‖π_ref)      ∇KL(π‖π_ref), also when y ~ π_old

Sources: J. Schulman, "Approximating KL divergence" (2020); TRL 1.16, verl and NeMo-RL for the clamps and the ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kldiv_kernels.parallel import Group, at_positions, summed
from kldiv_kernels.policy.inputs import Batch
from kldiv_kernels.policy.options import INF, PolicyOptions, bounds
from kldiv_kernels.policy.sequences import SequenceSums, rows
from kldiv_kernels.policy.slopes import product, times, with_slope
from kldiv_kernels.policy.terms import Tokens

# Above it e^x − x − 1 is e^x in every precision, and e^x is finite in float32.
_LARGE = 80.0


def sampled_kl(tokens: Tokens, reference: Tensor, options: PolicyOptions) -> Tensor:
    """The estimator `options.kl_estimator`, per token, and its gradient; with the bias correction, if it is on.

    With k(x) the estimate and w the log-ratio at its level, d(k·e^w) = k'·e^w·d(w − log π) + (k − k')·e^w·dw. For k3
    k − k' is −x, whose digits a difference of two products would lose; the first part is 0 where w moves with this
    token's log π alone, and then k' may be infinite.
    """
    k, slope, rest, shift = _estimate(
        reference - tokens.logprob.detach(), options.kl_estimator, options.kl_log_ratio_clamp, options.kl_clamp,
        options.kl_bias_correction,
    )  # fmt: skip
    if options.kl_estimator == "k3_plus":
        return with_slope(k, tokens.logprob, rest)
    if not options.kl_bias_correction:
        return with_slope(k, tokens.logprob, -slope)
    w, (low, high) = tokens.level_log_ratio.detach(), bounds(options.log_ratio_clamp)
    scale = (w + shift).exp()
    value = product(k, scale)
    alone = (w > low) & (w < high)
    if options.importance_level != "token":
        alone = alone & (tokens.sums.at("tokens") == 1)
    apart = torch.where(alone, 0.0, tokens.level_log_ratio - tokens.logprob)
    by_level = torch.where(slope == 0, value, product(rest, w.exp()))
    return with_slope(with_slope(value, apart, product(slope, scale)), tokens.level_log_ratio, by_level)


def kl_estimate(
    logprob: Tensor,
    reference: Tensor,
    estimator: str = "k3",
    *,
    log_ratio_clamp: float = math.inf,
    clamp: float = math.inf,
) -> Tensor:
    """The estimator of a KL from sampled tokens, by the table above, with its gradient by `logprob`; nats.

    One more: f3, e^x·x − e^x + 1, whose mean over y ~ π is KL(π_ref‖π). Its gradient has that of KL(π_ref‖π) as mean
    where it is multiplied by the ratio (`importance`).

    Args:
        logprob, reference: log π and log π_ref of the tokens, of one shape; reference gets no gradient.
        estimator: k1, k2, k3, abs, k3_plus or f3. log_ratio_clamp, clamp: bounds of |x| and of the estimate; beyond
            them it has no gradient.

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-2.0]), "k3").item()
    0.3678794503211975
    """
    apart = (reference - logprob).detach()
    if estimator == "f3":
        x = apart.clamp(-log_ratio_clamp, log_ratio_clamp)
        # Near 0 the difference of two small numbers, beyond 1 of none that are infinite; e^x·x is 0 at x = −∞.
        small = product(x, x.exp()) - torch.expm1(x)
        value = torch.where(x > 1, product(x - 1, x.exp()) + 1, small)
        held = (apart.abs() > log_ratio_clamp) | (value.abs() > clamp)
        return with_slope(value.clamp(max=clamp), logprob, torch.where(held, 0.0, -product(x, x.exp())))
    k, slope, rest, _ = _estimate(apart, estimator, log_ratio_clamp, clamp, False)
    return with_slope(k, logprob, rest if estimator == "k3_plus" else -slope)


def importance(values: Tensor, logprob: Tensor, old: Tensor) -> Tensor:
    """e^(log π − log π_old)·values, with the gradients of both factors; `old` gets none. Of one shape.

    >>> importance(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([0.0])).item()
    2.0
    """
    ratio = (logprob - old).detach().exp()
    weighted_values = product(values.detach(), ratio)
    return with_slope(with_slope(weighted_values, values, ratio), logprob, weighted_values)


def _estimate(
    apart: Tensor, estimator: str, log_ratio_clamp: float, clamp: float, corrected: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, k' by x, k − k' and the exponent by whose power k and k' are to be multiplied, of x = `apart` before clamps.

    k' is 0 where a clamp holds. The exponent is above 0 where e^x, but not necessarily e^x times the ratio, overflows.
    """
    x = apart.clamp(-log_ratio_clamp, log_ratio_clamp)
    shift = torch.zeros_like(x)
    if estimator == "k1":
        k, slope = -x, torch.full_like(x, -1)
    elif estimator == "k2":
        k, slope = x.square() / 2, x
    elif estimator == "abs":
        k, slope = x.abs(), x.sign()
    else:
        base = x.clamp(max=_LARGE)
        if corrected and clamp == math.inf:
            slope, shift = torch.expm1(base), x - base
        else:
            slope = torch.expm1(x)
        k = slope - base
    rest = -x if estimator in ("k3", "k3_plus") else k - slope
    held = (apart.abs() > log_ratio_clamp) | (k.abs() > clamp)
    k = k.clamp(-clamp, clamp)
    return k, torch.where(held, 0.0, slope), torch.where(held, k, rest), shift


def summands(batch: Batch, options: PolicyOptions, kept: Tensor) -> dict[str, Tensor]:
    """What weights and selections sum over the tokens of a sequence, by name, each [B, T]; `kept`: of the quantile."""
    found = {"tokens": batch.valid}
    if options.entropy_quantile < 1 and options.entropy_coef != 0:
        found["kept"] = kept
    if batch.sampling is not None and options.off_policy.startswith("sequence"):
        found["off_policy"] = (batch.old - batch.sampling) * batch.valid
    if options.off_policy_threshold < INF:
        sampling = batch.old if batch.sampling is None else batch.sampling
        found["drift"] = (sampling - batch.logprob.detach()) * batch.valid
    return found


def off_policy_weight(batch: Batch, options: PolicyOptions, sums: SequenceSums | None = None) -> Tensor | None:
    """[B, T], π_old/π_sampling of a token or the product over its sequence: truncated to, or 0 outside, the bounds.

    None where there is no such correction. `sums`: of `summands`, for the sequence's.
    """
    if batch.sampling is None or options.off_policy == "none":
        return None
    if sums is not None and options.off_policy.startswith("sequence"):
        log_weight = sums.at("off_policy").expand_as(batch.old)
    else:
        log_weight = (batch.old - batch.sampling) * batch.valid
    weight = log_weight.exp()
    low, high = options.off_policy_min, options.off_policy_max
    if options.off_policy.endswith("truncate"):
        return weight.clamp(low, high)
    return torch.where((weight < low) | (weight > high), 0.0, weight)


def on_policy_sequences(sums: SequenceSums, advantages: Tensor, threshold: float) -> Tensor:
    """Off-policy sequence mask (DeepSeek-V3.2), bool [B, T]: False in a sequence whose mean log π_sampling − log π is
    above the threshold, where the advantage is negative. `sums`: of `summands`."""
    return (advantages >= 0) | (sums.at("drift") / sums.at("tokens").clamp_min(1) <= threshold)


def highest_entropy(entropy: Tensor, mask: Tensor, fraction: float, group: Group | None = None) -> Tensor:
    """Bool [B, T]: the tokens whose entropy is at least the (1 − fraction)-quantile over the mask.

    torch.quantile (linear interpolation), written so that the number of tokens stays on the device. group: over the
    tokens of all its ranks.
    """
    if entropy.numel() == 0 and group is None:
        return mask
    position = (summed(mask.sum(), group) - 1).clamp_min(0).double() * (1 - fraction)
    below, above = position.floor(), position.ceil()
    at = torch.stack([below, above]).long()
    if group is None:
        ordered = torch.where(mask, entropy.detach(), torch.inf).reshape(-1).sort().values
        low, high = ordered[at].unbind()
    else:
        low, high = at_positions(entropy, mask, at, group).unbind()
    # Never above `high`, which counts itself.
    return mask & (entropy.detach() >= torch.lerp(low, high, (position - below).to(low.dtype)))


def weighted(values: Tensor, weight: Tensor | None, options: PolicyOptions) -> Tensor:
    """Values of the policy term times the off-policy weight, which VESPO has inside its own."""
    return values if weight is None or options.loss_type == "vespo" else times(values, weight)


def aggregation_weights(
    mask: Tensor,
    dtype: torch.dtype,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    count_empty: bool = True,
    sums: SequenceSums | None = None,
    name: str = "tokens",
) -> Tensor:
    """What each token counts in the loss: [B, T], 0 where the mask is False, or NaN beside a normalizer of 0.

    `sums` has under `name` the number of the mask's tokens in each sequence; None: the sequences are rows.
    """
    sums = rows(mask).sums({name: mask}) if sums is None else sums
    counts = sums[name]
    if normalizer is None:
        if aggregation == "token-mean":
            normalizer = counts.sum().clamp_min(1)
        elif aggregation == "token-sum":
            normalizer = 1.0
        else:
            number = sums.sequences.count if count_empty else (counts > 0).sum()
            normalizer = number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)
    weights = mask.to(dtype) / normalizer
    return weights / sums.at(name).clamp_min(1) if aggregation == "seq-mean-token-mean" else weights


def aggregate(
    values: Tensor,
    mask: Tensor,
    aggregation: str,
    normalizer: float | Tensor | None,
    count_empty: bool,
    sums: SequenceSums | None = None,
    name: str = "tokens",
) -> Tensor:
    """The scalar of per-token values [B, T]; 0 without tokens. `sums`, `name`: see `aggregation_weights`."""
    weights = aggregation_weights(mask, values.dtype, aggregation, normalizer, count_empty, sums, name)
    # A normalizer of 0 comes with no token.
    weights = torch.where(mask, weights, 0.0)
    return (torch.where(mask, values, 0.0) * weights).sum()
