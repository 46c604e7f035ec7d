"""A batch of which each of four ranks has some samples: selections and advantages are those of the whole."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import policy_oracle as oracle
import pytest
import torch
from packed_policy import tensors_of
from torch import Tensor, distributed

import kldiv_kernels as kk
from kldiv_kernels import advantages
from kldiv_kernels.parallel import at_positions, largest

# Sequences of [5, 6]; the second rank has none.
ROWS = (slice(0, 2), slice(2, 2), slice(2, 4), slice(4, 5))
SELECTIONS: dict[str, dict[str, Any]] = {
    "quantile": {"entropy_quantile": 0.45},
    "quantile of few": {"entropy_quantile": 0.2, "off_policy_threshold": 0.1},
    "kl_cov": {"cov_selection": "kl", "cov_fraction": 0.25},
    "kl_cov of one": {"cov_selection": "kl", "cov_fraction": 1e-4, "clip_low": 1.0, "clip_high": float("inf")},
    "clip_cov": {"cov_selection": "clip", "cov_fraction": 0.2, "cov_bounds": (-0.5, 0.7)},
    "both": {"cov_selection": "kl", "cov_fraction": 0.5, "entropy_quantile": 0.5},
}
# Numbers of 14 tokens, of which the ranks have some; the second rank has none.
SIZES = (5, 0, 6, 3)
NUMBERS = {
    "distinct": [0.5, -3.25, 7.0, 1e-30, -1e30, 2.0, 3.5, -0.125, 11.0, 0.25, 5.0, -8.0, 1e10, 6.5],
    "equal": [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 2.0, 2.0, 2.0, 1.0],
    "extremes": [
        math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, math.inf, -0.0, 1.0000001, 1.0, -math.inf,
    ],
}  # fmt: skip


def case_selections_are_those_of_the_whole_batch(rank: int, world: int) -> None:
    for i, name in enumerate(SELECTIONS):
        batch, own = oracle.batch(), ROWS[rank]
        # Equal tokens: their entropies and covariances are equal too, across ranks.
        for x in (batch.logits, batch.token_ids, batch.advantages, batch.old):
            x[4, 0], x[0, 1] = x[2, 0], x[2, 0]
        batch.mask[[0, 2, 4], [1, 0, 0]] = True
        keys = torch.rand(5, 6, dtype=torch.float64)
        options = {"loss_type": "dapo", "entropy_coef": 0.1, "normalizer": 20.0, **SELECTIONS[name]}
        options["temperature"] = 0.7 if i % 2 else 1.0
        tensors = tensors_of(batch)
        mine = {key: x[own] for key, x in tensors.items()}
        whole = batch.logits.clone().requires_grad_()
        logits = batch.logits[own].clone().requires_grad_()
        given = (logits, batch.token_ids[own], batch.advantages[own])
        with mock.patch.object(torch, "rand_like", lambda x, keys=keys, own=own: keys if len(x) == 5 else keys[own]):
            wanted = kk.policy_loss(whole, batch.token_ids, batch.advantages, **tensors, **options)
            out = kk.policy_loss(*given, batch_group=distributed.group.WORLD, **mine, **options)
            alone = kk.policy_loss(*given, **mine, **options)
        losses = torch.stack([out.loss.detach(), alone.loss.detach()])
        distributed.all_reduce(losses)
        assert losses[0].item() == pytest.approx(wanted.loss.item(), rel=1e-11, abs=1e-12), name
        assert losses[1].item() != pytest.approx(wanted.loss.item(), rel=1e-6), name
        torch.testing.assert_close(out.per_token_loss, wanted.per_token_loss[own], rtol=1e-11, atol=1e-12)
        expected, got = torch.autograd.grad(wanted.loss, whole)[0], torch.autograd.grad(out.loss, logits)[0]
        torch.testing.assert_close(got, expected[own], rtol=0, atol=1e-11 * expected.abs().max().item())


def case_advantages_of_groups_across_ranks(rank: int, world: int) -> None:
    """One group has no variance, one is a sample, and a rank has no sample at all."""
    sizes = [4, 0, 6, 1]
    groups = torch.tensor([3, -7, 3, 5, 3, 2**40, 5, -7, -7, 9, 5])
    numbers = torch.tensor([1.0, 0.7, 1.0, 2.0, 0.25, 4.0, 3.5, 0.7, 0.7, 0.5, -1.0])
    mask = torch.rand(11, 5) < 0.6
    mask[6] = False

    def own(x: Tensor) -> Tensor:
        return x.split(sizes)[rank]

    group = distributed.group.WORLD
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        rewards = numbers.to(dtype)
        for function, options in (
            (advantages.group_relative, {}), (advantages.group_relative, {"scale": False}),
            (advantages.group_relative, {"scale": "batch"}), (advantages.rloo, {}), (advantages.leave_one_out, {}),
        ):  # fmt: skip
            whole = function(rewards, groups, **options)
            found = function(own(rewards), own(groups), batch_group=group, **options)
            assert found.dtype == dtype
            assert torch.equal(found, own(whole)), function
            assert (found[own(groups) == -7] == 0).all()
        kept = advantages.with_variance(own(rewards), own(groups), batch_group=group)
        # Neither the group of −7 nor those of one sample.
        assert kept.tolist() == [x in (3, 5) for x in own(groups).tolist()]
        for given in ((groups, mask), (groups, None), (None, mask), (None, None)):
            whole = advantages.reinforce_plus_plus(rewards, *given)
            mine = [None if x is None else own(x) for x in given]
            found = advantages.reinforce_plus_plus(own(rewards), *mine, batch_group=group)
            assert torch.equal(found, own(whole))
    odd = rank == world - 1
    message = r"^rloo: rewards has shape \[0, 1\]" if odd else rf"^rloo: rank {world - 1} of batch_group raised"
    with pytest.raises(ValueError, match=message):
        advantages.rloo(numbers[:0, None] if odd else numbers, groups, batch_group=group)


def case_orders_over_ranks(rank: int, world: int) -> None:
    """Beside a sort of all numbers; equal ones count by rank, then by place."""
    group = distributed.group.WORLD
    for name, numbers in NUMBERS.items():
        for dtype, fraction in ((torch.float32, 0.6), (torch.float64, 2.0)):
            values, mask = torch.tensor(numbers, dtype=dtype), torch.rand(14) < fraction
            mine, inside = values.split(SIZES)[rank], mask.split(SIZES)[rank]
            expected = values[mask].sort().values
            assert torch.equal(at_positions(mine, inside, torch.arange(len(expected)), group), expected), name
            order = sorted(range(14), key=lambda i, at=values, m=mask: (not m[i], -at[i].item(), i))
            for count in (0, 1, 4, 20):
                wanted = torch.zeros(14, dtype=torch.bool)
                wanted[order[: min(count, len(expected))]] = True
                found = largest(mine, inside, torch.tensor(count), group)
                assert torch.equal(found, wanted.split(SIZES)[rank]), (name, count)
    values = torch.tensor([1.0, math.nan, 3.0, -math.nan] if rank == 0 else [math.inf])
    every = torch.ones_like(values, dtype=torch.bool)
    # NaN is above infinity, of which the other ranks have one each.
    assert at_positions(values, every, torch.tensor([1, 2, 4, 5]), group)[:3].tolist() == [3.0, math.inf, math.inf]
    chosen = largest(values, every, torch.tensor(2), group)
    assert chosen.tolist() == ([False, True, False, True] if rank == 0 else [False])
