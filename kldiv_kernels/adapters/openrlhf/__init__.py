"""Functions and losses of OpenRLHF 0.11.2 under its names and signatures. Only `register` needs OpenRLHF.

`log_probs_from_logits` and `compute_entropy` stand for those of `openrlhf.models.utils`, `PolicyLoss` and
`aggregate_loss` for those of `openrlhf.models.loss`. `register` puts the first three in the place of OpenRLHF's.
`KDLoss` is the one of OpenRLHF 0.9, which later versions no longer have.

What differs from OpenRLHF:

- The logits are never written to. OpenRLHF divides them in place by a temperature that is not 1.
- Log-probabilities and entropies are float32 for bfloat16 and float16 logits too. A column at −inf has no share in an
  entropy; in OpenRLHF it makes it NaN. A label of −100 has the log-probability 0.
- `PolicyLoss` does not look at masked tokens, NaN or not. A batch without a token has the loss 0, not 0/0. A sequence
  without a token is not counted in `is_filter_ratio`.
- `KDLoss` is the divergence: 0 where student and teacher agree. OpenRLHF's is the cross-entropy −Σ p log q, which is
  larger by the teacher's entropy; the gradients are the same. A token that the teacher has and the student excludes by
  a logit of −inf makes it infinite; OpenRLHF leaves that column out. Without a label that counts it is 0, not 0/0.
"""

from __future__ import annotations

from kldiv_kernels.adapters.openrlhf.logits import KDLoss, compute_entropy, log_probs_from_logits
from kldiv_kernels.adapters.openrlhf.policy import PolicyLoss, aggregate_loss
from kldiv_kernels.adapters.openrlhf.registration import register

__all__ = ["KDLoss", "PolicyLoss", "aggregate_loss", "compute_entropy", "log_probs_from_logits", "register"]
