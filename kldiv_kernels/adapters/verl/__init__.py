"""The call signatures of verl 0.9.1's losses, and `register` for its registry.

Only `register` and the loss bypass_mode need verl.

`POLICY_LOSSES` are the policy losses by verl's names, `agg_loss` their aggregation. `logprobs_from_logits` and
`entropy_from_logits` stand for those of `verl.utils.torch_functional`: verl has no registry for them, so assign them to
their module before others import the names from there. `compute_forward_kl_topk` stands for that of
`verl.trainer.distillation.fsdp.losses`, `megatron.compute_forward_kl_topk` for that of
`verl.trainer.distillation.megatron.losses`, whose logits are columns of the vocabulary; `register` puts both in place.

Every loss is tested beside verl 0.9.1's own. verl 0.7 to 0.9.0 have the same signatures; up to 0.9.0, their gspo takes
the mean over sequences of the mean over tokens whatever `loss_agg_mode` says, and dro came with 0.9.0.

What differs from verl:

- Masked tokens are not looked at, NaN or not, and a batch without a valid token has loss 0, not 0/0.
- Statistics of the logits are float32, for bfloat16 logits too, and the logits are never written to.
- clip_cov draws its tokens from the device's random numbers. In geo_mean a token with advantage 0 beside others that
  have one keeps its log-ratio, unless that is below −clip_ratio_low; in verl it counts as ratio 1.
- `actor/pg_clipfrac` of dppo_tv and dppo_kl does not count tokens with advantage 0, which have no gradient to lose.
- A top-k entry without teacher probability adds 0, not NaN. In `overlap_count` a tie with the student's k-th logit is
  inside its top k.
"""

from __future__ import annotations

from kldiv_kernels.adapters.verl.aggregation import agg_loss
from kldiv_kernels.adapters.verl.logits import compute_forward_kl_topk, entropy_from_logits, logprobs_from_logits
from kldiv_kernels.adapters.verl.registration import POLICY_LOSSES, register

__all__ = [
    "POLICY_LOSSES",
    "agg_loss",
    "compute_forward_kl_topk",
    "entropy_from_logits",
    "logprobs_from_logits",
    "register",
]
