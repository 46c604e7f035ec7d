r"""OpenRLHF's policy loss on given log-probabilities, with its correction for another sampling policy.

With r = π/π_old of a token, A its advantage, ε the clips and c = dual_clip:

    ppo    −min(r·A, clip(r, 1−ε_low, 1+ε_high)·A), and at most −c·A where A < 0; log r is kept within ±20
    gspo   the same with r = exp(mean log r) of the sequence, aggregated as a mean over sequences

The correction of ppo multiplies by w = π_old/π_rollout, without gradient. A gate reads a statistic of each token, or
its mean over each sequence: w (over a sequence its geometric mean), the KL or the total variation between the two
policies' probabilities of the sampled token and of all others. Tokens or sequences whose statistic is outside of
[low, high] are dropped ("mask"), or w is kept within them ("clip"). In gspo, log r is taken to the rollout policy.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kldiv_kernels.policy import PolicyOptions, aggregate, resolve, token_losses

# OpenRLHF keeps probabilities within these, so that the logarithms of the binary KL are finite.
_LEAST, _MOST = 1e-6, 1 - 1e-6


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """The scalar of per-token losses [batch, tokens].

    Args:
        loss_mask: [batch, tokens], 0 for tokens that do not count.
        token_level_loss: True (default): the mean over the tokens. False: the mean over the sequences that have a
            token, of their means.
        batch_num_tokens, global_batch_size: how many tokens, or sequences, there are on all ranks. Default: those here.
        dp_size: the number of ranks that average their gradients; multiplies the loss where the number above is given.

    >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> aggregate_loss(losses, mask).item(), aggregate_loss(losses, mask, token_level_loss=False).item()
    (3.0, 3.5)
    """
    number = batch_num_tokens if token_level_loss else global_batch_size
    how = "token-mean" if token_level_loss else "seq-mean-token-mean"
    total = aggregate(loss, loss_mask != 0, how, number, count_empty=False)
    return total if number is None else total * dp_size


class _Correction(NamedTuple):
    weight: Tensor
    kl: Tensor
    filtered: Tensor


class PolicyLoss(nn.Module):
    """The policy loss of OpenRLHF's actors; `forward` returns (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio).

    Args:
        clip_eps_low, clip_eps_high: how far below and above 1 the ratio may go. Default 0.2.
        dual_clip: above 1; bounds the loss where the advantage is negative. Default None: no bound.
        token_level_loss: see `aggregate_loss`; gspo is always a mean over sequences.
        policy_loss_type: "ppo" (default) or "gspo".
        is_correction_level: "off" (default), "token" or "seq": of what the correction reads a statistic.
        is_correction_mode: "mask" (default), or "clip", which goes with the level "token" and the gating "ratio" alone.
        is_correction_gating: "ratio" (default), "binary_kl" or "tv": the statistic.
        is_correction_threshold: (low, high). Default (0.5, 5). For a divergence low is 0.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.

    >>> old, new, ones = torch.zeros(1, 2), torch.tensor([[0.0, 0.5]]), torch.ones(1, 2)
    >>> loss, clip_ratio, kl, _, _ = PolicyLoss()(new, old, ones, ones)
    >>> round(loss.item(), 4), clip_ratio.item(), kl.item()
    (-1.1, 0.5, -0.25)
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        choices = {
            "policy_loss_type": (policy_loss_type, ("ppo", "gspo")),
            "is_correction_level": (is_correction_level, ("off", "token", "seq")),
            "is_correction_mode": (is_correction_mode, ("mask", "clip")),
            "is_correction_gating": (is_correction_gating, ("ratio", "binary_kl", "tv")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"PolicyLoss: {name} is {value!r}; expected {', '.join(allowed)}")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(f"PolicyLoss: dual_clip is {dual_clip!r}; expected a number above 1, or None")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                f"PolicyLoss: is_correction_mode is 'clip' with the level {is_correction_level!r} and the gating "
                f"{is_correction_gating!r}; expected the level 'token' and the gating 'ratio'"
            )
        if is_correction_level != "off" and is_correction_gating != "ratio" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"PolicyLoss: is_correction_threshold is {is_correction_threshold!r}; expected a lower bound of 0 for "
                f"the gating {is_correction_gating!r}"
            )
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold
        self._options = self._resolved()

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of tensors [batch, tokens]; log_probs gets the gradient.

        Args:
            action_mask: 0 for tokens that do not count. Default: all count.
            rollout_log_probs: of the policy that sampled; needed with a correction.
            dp_size, batch_num_tokens, global_batch_size: see `aggregate_loss`.

        Returns:
            The loss; the share of tokens whose gradient the clip took; the mean of log π_old − log π. With a correction
            of ppo also the mean of log π_rollout − log π_old and the share of what was dropped or clipped, of the
            sequences at the level "seq"; otherwise None. Only the loss has a gradient.

        Raises:
            ValueError: naming the argument, what it was and what is allowed.
        """
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise ValueError(
                f"PolicyLoss: rollout_log_probs is None; expected log-probabilities, since is_correction_level is "
                f"{self.is_correction_level!r}"
            )
        given = {"old_log_probs": old_log_probs, "advantages": advantages}
        for name, tensor in {**given, "action_mask": action_mask, "rollout_log_probs": rollout_log_probs}.items():
            if tensor is not None and tensor.shape != log_probs.shape:
                raise ValueError(
                    f"PolicyLoss: {name} has shape {list(tensor.shape)}; expected {list(log_probs.shape)}, as log_probs"
                )
        valid = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
        # What a masked token holds, NaN or not, must not reach a sum or a gradient.
        logprob, old, advantages = (torch.where(valid, x, 0.0) for x in (log_probs, old_log_probs, advantages))
        rollout = None if rollout_log_probs is None else torch.where(valid, rollout_log_probs.detach(), 0.0)
        old, advantages, anchor, correction = old.detach(), advantages.detach(), old.detach(), None
        if corrected and rollout is not None:
            if self.policy_loss_type == "gspo":
                anchor = rollout
            else:
                correction = self._correction(old, rollout, valid)
        losses = token_losses(
            logprob, anchor, advantages, valid, self._options, weight=None if correction is None else correction.weight
        )
        numbers = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}
        loss = aggregate_loss(losses.per_token, valid, self.token_level_loss, dp_size, **numbers)
        with torch.no_grad():
            clipped = losses.clipped["low"] | losses.clipped["high"]
            clip_ratio, kl = _mean(clipped, valid), _mean(old - logprob, valid)
        if correction is None:
            return loss, clip_ratio, kl, None, None
        return loss, clip_ratio, kl, correction.kl, correction.filtered

    def _resolved(self) -> PolicyOptions:
        given: dict[str, Any] = {
            "loss_type": "dapo" if self.policy_loss_type == "ppo" else "gspo",
            "clip_low": self.clip_eps_low,
            "clip_high": self.clip_eps_high,
            "dual_clip": math.inf if self.dual_clip is None else self.dual_clip,
            "log_ratio_clamp": 20.0 if self.policy_loss_type == "ppo" else math.inf,
        }
        return resolve("PolicyLoss", None, given)

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, valid: Tensor) -> _Correction:
        low, high = self.is_correction_threshold
        by_sequence = self.is_correction_level == "seq"
        log_weight = old - rollout
        # A statistic of each token [batch, tokens], or of each sequence [batch, 1].
        statistic = log_weight if self.is_correction_gating == "ratio" else self._divergence(old, rollout)
        if by_sequence:
            statistic = torch.where(valid, statistic, 0.0).sum(-1, True) / valid.sum(-1, True).clamp_min(1)
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        outside = (statistic < low) | (statistic > high)
        weight = log_weight.exp()
        weight = weight.clamp(low, high) if self.is_correction_mode == "clip" else torch.where(outside, 0.0, weight)
        filtered = _mean(outside, valid.any(-1, True)) if by_sequence else _mean(outside, valid)
        return _Correction(weight, _mean(-log_weight, valid), filtered)

    def _divergence(self, old: Tensor, rollout: Tensor) -> Tensor:
        p, q = (x.exp().clamp(_LEAST, _MOST) for x in (rollout, old))
        if self.is_correction_gating == "tv":
            return (p - q).abs()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Over what is valid; 0 where nothing is."""
    # The dtype of sums: a bool or a half has too few digits for a count.
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(valid, values, 0).sum(dtype=dtype) / valid.sum().clamp_min(1)
