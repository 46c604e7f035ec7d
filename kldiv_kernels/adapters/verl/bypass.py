r"""verl's loss bypass_mode: the losses of data whose old policy is the one that sampled it.

With old_log_prob = log μ of the rollout and r = π/μ, verl's rollout correction says which tokens count (its rejection,
rollout_rs) and what they weigh (its truncated r, rollout_is); then

    ppo_clip    the loss vanilla on those tokens. Its ratio is r already: no weights
    reinforce   −sg[weight]·A·log π on those tokens
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.adapters.config import read
from kldiv_kernels.adapters.verl.policy import TOKEN_LOSSES, check

_LOSSES = {"ppo_clip": "vanilla", "reinforce": "gpg"}
# What verl's loss reads for its correction, and what counts where the configuration has no such entry. A threshold of
# None, which is another thing, turns the weights off.
_CORRECTION = {
    "rollout_is": None, "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": False, "rollout_rs": None,
    "rollout_rs_threshold": None,
}  # fmt: skip


def bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's policy loss 'bypass_mode': all [batch, tokens]; (scalar loss, metrics as floats).

    Args:
        old_log_prob: log-probabilities under the policy that sampled the tokens.
        config: its `policy_loss.rollout_correction` has loss_type, "ppo_clip" (default) or "reinforce", and the
            arguments of verl's `compute_rollout_correction_and_rejection_mask`, which is called.
        rollout_is_weights: no effect, as in verl: the weights are made here.

    Raises:
        ImportError: verl is not there. ValueError, TypeError: naming the argument, what it was and what is allowed.
    """
    where = "compute_policy_loss_bypass_mode"
    check(where, log_prob, {"old_log_prob": old_log_prob, "response_mask": response_mask}, config)
    correction = read(read(config, "policy_loss"), "rollout_correction")
    if correction is None:
        raise ValueError(f"{where}: config.policy_loss.rollout_correction is None; expected verl's configuration of it")
    loss_type = read(correction, "loss_type", "ppo_clip")
    if loss_type not in _LOSSES:
        raise ValueError(
            f"{where}: config.policy_loss.rollout_correction.loss_type is {loss_type!r}; expected "
            f"{' or '.join(_LOSSES)}"
        )
    entry = correction.get if hasattr(correction, "get") else partial(getattr, correction)
    given = {name: entry(name, default) for name, default in _CORRECTION.items()}
    mask, weights, logged = _corrected(where, old_log_prob, log_prob, response_mask, given)
    loss, metrics = TOKEN_LOSSES[_LOSSES[loss_type]](
        old_log_prob, log_prob, advantages, mask, loss_agg_mode, config, weights if loss_type == "reinforce" else None
    )
    if loss_type == "reinforce":
        with torch.no_grad():
            drift = torch.where(mask != 0, old_log_prob - log_prob, 0.0)
            metrics = {"actor/ppo_kl": (drift.sum() / (mask != 0).sum().clamp_min(1)).item()}
    return loss, {**metrics, **logged}


def _corrected(
    where: str, rollout: Tensor, log_prob: Tensor, response_mask: Tensor, given: dict[str, Any]
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """The mask without the rejected tokens, the weights or None, and what verl logs of both."""
    try:
        from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    except ImportError as error:
        raise ImportError(
            f"{where}: verl.trainer.ppo.rollout_corr_helper cannot be imported ({error}); expected verl 0.9.1 in this "
            f"environment, which makes the weights and the rejection. The other losses work without it"
        ) from error
    valid = response_mask != 0
    if not valid.any():
        return response_mask, None, {}
    now, before = (torch.where(valid, x.detach(), 0.0) for x in (log_prob, rollout))
    weights, mask, metrics = compute_rollout_correction_and_rejection_mask(
        old_log_prob=now, rollout_log_prob=before, response_mask=response_mask, **given
    )
    return mask, None if weights is None else weights.batch["rollout_is_weights"], metrics
