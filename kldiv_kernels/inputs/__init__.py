"""Checks and normalises the arguments of the public functions, once, above the backends.

Everything here costs O(tokens): the logits themselves are neither read nor copied. Values on the device (labels,
excluded columns, parameters per token) are checked too, which waits for the device; not where `may_look_at` says no.
"""

from __future__ import annotations

from kldiv_kernels.inputs.call import operator_arguments, prepare, select, statistics
from kldiv_kernels.inputs.parameters import Parameter, alpha_and_beta_checked, of_a_kind
from kldiv_kernels.inputs.shift import shifted
from kldiv_kernels.inputs.tensors import (
    label_mask_checked,
    logits_checked,
    mask_checked,
    may_look_at,
    normalizer_checked,
    per_token_checked,
    shared_columns,
    valid_tokens,
    weight_checked,
)

__all__ = [
    "Parameter",
    "alpha_and_beta_checked",
    "label_mask_checked",
    "logits_checked",
    "mask_checked",
    "may_look_at",
    "normalizer_checked",
    "of_a_kind",
    "operator_arguments",
    "per_token_checked",
    "prepare",
    "select",
    "shared_columns",
    "shifted",
    "statistics",
    "valid_tokens",
    "weight_checked",
]
