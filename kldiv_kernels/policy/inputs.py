"""Checks the tensors of `policy_loss` and brings them to one form, [sequences, tokens]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.parallel import Group, agree_in, group_checked
from kldiv_kernels.policy import sequences as packing
from kldiv_kernels.policy.options import DPPO, EXACT_KL, INF, PolicyOptions, looks_at_the_batch
from kldiv_kernels.policy.sequences import Sequences

_PER_TOKEN = (
    "old_logprobs",
    "reference_logprobs",
    "sampling_logprobs",
    "anchor_logprobs",
    "token_weights",
    "kl_weights",
)
# Of the options of a call, in what ranks tell each other.
_LONGEST = 400
_DEFAULT_OPTIONS = vars(PolicyOptions())


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
    cu_seqlens: Tensor | None = None
    sequence_ids: Tensor | None = None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None or self.sequence_ids is not None


@dataclass(frozen=True)
class Groups:
    """The ranks that share sequences, and those whose tokens are one batch; None: this rank alone."""

    sequence: Group | None = None
    batch: Group | None = None


@dataclass(frozen=True)
class Batch:
    """[B, T] each, in the dtype of the statistics and finite where `valid` is False; packed tokens are one row.

    logprob, entropy and exact_kl carry a gradient, the others do not. own_old, own_anchor: old, or the anchor, is this
    policy itself. batch_group: the ranks whose tokens are one batch.
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
    sequences: Sequences
    batch_group: Group | None


def valid_tokens(tensors: Tensors, ignore_index: int) -> Tensor:
    valid = tensors.token_ids != ignore_index
    return valid if tensors.mask is None else valid & (tensors.mask != 0)


def prepare(
    tensors: Tensors,
    valid: Tensor,
    values: Mapping[str, Tensor],
    sequences: Sequences,
    batch_group: Group | None = None,
) -> Batch:
    shape = (1, valid.numel()) if valid.dim() == 1 else valid.shape
    valid = valid.reshape(shape)
    logprob = values["logprob"].reshape(shape)

    def given(tensor: Tensor | None, masked: Tensor) -> Tensor | None:
        if tensor is None:
            return None
        return torch.where(valid, tensor.detach().to(logprob.dtype).reshape(shape), masked)

    now, zero = logprob.detach(), logprob.new_zeros(())
    advantages = tensors.advantages
    if advantages.shape != tensors.token_ids.shape:
        advantages = sequences.given(advantages).expand(shape)
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
        sequences=sequences,
        batch_group=batch_group,
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
    packing.check(where, logits, tensors.cu_seqlens, tensors.sequence_ids)
    _check_advantages(where, tensors, logits)
    inputs.mask_checked(where, tensors.mask, logits, logits.shape[:-1])
    for name in _PER_TOKEN:
        inputs.per_token_checked(where, name, getattr(tensors, name), logits)
    inputs.normalizer_checked(where, tensors.normalizer)
    _check_presence(where, list(logits.shape[:-1]), tensors, options, off_policy_given)
    if logits.dim() == 2 and not tensors.packed:
        _check_without_sequences(where, options, tensors.sampling_logprobs is not None)


def groups_checked(where: str, groups: Groups, options: PolicyOptions) -> Groups:
    """Those of several ranks; raises for what is no group, has no use, or is missing."""
    sequence = group_checked(where, "sequence_group", groups.sequence)
    batch = group_checked(where, "batch_group", groups.batch)
    looks = looks_at_the_batch(options)
    if groups.batch is not None and not looks:
        raise ValueError(
            f"{where}: batch_group is given, but no option looks at the whole batch; it is for entropy_quantile and "
            f"cov_selection"
        )
    if sequence is not None and groups.batch is None and looks:
        raise ValueError(
            f"{where}: batch_group is None; {looks} looks at the whole batch, of which a rank of sequence_group has "
            f"a part: pass a group that has all of them"
        )
    return Groups(sequence, batch)


def groups_agree(where: str, groups: Groups, tensors: Tensors, options: PolicyOptions, logits: Tensor) -> None:
    """Raises on all ranks of a group where one has raised, or says what the sums over the ranks would not fit."""
    if groups.sequence is None and groups.batch is None:
        return
    changed = {name: value for name, value in vars(options).items() if value != _DEFAULT_OPTIONS[name]}
    said = {
        "dtype": str(logits.dtype),
        # As one text: what does not fit in is cut.
        "options": ", ".join(f"{name} = {value}" for name, value in changed.items())[:_LONGEST],
        "sampling_logprobs": "None" if tensors.sampling_logprobs is None else "given",
    }
    number = logits.shape[0] if logits.dim() == 3 else 1
    if tensors.cu_seqlens is not None:
        number = len(tensors.cu_seqlens) - 1
    form = {
        "number of sequences": "by sequence_ids" if tensors.sequence_ids is not None else number,
        # A rank that happens to have as many packed tokens as sequences cannot tell them apart.
        "advantages": "one a token" if tensors.advantages.shape == logits.shape[:-1] else "one a sequence",
    }
    agree_in("sequence_group", groups.sequence, where, logits, **said, **form)
    agree_in("batch_group", groups.batch, where, logits, **said)


def _check_advantages(where: str, tensors: Tensors, logits: Tensor) -> None:
    leading, advantages = list(logits.shape[:-1]), tensors.advantages
    once = isinstance(advantages, Tensor) and advantages.dim() == 1 and advantages.shape != logits.shape[:-1]
    if tensors.packed and once:
        _check_advantages_of_packed(where, tensors, logits)
        return
    if not tensors.packed and isinstance(advantages, Tensor) and logits.dim() == 3 and advantages.dim() == 1:
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


def _check_advantages_of_packed(where: str, tensors: Tensors, logits: Tensor) -> None:
    advantages, cu_seqlens = tensors.advantages, tensors.cu_seqlens
    if advantages.device != logits.device:
        raise ValueError(f"{where}: advantages is on {advantages.device}; expected {logits.device} like logits")
    if cu_seqlens is not None and len(advantages) != len(cu_seqlens) - 1:
        raise ValueError(
            f"{where}: advantages has shape {list(advantages.shape)}; expected [{len(cu_seqlens) - 1}], one a sequence "
            f"of cu_seqlens, or {list(logits.shape[:-1])}"
        )
    if tensors.sequence_ids is not None:
        packing.check_places(where, tensors.sequence_ids, advantages)


def _check_without_sequences(where: str, options: PolicyOptions, corrects: bool) -> None:
    """Tokens [N] without bounds or numbers have no sequences, so no mean or sum over one."""
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
                f"{where}: {name} is {getattr(options, name)!r}, which needs sequences: logits [batch, tokens, vocab], "
                f"or cu_seqlens= or sequence_ids= beside [tokens, vocab]; without any use token-level options, such as "
                f"aggregation='token-mean'"
            )
