"""What an option may be, as types. Without PyTorch, so that the command line's help needs none."""

from __future__ import annotations

from typing import Literal

# The built-in kinds; `register_statistic` adds others, so that a function's `kind` is one of these or any str.
DivergenceKind = Literal[
    "cross_entropy", "forward_kl", "reverse_kl", "jeffreys", "js", "skew_kl", "skew_reverse_kl", "hellinger", "tvd",
    "forward_chi2", "reverse_chi2", "triangular", "alpha", "renyi", "alpha_beta", "cauchy_schwarz",
]  # fmt: skip
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "cpu", "cuda", "triton", "reference"]

# Top-k: what becomes of the other tokens, and whose tokens are taken.
Tail = Literal["bucket", "renormalize", "renormalize_teacher", "none"]
Support = Literal["teacher", "student", "union"]

# Policy losses.
LossType = Literal[
    "grpo", "bnpo", "dr_grpo", "dapo", "luspo", "gspo", "cispo", "sapo", "vespo", "gmpo", "reinforce", "topr",
    "dppo_tv", "dppo_kl",
]  # fmt: skip
Preset = Literal["trl", "verl", "nemo_rl"]
ImportanceLevel = Literal["token", "sequence", "sequence_sum"]
CovSelection = Literal["none", "clip", "kl"]
OffPolicy = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
SampledKL = Literal["k1", "k2", "k3", "abs", "k3_plus"]
ExactKL = Literal["forward_kl", "reverse_kl", "js", "hellinger"]
KLEstimator = Literal[SampledKL, ExactKL]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]
EntropyAggregation = Literal["loss", "token-mean"]
