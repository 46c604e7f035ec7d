"""The call signatures of Liger-Kernel 0.8.5's divergences, GRPO loss and log-probabilities. Liger is not needed.

A ValueError that Liger raises too begins with this package's name of the function and goes on in Liger's words.

What differs from Liger:

- A column or token of probability 0 on both sides adds 0, not NaN, and rows whose label is ignored are not looked at.
- Without a valid row the loss is 0 (Liger's TVD divides by zero).
- Losses are float32 (float64 for float64 inputs), whatever the inputs' dtype; so is all arithmetic.
- Strided rows are read where they are. Nothing waits for the device, and no argument is ever written to.
- The weight of vespo takes `vllm_is_ratio` over the valid tokens; Liger's over padding too.
- luspo is mean_b Σ_t loss, as in TRL; Liger multiplies by the length once more and averages over the padding.
- The normaliser of dapo, cispo and vespo is the number of tokens of the call when `num_items_in_batch` is not given;
  Liger sums it over the default process group.
"""

from __future__ import annotations

from kldiv_kernels.adapters.liger.divergences import (
    LigerJSD,
    LigerKLDIVLoss,
    LigerTVDLoss,
    liger_jsd,
    liger_kl_div,
    liger_tvd,
)
from kldiv_kernels.adapters.liger.grpo import triton_grpo_loss
from kldiv_kernels.adapters.liger.logprobs import fused_selective_log_softmax

__all__ = [
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
    "fused_selective_log_softmax",
    "liger_jsd",
    "liger_kl_div",
    "liger_tvd",
    "triton_grpo_loss",
]
