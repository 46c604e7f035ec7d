"""The keyword arguments that losses share, and the types of functions that take them, for editors and type checkers.

A loss is made in one place and has many forms: a function of each kind, a module of each. Their arguments are written
here, once. Nothing imports this module at run time.
"""

from __future__ import annotations

from typing import Protocol, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from kldiv_kernels.choices import (
    Aggregation,
    Backend,
    CovSelection,
    EntropyAggregation,
    ImportanceLevel,
    KLEstimator,
    LossType,
    OffPolicy,
    Preset,
    Reduction,
    Tail,
)
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.linear import AnyHead, TeacherProjection
from kldiv_kernels.parallel import Group


class _ShardOptions(TypedDict, total=False):
    """Over which processes the vocabulary is spread."""

    group: Group | None
    vocab_start: int | None


class _LossOptions(_ShardOptions, total=False):
    """What a divergence loss is told beside its tensors, whatever its kind."""

    reduction: Reduction
    temperature: Parameter
    reference_temperature: Parameter | None
    temperature_squared: bool
    ignore_index: int
    shift: bool
    vocab_size: int | None
    backend: Backend


class FixedOptions(_LossOptions, total=False):
    """What a module fixes at construction, whatever its kind."""

    in_place: bool


class FixedOptionsOfAKind(FixedOptions, total=False):
    """With the parameters that some kinds have."""

    alpha: Parameter | None
    beta: Parameter | None


class BatchOptions(TypedDict, total=False):
    """What belongs to a batch."""

    weight: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    normalizer: float | Tensor | None
    exclude: Tensor | None


class LossOptions(FixedOptions, BatchOptions, total=False):
    """The keyword arguments of a kind without parameters."""


class LossOptionsOfAlpha(LossOptions, total=False):
    alpha: Parameter | None


class LossOptionsOfBeta(LossOptions, total=False):
    beta: Parameter | None


class LossOptionsOfAlphaBeta(LossOptions, total=False):
    alpha: Parameter | None
    beta: Parameter | None


class Divergence(Protocol):
    __name__: str

    def __call__(self, logits: Tensor, reference_logits: Tensor, **options: Unpack[LossOptions]) -> Tensor: ...


class DivergenceOfAlpha(Protocol):
    __name__: str

    def __call__(self, logits: Tensor, reference_logits: Tensor, **options: Unpack[LossOptionsOfAlpha]) -> Tensor: ...


class DivergenceOfBeta(Protocol):
    __name__: str

    def __call__(self, logits: Tensor, reference_logits: Tensor, **options: Unpack[LossOptionsOfBeta]) -> Tensor: ...


class DivergenceOfAlphaBeta(Protocol):
    __name__: str

    def __call__(
        self, logits: Tensor, reference_logits: Tensor, **options: Unpack[LossOptionsOfAlphaBeta]
    ) -> Tensor: ...


class _TopKOptions(_ShardOptions, total=False):
    """What a top-k divergence is told beside its tensors."""

    tail: Tail
    tail_floor: float | None
    reduction: Reduction
    temperature: Parameter
    temperature_squared: bool
    alpha: Parameter | None
    beta: Parameter | None
    ignore_index: int
    shift: bool
    vocab_size: int | None
    check: bool | None
    backend: Backend


class FixedTopKOptions(_TopKOptions, total=False):
    """What a module of a top-k divergence fixes at construction."""

    in_place: bool


class TopKBatchOptions(TypedDict, total=False):
    tail_logprob: Tensor | None
    weight: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    normalizer: float | Tensor | None


class _PolicyOptions(_ShardOptions, total=False):
    """What a policy loss is told beside its tensors."""

    loss_type: LossType | None
    preset: Preset | None
    importance_level: ImportanceLevel | None
    clip_low: float | None
    clip_high: float | None
    clip_absolute: bool | None
    dual_clip: float | None
    delta: float | None
    log_ratio_clamp: float | tuple[float, float] | None
    sapo_temperatures: tuple[float, float] | None
    vespo_positive: tuple[float, float] | None
    vespo_negative: tuple[float, float] | None
    cov_selection: CovSelection | None
    cov_fraction: float | None
    cov_bounds: tuple[float, float] | None
    cov_kl_coef: float | None
    off_policy: OffPolicy | None
    off_policy_min: float | None
    off_policy_max: float | None
    off_policy_threshold: float | None
    kl_coef: float | None
    kl_estimator: KLEstimator | None
    kl_bias_correction: bool | None
    kl_log_ratio_clamp: float | None
    kl_clamp: float | None
    entropy_coef: float | None
    entropy_quantile: float | None
    entropy_aggregation: EntropyAggregation | None
    aggregation: Aggregation | None
    count_empty_sequences: bool | None
    per_token_gradient: bool
    temperature: Parameter
    reference_temperature: Parameter | None
    ignore_index: int
    vocab_size: int | None
    sequence_group: Group | None
    batch_group: Group | None
    backend: Backend


class FixedPolicyOptions(_PolicyOptions, total=False):
    """What a module of a policy loss fixes at construction."""

    in_place: bool


class _PolicyTensors(TypedDict, total=False):
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    sampling_logprobs: Tensor | None
    anchor_logprobs: Tensor | None
    token_weights: Tensor | None
    kl_weights: Tensor | None
    mask: Tensor | None
    normalizer: float | Tensor | None
    cu_seqlens: Tensor | None
    sequence_ids: Tensor | None


class PolicyBatchOptions(_PolicyTensors, total=False):
    reference_logits: Tensor | None


class LinearStatisticsOptions(_ShardOptions, total=False):
    """The keyword arguments of `token_stats` that `linear_token_stats` takes as they are."""

    temperature: Parameter
    reference_temperature: Parameter | None
    alpha: Parameter
    beta: Parameter
    mask: Tensor | None
    ignore_index: int
    shift: bool
    vocab_size: int | None
    exclude: Tensor | None
    backend: Backend


class FixedLinearOptions(_LossOptions, total=False):
    """What a module of `linear_divergence_loss` fixes at construction."""

    alpha: Parameter | None
    beta: Parameter | None
    logits_dtype: torch.dtype | None
    rows_per_chunk: int | None
    reduce_hidden_grad: bool


class LinearBatchOptions(BatchOptions, total=False):
    reference_logits: Tensor | None
    reference_projection: TeacherProjection | None


class LinearLossOptions(_LossOptions, BatchOptions, total=False):
    """The keyword arguments of `divergence_loss` that `linear_divergence_loss` takes as they are."""

    alpha: Parameter | None
    beta: Parameter | None


class FixedLinearTopKOptions(_TopKOptions, total=False):
    """What a module of `linear_topk_divergence_loss` fixes at construction."""

    logits_dtype: torch.dtype | None
    rows_per_chunk: int | None
    reduce_hidden_grad: bool


class LinearTopKOptions(_TopKOptions, TopKBatchOptions, total=False):
    """The keyword arguments of `topk_divergence_loss` that `linear_topk_divergence_loss` takes as they are."""


class FixedLinearPolicyOptions(_PolicyOptions, total=False):
    """What a module of `linear_policy_loss` fixes at construction."""

    logits_dtype: torch.dtype | None
    rows_per_chunk: int | None
    reduce_hidden_grad: bool


class LinearPolicyBatchOptions(PolicyBatchOptions, total=False):
    reference_hidden: Tensor | None
    reference_head: AnyHead | None


class LinearPolicyOptions(_PolicyOptions, _PolicyTensors, total=False):
    """The keyword arguments of `policy_loss` that `linear_policy_loss` takes as they are."""
