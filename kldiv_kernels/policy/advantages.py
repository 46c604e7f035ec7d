"""Advantages from the rewards of groups of samples of one prompt.

`groups` [B] holds one integer a sample, any values in any order; samples with the same integer form a group. Everything
runs on the rewards' device, without a loop over groups, and without gradient, in float64 and on differences from a
reward of the group: equal rewards have advantages of exactly 0, whatever their dtype and number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.groups import centre, extreme, numbered, sums, unbiased_variance


def group_relative(rewards: Tensor, groups: Tensor, *, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO: (reward − mean of its group) / (standard deviation of its group + eps).

    Args:
        rewards: [B] floating point. groups: [B] integers.
        scale: False leaves the division out (Dr. GRPO, arXiv 2503.20783).
        eps: added to the standard deviation, which is unbiased; 1e-4 in TRL, 1e-6 in verl.

    Returns [B], in the rewards' dtype; 0 in a group of one. Raises ValueError, TypeError naming the argument.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.group_relative(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([7, 7, 2, 2])).round(decimals=2)
    tensor([ 0.7100, -0.7100,  0.0000,  0.0000])
    """
    _check("group_relative", rewards, groups)
    index = numbered(groups)
    centred, count = centre(rewards, index)
    if scale:
        centred = centred / (unbiased_variance(centred, count, index).sqrt() + eps)
    return centred.to(rewards.dtype)


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): reward − mean reward of the other samples of its group; 0 in a group of one.

    Args, result, errors: see `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.rloo(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 0]))
    tensor([-1.5000, -3.0000,  4.5000])
    """
    _check("rloo", rewards, groups)
    centred, count = centre(rewards, numbered(groups))
    return (centred * count / (count - 1).clamp_min(1)).to(rewards.dtype)


def leave_one_out(rewards: Tensor, groups: Tensor, *, eps: float = 1e-6) -> Tensor:
    """RLOO divided by the unbiased standard deviation of the others (+ eps), as in NeMo-RL.

    Where the others all have the same reward, or there are fewer than two, the advantage is not scaled.
    Args, result, errors: see `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.leave_one_out(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 0])).round(decimals=2)
    tensor([ 0.0000, -2.1200,  2.1200])
    """
    _check("leave_one_out", rewards, groups)
    index = numbered(groups)
    centred, count = centre(rewards, index)
    others = (count - 1).clamp_min(1)
    # With c the centred rewards, Σ c = 0: the others' mean is −c/(n − 1), their squares sum to Σ c² − c² − c²/(n − 1).
    mean = -centred / others
    squares = sums(centred.square(), index)[index] - centred.square() - others * mean.square()
    variance = squares / (others - 1).clamp_min(1)
    # That is at least a quarter of the largest c², but where the sample with that c² is left out: there it may be
    # rounding, and the others are summed by themselves.
    farthest = _farthest(centred, index)
    of_rest = unbiased_variance(*centre(rewards, index, ~farthest), index)
    variance = torch.where(farthest, of_rest, variance)
    advantage = centred - mean
    scaled = advantage / (variance.sqrt() + eps)
    return torch.where((variance > 0) & (count > 2), scaled, advantage).to(rewards.dtype)


def reinforce_plus_plus(
    rewards: Tensor, groups: Tensor | None = None, mask: Tensor | None = None, *, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): rewards centred in their group, then normalised over the batch.

    Args:
        rewards: [B]. groups: [B] integers; None leaves the group's mean in (REINFORCE++ without baseline).
        mask: [B, T] bool or integers; then mean and variance are over its tokens, so that a long sequence counts more
            (as in verl and OpenRLHF), and the result is [B, T], 0 where masked. None: over sequences.
        eps: added to the unbiased variance.

    Returns [B], or [B, T] with a mask; 0 if there are fewer than two samples (tokens). Raises as `group_relative`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.advantages.reinforce_plus_plus(torch.tensor([1.0, 0.0, 5.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ 0.5477, -0.5477,  1.0954, -1.0954])
    """
    _check("reinforce_plus_plus", rewards, groups)
    returns = rewards.detach().double() if groups is None else centre(rewards, numbered(groups))[0]
    kept = torch.ones_like(returns, dtype=torch.bool)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != rewards.shape[0] or mask.is_floating_point():
            raise ValueError(
                f"reinforce_plus_plus: mask is {mask.dtype} {list(mask.shape)}; expected bool or integers "
                f"[{rewards.shape[0]}, tokens]"
            )
        kept = mask != 0
        returns = returns[:, None].expand(mask.shape)
    all_one = torch.zeros(kept.numel(), dtype=torch.int64, device=kept.device)
    centred, count = centre(returns.reshape(-1), all_one, kept.reshape(-1))
    variance = unbiased_variance(centred, count, all_one)
    if groups is not None and mask is None:
        # Their mean is 0 but for rounding.
        centred = returns
    return (centred * (variance + eps).rsqrt()).reshape(kept.shape).to(rewards.dtype)


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
