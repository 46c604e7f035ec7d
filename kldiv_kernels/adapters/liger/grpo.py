"""Liger's `triton_grpo_loss` on raw logits; `policy/terms.py` and `policy/weights.py` have the formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kldiv_kernels import inputs
from kldiv_kernels.policy import CLIPPED, PolicyOptions, aggregate, resolve, token_losses
from kldiv_kernels.stats import selective_log_softmax

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """Policy loss of the GRPO family: loss = policy term × vllm_is_ratio + beta·k3, from one read of the logits.

    Args:
        logits: [B, L + 1, V] raw; the last position is not read.
        old_logp: [B, L], or None for a ratio of 1. ref_logp: [B, L]; needed where beta is not 0.
        completion_ids: [B, L] integers. completion_mask: [B, L], 0 for tokens that do not count.
        advantages: [B]; or [B, L], one a token.
        temperature, beta, eps_low, eps_high, sapo_*, vespo_*: as named in `kldiv_kernels.policy_loss`: temperature,
            kl_coef, clip_low, clip_high, sapo_temperatures, vespo_positive and vespo_negative. For cispo eps_high is
            the bound of the ratio itself, and there is no lower one.
        inplace: no effect: the gradient is a tensor of its own.
        loss_type: grpo, bnpo, dr_grpo, dapo (default), luspo, cispo, sapo or vespo.
        max_completion_length: dr_grpo divides by B × this; default L.
        importance_sampling_level: "token" or "sequence".
        reduce: whether to return the loss, or what it is the mean of. Default False.
        vllm_is_ratio: [B], [B, 1] or [B, L]; vespo has it inside its own weight.
        delta: upper bound of the unclipped ratio; default none.
        use_bias_correction_kl: multiplies k3 by the ratio, with gradient.
        num_items_in_batch: dapo, cispo and vespo divide by this / number of ranks; default: the tokens of the call.

    Returns:
        With reduce=True (loss, [mean KL, clip ratio]), without the KL where beta is 0; otherwise, each [B, L] and 0
        where masked, (loss, KL or None, whether clipped as 0.0 or 1.0). Loss in nats with gradient, the others without.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed.

    >>> logits = torch.zeros(1, 3, 4, requires_grad=True)
    >>> old = torch.full((1, 2), 0.25).log()
    >>> ids, advantages = torch.tensor([[1, 2]]), torch.tensor([2.0])
    >>> loss, metrics = triton_grpo_loss(logits, old, None, ids, advantages, beta=0.0, reduce=True)
    >>> round(loss.item(), 4), [x.item() for x in metrics]
    (-2.0, [0.0])
    """
    where = "triton_grpo_loss"
    options = _grpo_options(
        where, loss_type, importance_sampling_level, eps_low, eps_high, delta, use_bias_correction_kl,
        (sapo_temperature_pos, sapo_temperature_neg), (vespo_k_pos, vespo_lambda_pos), (vespo_k_neg, vespo_lambda_neg),
    )  # fmt: skip
    inputs.logits_checked(where, logits, "logits")
    if logits.dim() != 3 or logits.shape[1] < 1:
        raise ValueError(f"{where}: logits has shape {list(logits.shape)}; expected [B, L + 1, V]")
    predicting, shape = logits[:, :-1], completion_ids.shape
    inputs.per_token_checked(where, "completion_ids", completion_ids, predicting, integers=True)
    for name, tensor in (("old_logp", old_logp), ("ref_logp", ref_logp), ("completion_mask", completion_mask)):
        inputs.per_token_checked(where, name, tensor, predicting)
    if beta != 0 and ref_logp is None:
        raise ValueError(f"{where}: ref_logp is None; beta = {beta} needs it, shape {list(shape)}")
    valid = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask != 0

    # The last position gets a masked target: a slice of the logits would cost a zero-filled copy of their gradient.
    ids, mask = (nn.functional.pad(x, (0, 1)) for x in (torch.where(valid, completion_ids, 0), valid))
    try:
        logprob = selective_log_softmax(logits, ids, temperature=temperature, mask=mask)[:, :-1]
    except IndexError as error:
        raise IndexError(str(error).replace("token_stats: labels", f"{where}: completion_ids")) from None
    now = logprob.detach()
    old = now if old_logp is None else torch.where(valid, old_logp.detach().to(now.dtype), now)
    advantages = torch.where(valid, _spread(where, "advantages", advantages, shape).to(now.dtype), 0.0)
    ratio = None
    if vllm_is_ratio is not None:
        ratio = torch.where(valid, _spread(where, "vllm_is_ratio", vllm_is_ratio, shape).to(now.dtype), 1.0)

    log_weight = None
    if loss_type == "vespo" and ratio is not None and vllm_is_ratio is not None:
        log_weight = _once(ratio.log(), valid, vllm_is_ratio)
    reference = None
    if beta != 0 and ref_logp is not None:
        reference = torch.where(valid, ref_logp.detach().to(now.dtype), now)
    losses = token_losses(
        logprob, old, advantages, valid, options, reference=reference, weight=ratio, log_weight=log_weight
    )
    loss, kl = losses.per_token, None
    if losses.kl is not None:
        loss = loss + beta * losses.kl
        kl = torch.where(valid, losses.kl.detach(), 0.0)
    loss = torch.where(valid, loss, 0.0)
    clipped = torch.zeros_like(loss)
    for side in losses.clipped.values():
        clipped = torch.where(side & valid, 1.0, clipped)
    if not reduce:
        return loss, kl, clipped.detach()
    count = valid.sum().clamp_min(1)
    metrics = [x.detach().sum() / count for x in (kl, clipped) if x is not None]
    normalizer = _normalizer(loss_type, shape, max_completion_length, num_items_in_batch, loss)
    return aggregate(loss, valid, options.aggregation, normalizer, count_empty=True), metrics


def _grpo_options(
    where: str,
    loss_type: str,
    level: str,
    eps_low: float,
    eps_high: float,
    delta: float | None,
    bias_correction: bool,
    sapo: tuple[float, float],
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> PolicyOptions:
    # Worded as Liger words them: callers' tests match these.
    if loss_type not in _LOSS_TYPES:
        raise ValueError(f"{where}: Unknown loss_type {loss_type!r}. Supported types: {list(_LOSS_TYPES)}")
    if delta is not None and loss_type not in CLIPPED:
        raise ValueError(
            f"{where}: delta (two-sided clipping) is not supported for loss_type={loss_type!r}. delta is {delta}; "
            f"expected None, or a loss_type of {', '.join(CLIPPED[:-1])}"
        )
    if level not in ("token", "sequence"):
        raise ValueError(f"{where}: importance_sampling_level must be 'token' or 'sequence', got {level}")
    if level == "sequence" and loss_type == "vespo":
        raise ValueError(f"{where}: loss_type='vespo' requires importance_sampling_level='token'.")
    if level == "sequence" and loss_type not in CLIPPED:
        raise ValueError(
            f"{where}: Sequence-level importance sampling is not supported for loss_type={loss_type!r}. Use "
            f"importance_sampling_level='token' instead."
        )
    for name, temperature in (("pos", sapo[0]), ("neg", sapo[1])):
        if loss_type == "sapo" and not temperature > 0:
            raise ValueError(f"{where}: sapo_temperature_{name} must be positive, got {temperature}")
    given: dict[str, Any] = {
        "loss_type": loss_type,
        "importance_level": level,
        "delta": delta,
        "kl_bias_correction": bias_correction,
        "log_ratio_clamp": math.inf,
    }
    if loss_type in CLIPPED:
        given |= {"clip_low": eps_low, "clip_high": eps_high}
    elif loss_type == "cispo":
        given |= {"clip_absolute": True, "clip_low": 0.0, "clip_high": eps_high}
    elif loss_type == "sapo":
        given["sapo_temperatures"] = sapo
    else:
        given |= {"vespo_positive": positive, "vespo_negative": negative}
    return resolve(where, "trl", given)


def _normalizer(
    loss_type: str, shape: torch.Size, length: int | None, items: Tensor | float | None, like: Tensor
) -> Tensor | float | None:
    if loss_type == "dr_grpo":
        return shape[0] * (shape[1] if length is None else length)
    if items is None or loss_type not in ("dapo", "cispo", "vespo"):
        return None
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if spread else 1
    return (torch.as_tensor(items, dtype=like.dtype, device=like.device) / ranks).clamp_min(1)


def _once(log_weight: Tensor, valid: Tensor, given: Tensor) -> Tensor:
    """[B, L] whose sum over a sequence's tokens has a weight that is one number a sequence once."""
    if given.dim() == 2 and given.shape == valid.shape:
        return log_weight
    return torch.where(valid & (valid.cumsum(-1) == 1), log_weight, 0.0)


def _spread(where: str, name: str, given: Tensor, shape: torch.Size) -> Tensor:
    batch, length = shape
    if list(given.shape) not in ([batch], [batch, 1], [batch, length]):
        raise ValueError(
            f"{where}: {name} has shape {list(given.shape)}; expected {[batch]}, {[batch, 1]} or {[batch, length]}"
        )
    return given.detach().reshape(batch, -1).expand(shape)
