"""Advantages from the rewards of groups of samples of one prompt.

`groups` [B] holds one integer a sample, any values in any order; samples with the same integer form a group. Everything
runs on the rewards' device, without a loop over groups, and without gradient, in float64 and on differences from a
reward of the group: equal rewards have advantages of exactly 0, whatever their dtype and number.

`batch_group` makes one batch of the samples of several ranks, whose numbers B may differ: samples with the same integer
are one group on whichever rank they lie, and each rank gets the advantages of its own. The rewards, groups and lengths
of all ranks are gathered, 24 bytes a sample padded to the longest rank, for which the host waits. Every rank has to
call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.groups import centre, extreme, numbered, sums, unbiased_variance
from kldiv_kernels.parallel import Group, agree_in, concatenated, group_checked, together


@together
def group_relative(
    rewards: Tensor,
    groups: Tensor,
    *,
    scale: bool | Literal["batch"] = True,
    eps: float = 1e-4,
    batch_group: Group | None = None,
) -> Tensor:
    """GRPO: (reward − mean of its group) / (standard deviation of its group + eps).

    Args:
        rewards: [B] floating point. groups: [B] integers.
        scale: False leaves the division out (Dr. GRPO, arXiv 2503.20783). "batch": by the standard deviation of all
            rewards in place of the group's (arXiv 2508.08221; TRL's scale_rewards="batch").
        eps: added to the standard deviation, which is unbiased; 1e-4 in TRL, 1e-6 in verl.
        batch_group: the ranks whose samples are one batch; see the module. Default: this rank's alone.

    Returns [B], in the rewards' dtype; 0 in a group of one. Raises ValueError, TypeError naming the argument.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.group_relative(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([7, 7, 2, 2])).round(decimals=2)
    tensor([ 0.7100, -0.7100,  0.0000,  0.0000])
    """
    if scale not in (True, False, "batch"):
        raise ValueError(f"group_relative: scale is {scale!r}; expected True, False or 'batch'")
    _check("group_relative", rewards, groups)
    batch = _whole_batch("group_relative", rewards, groups, batch_group)
    index = numbered(batch.groups)
    centred, count = centre(batch.rewards, index)
    if scale:
        of, number, among = centred, count, index
        if scale == "batch":
            among = torch.zeros_like(index)
            of, number = centre(batch.rewards, among)
        centred = centred / (unbiased_variance(of, number, among).sqrt() + eps)
    return centred[batch.own].to(rewards.dtype)


@together
def rloo(rewards: Tensor, groups: Tensor, *, batch_group: Group | None = None) -> Tensor:
    """RLOO (arXiv 2402.14740): reward − mean reward of the other samples of its group; 0 in a group of one.

    Args, result, errors: see `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.rloo(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 0]))
    tensor([-1.5000, -3.0000,  4.5000])
    """
    _check("rloo", rewards, groups)
    batch = _whole_batch("rloo", rewards, groups, batch_group)
    centred, count = centre(batch.rewards, numbered(batch.groups))
    return (centred * count / (count - 1).clamp_min(1))[batch.own].to(rewards.dtype)


@together
def leave_one_out(rewards: Tensor, groups: Tensor, *, eps: float = 1e-6, batch_group: Group | None = None) -> Tensor:
    """RLOO divided by the unbiased standard deviation of the others (+ eps), as in NeMo-RL.

    Where the others all have the same reward, or there are fewer than two, the advantage is not scaled.
    Args, result, errors: see `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.leave_one_out(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 0])).round(decimals=2)
    tensor([ 0.0000, -2.1200,  2.1200])
    """
    _check("leave_one_out", rewards, groups)
    batch = _whole_batch("leave_one_out", rewards, groups, batch_group)
    index = numbered(batch.groups)
    centred, count = centre(batch.rewards, index)
    others = (count - 1).clamp_min(1)
    # With c the centred rewards, Σ c = 0: the others' mean is −c/(n − 1), their squares sum to Σ c² − c² − c²/(n − 1).
    mean = -centred / others
    squares = sums(centred.square(), index)[index] - centred.square() - others * mean.square()
    variance = squares / (others - 1).clamp_min(1)
    # That is at least a quarter of the largest c², but where the sample with that c² is left out: there it may be
    # rounding, and the others are summed by themselves.
    farthest = _farthest(centred, index)
    of_rest = unbiased_variance(*centre(batch.rewards, index, ~farthest), index)
    variance = torch.where(farthest, of_rest, variance)
    advantage = centred - mean
    scaled = advantage / (variance.sqrt() + eps)
    return torch.where((variance > 0) & (count > 2), scaled, advantage)[batch.own].to(rewards.dtype)


@together
def reinforce_plus_plus(
    rewards: Tensor,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-8,
    batch_group: Group | None = None,
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): rewards centred in their group, then normalised over the batch.

    Args:
        rewards: [B]. groups: [B] integers; None leaves the group's mean in (REINFORCE++ without baseline).
        mask: [B, T] bool or integers; then mean and variance are over its tokens, so that a long sequence counts more
            (as in verl and OpenRLHF), and the result is [B, T], 0 where masked. None: over sequences.
        eps: added to the unbiased variance.
        batch_group: see `group_relative`; groups and mask are then given by all ranks or by none.

    Returns [B], or [B, T] with a mask; 0 if there are fewer than two samples (tokens). Raises as `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.reinforce_plus_plus(torch.tensor([1.0, 0.0, 5.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.5477, -0.5477,  1.0954, -1.0954])
    """
    _check("reinforce_plus_plus", rewards, groups)
    length = None
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != rewards.shape[0] or mask.is_floating_point():
            raise ValueError(
                f"reinforce_plus_plus: mask is {mask.dtype} {list(mask.shape)}; expected bool or integers "
                f"[{rewards.shape[0]}, tokens]"
            )
        length = (mask != 0).sum(-1)
    batch = _whole_batch("reinforce_plus_plus", rewards, groups, batch_group, length)
    returns = batch.rewards if groups is None else centre(batch.rewards, numbered(batch.groups))[0]
    # Each sample counts as often as it has tokens.
    times, kept, one = batch.lengths.double(), batch.lengths > 0, torch.zeros_like(batch.groups)
    above = torch.where(kept, returns - extreme(torch.where(kept, returns, torch.inf), one, "amin"), 0.0)
    count = times.sum()
    centred = torch.where(kept, above - (times * above).sum() / count.clamp_min(1), 0.0)
    variance = (times * centred.square()).sum() / (count - 1).clamp_min(1)
    if groups is not None and mask is None:
        # Their mean is 0 but for rounding.
        centred = returns
    advantage = (centred * (variance + eps).rsqrt())[batch.own].to(rewards.dtype)
    return advantage if mask is None else torch.where(mask != 0, advantage[:, None], 0.0)


@together
def with_variance(rewards: Tensor, groups: Tensor, *, batch_group: Group | None = None) -> Tensor:
    """Bool [B]: the samples of groups whose rewards differ; the others have advantages of 0 (DAPO, arXiv 2503.14476).

    With `mask & kept[:, None]` as its mask `policy_loss` divides by the tokens of the kept samples alone.
    Args, errors: see `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.with_variance(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([7, 7, 2, 2]))
    tensor([ True,  True, False, False])
    """
    _check("with_variance", rewards, groups)
    batch = _whole_batch("with_variance", rewards, groups, batch_group)
    index = numbered(batch.groups)
    lowest, highest = (extreme(batch.rewards, index, which) for which in ("amin", "amax"))
    return (lowest != highest)[batch.own]


@dataclass(frozen=True)
class _Batch:
    """The samples of all ranks, [B] each: float64, int64, int64. own: which of them are this rank's."""

    rewards: Tensor
    groups: Tensor
    lengths: Tensor
    own: slice


def _whole_batch(
    where: str,
    rewards: Tensor,
    groups: Tensor | None,
    batch_group: Group | None,
    lengths: Tensor | None = None,
) -> _Batch:
    """groups None: one; lengths None: 1 each."""
    rewards = rewards.detach().double()
    groups = torch.zeros_like(rewards, dtype=torch.int64) if groups is None else groups.long()
    lengths = torch.ones_like(groups) if lengths is None else lengths
    ranks = group_checked(where, "batch_group", batch_group)
    agree_in("batch_group", ranks, where, rewards)
    # The bits of the rewards, so that all three travel together.
    table, own = concatenated(torch.stack([rewards.view(torch.int64), groups, lengths]), ranks)
    return _Batch(table[0].contiguous().view(torch.float64), table[1], table[2], own)


def _check(where: str, rewards: Tensor, groups: Tensor | None) -> None:
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        kind = rewards.dtype if isinstance(rewards, Tensor) else type(rewards).__name__
        raise TypeError(f"{where}: rewards is {kind}; expected a floating-point torch.Tensor")
    if rewards.dim() != 1:
        raise ValueError(f"{where}: rewards has shape {list(rewards.shape)}; expected [B], one a sample")
    if groups is None:
        return
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.dtype == torch.bool:
        kind = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"{where}: groups is {kind}; expected a torch.Tensor of integers")
    if groups.shape != rewards.shape or groups.device != rewards.device:
        raise ValueError(
            f"{where}: groups has shape {list(groups.shape)} on {groups.device}; expected {list(rewards.shape)} on "
            f"{rewards.device} like rewards"
        )


def _farthest(centred: Tensor, index: Tensor) -> Tensor:
    """[B] bool: in each group, the first of those with the largest |centred|."""
    size, place = centred.abs(), torch.arange(centred.numel(), device=centred.device)
    candidates = size == extreme(size, index, "amax")
    return place == extreme(torch.where(candidates, place, centred.numel()), index, "amin")
