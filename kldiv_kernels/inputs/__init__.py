"""Checks and normalises the arguments of the public functions, once, above the backends.

Everything here costs O(tokens): the logits themselves are neither read nor copied. The values of labels, excluded
columns and parameters per token are checked on the CPU only, since a check waits for the device; KLDIV_CHECK_VALUES=1
brings it to every device. Unchecked, a label outside the vocabulary makes its row NaN, and nothing reads outside.
"""

from __future__ import annotations

from kldiv_kernels.inputs.call import operator_arguments, prepare, select, statistics
from kldiv_kernels.inputs.parameters import Parameter, alpha_and_beta_checked, of_a_kind
from kldiv_kernels.inputs.shift import shifted
from kldiv_kernels.inputs.tensors import (
    integers_checked,
    label_mask_checked,
    logits_checked,
    looks_at,
    mask_checked,
    may_look_at,
    normalizer_checked,
    per_token_checked,
    range_checked,
    shared_columns,
    valid_tokens,
    weight_checked,
)

__all__ = [
    "Parameter",
    "alpha_and_beta_checked",
    "integers_checked",
    "label_mask_checked",
    "logits_checked",
    "looks_at",
    "mask_checked",
    "may_look_at",
    "normalizer_checked",
    "of_a_kind",
    "operator_arguments",
    "per_token_checked",
    "prepare",
    "range_checked",
    "select",
    "shared_columns",
    "shifted",
    "statistics",
    "valid_tokens",
    "weight_checked",
]
