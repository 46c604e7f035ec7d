"""Losses in the form of torchtitan 0.3: a class with a nested `Config`, and its functions of logits.

    from kldiv_kernels.adapters.torchtitan import CrossEntropyLoss
    Trainer.Config(loss=CrossEntropyLoss.Config(global_vocab_size=...), ...)

`CrossEntropyLoss` and `cross_entropy_loss` are torchtitan's of these names. `compute_logprobs` is what its RL losses
take their log-probabilities and entropies from; `register` puts ours in its place. `DistillationLoss` has no
counterpart there: every divergence of this library from a teacher's logits, one more argument of the call.

How they compose. Tensor parallel: logits are this rank's columns, torchtitan's split of `global_vocab_size`; the group
is that of the logits' DTensor, or torchtitan's current mesh, or `tp_group`. All ranks of it get the same loss, and no
rank has whole rows, also where torchtitan gathers them. FSDP, context parallel, accumulation: losses are sums of the
tokens here, divided by `global_valid_tokens`. Chunks (`ChunkedLossWrapper`): as its `loss_fn`.

Where torchtitan is installed the classes are subclasses of its `BaseLoss`; without it they work alone. Type checks of
its spmd_types (off by default) do not know these losses.

What differs from torchtitan: bfloat16 logits are read as they are, without a copy in float32; ranks without columns are
allowed; `compile_config` has no effect, because nothing is left to fuse; `compute_logprobs` keeps the logits sharded.
"""

from __future__ import annotations

from kldiv_kernels.adapters.torchtitan.functions import compute_logprobs, cross_entropy_loss, distillation_loss
from kldiv_kernels.adapters.torchtitan.losses import CrossEntropyLoss, DistillationLoss
from kldiv_kernels.adapters.torchtitan.registration import register

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "compute_logprobs",
    "cross_entropy_loss",
    "distillation_loss",
    "register",
]
