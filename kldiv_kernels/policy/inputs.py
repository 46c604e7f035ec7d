"""Checks the tensors of `policy_loss` and brings them to one form, [sequences, tokens]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.policy.options import DPPO, EXACT_KL, INF, PolicyOptions

_PER_TOKEN = (
    "old_logprobs",
    "reference_logprobs",
    "sampling_logprobs",
    "anchor_logprobs",
    "token_weights",
    "kl_weights",
)


@dataclass(frozen=True)
class Tensors:
    """The tensors as given."""

    token_ids: Tensor
    advantages: Tensor
    mask: Tensor | None
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    reference_logits: Tensor | None
    sampling_logprobs: Tensor | None
    anchor_logprobs: Tensor | None
    token_weights: Tensor | None
    kl_weights: Tensor | None
    normalizer: float | Tensor | None


@dataclass(frozen=True)
class Batch:
    """[B, T] each, in the dtype of the statistics and finite where `valid` is False; packed tokens are one sequence.

    logprob, entropy and exact_kl carry a gradient, the others do not. own_old, own_anchor: old, or the anchor, is this
    policy itself.
    """

    valid: Tensor
    logprob: Tensor
    entropy: Tensor
    exact_kl: Tensor | None
    advantages: Tensor
    old: Tensor
    anchor: Tensor
    own_old: bool
    own_anchor: bool
    reference: Tensor | None
    sampling: Tensor | None
    weights: Tensor | None
    kl_weights: Tensor | None
    normalizer: float | Tensor | None


def valid_tokens(tensors: Tensors, ignore_index: int) -> Tensor:
    valid = tensors.token_ids != ignore_index
    return valid if tensors.mask is None else valid & (tensors.mask != 0)


def prepare(tensors: Tensors, valid: Tensor, values: Mapping[str, Tensor]) -> Batch:
    shape = (1, valid.numel()) if valid.dim() == 1 else valid.shape
    valid = valid.reshape(shape)
    logprob = values["logprob"].reshape(shape)

    def given(tensor: Tensor | None, masked: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        return torch.where(valid, tensor.detach().to(logprob.dtype).reshape(shape), masked)

    now, zero = logprob.detach(), logprob.new_zeros(())
    per_sequence = tensors.advantages.dim() < tensors.token_ids.dim()
    advantages = tensors.advantages[:, None].expand(shape) if per_sequence else tensors.advantages
    old = given(tensors.old_logprobs, now)
    old = now if old is None else old
    anchor = given(tensors.anchor_logprobs, now)
    sampling = given(tensors.sampling_logprobs, old)
    exact = next((name for name in EXACT_KL if name in values), None)
    return Batch(
        valid=valid,
        logprob=logprob,
        entropy=values["entropy"].reshape(shape),
        exact_kl=None if exact is None else values[exact].reshape(shape),
        advantages=torch.where(valid, advantages.detach().to(logprob.dtype).reshape(shape), zero),
        old=old,
        anchor=old if anchor is None else anchor,
        own_old=tensors.old_logprobs is None,
        own_anchor=tensors.old_logprobs is None and anchor is None,
        reference=given(values.get("reference_logprob", tensors.reference_logprobs), now),
        # The engine could not score a token that is NaN: it is taken to be on-policy (TRL).
        sampling=None if sampling is None else torch.where(sampling.isnan(), old, sampling),
        weights=given(tensors.token_weights, zero),
        kl_weights=given(tensors.kl_weights, zero),
        normalizer=_one(tensors.normalizer),
    )


def _one(normalizer: float | Tensor | None) -> float | Tensor | None:
    return normalizer.detach().reshape(()) if isinstance(normalizer, Tensor) else normalizer


def check(where: str, logits: Tensor, tensors: Tensors, options: PolicyOptions, off_policy_given: bool) -> None:
    """Raises where a tensor has another shape or type than allowed, is missing, or has no use."""
    inputs.logits_checked(where, logits, "logits")
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{where}: logits has shape {list(logits.shape)}; expected [batch, tokens, vocab] or [tokens, vocab]"
        )
    inputs.per_token_checked(where, "token_ids", tensors.token_ids, logits, integers=True)
    _check_advantages(where, tensors.advantages, logits)
    inputs.mask_checked(where, tensors.mask, logits, logits.shape[:-1])
    for name in _PER_TOKEN:
        inputs.per_token_checked(where, name, getattr(tensors, name), logits)
    inputs.normalizer_checked(where, tensors.normalizer)
    _check_presence(where, list(logits.shape[:-1]), tensors, options, off_policy_given)
    if logits.dim() == 2:
        _check_packed(where, options, tensors.sampling_logprobs is not None)


def _check_advantages(where: str, advantages: Tensor, logits: Tensor) -> None:
    leading = list(logits.shape[:-1])
    if isinstance(advantages, Tensor) and logits.dim() == 3 and advantages.dim() == 1:
        if list(advantages.shape) == leading[:1]:
            if advantages.device != logits.device:
                raise ValueError(f"{where}: advantages is on {advantages.device}; expected {logits.device} like logits")
            return
        raise ValueError(
            f"{where}: advantages has shape {list(advantages.shape)}; expected {leading[:1]}, one a sequence, or "
            f"{leading}"
        )
    inputs.per_token_checked(where, "advantages", advantages, logits)


def _check_presence(
    where: str, leading: list[int], tensors: Tensors, options: PolicyOptions, off_policy_given: bool
) -> None:
    if tensors.old_logprobs is None and tensors.anchor_logprobs is None and options.loss_type in ("topr", *DPPO):
        raise ValueError(
            f"{where}: old_logprobs is None; loss_type {options.loss_type!r} bounds the distance from them, "
            f"pass {leading}"
        )
    if tensors.reference_logprobs is not None and tensors.reference_logits is not None:
        raise ValueError(f"{where}: reference_logprobs and reference_logits are both given; pass one")
    if options.kl_estimator in EXACT_KL:
        if tensors.reference_logprobs is not None or (options.kl_coef != 0 and tensors.reference_logits is None):
            raise ValueError(
                f"{where}: reference_logits is None; kl_estimator {options.kl_estimator!r} is over the vocabulary and "
                f"needs them, shape {[*leading, 'V']}"
            )
    elif options.kl_coef != 0 and tensors.reference_logprobs is None and tensors.reference_logits is None:
        raise ValueError(
            f"{where}: reference_logprobs is None; kl_coef = {options.kl_coef} needs them, shape {leading}, "
            f"or reference_logits"
        )
    if tensors.kl_weights is not None and options.kl_coef == 0:
        raise ValueError(f"{where}: kl_weights is given, but kl_coef is 0; it multiplies the KL, pass a kl_coef")
    if off_policy_given and tensors.sampling_logprobs is None:
        raise ValueError(f"{where}: sampling_logprobs is None; off_policy corrects for them, pass {leading}")
    if options.aggregation == "token-sum" and options.loss_type == "dr_grpo" and tensors.normalizer is None:
        raise ValueError(
            f"{where}: normalizer is None; loss_type 'dr_grpo' divides by a constant, pass sequences × longest length"
        )


def _check_packed(where: str, options: PolicyOptions, corrects: bool) -> None:
    """Packed tokens have no sequences, so no mean or sum over one."""
    wrong = {
        "loss_type": options.loss_type in ("vespo", "gmpo"),
        "importance_level": options.importance_level != "token",
        "off_policy": corrects and options.off_policy.startswith("sequence"),
        "off_policy_threshold": options.off_policy_threshold < INF,
        "aggregation": options.aggregation.startswith("seq"),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{where}: {name} is {getattr(options, name)!r}, which needs sequences: logits [batch, tokens, vocab]; "
                f"for [tokens, vocab] use token-level options, such as aggregation='token-mean'"
            )
