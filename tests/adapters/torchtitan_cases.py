"""torchtitan's signatures on several ranks, against float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from rank_checks import Rows, standing_in
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kldiv_kernels.adapters import torchtitan

# ceil(11 / 2) columns for the first rank, and one less for the second.
VOCAB = 11
LABELS = torch.tensor([[0, 10, -100, 5], [6, -100, 3, 10]])


def _rows(dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> Rows:
    width = -(-vocab // distributed.get_world_size())
    first = distributed.get_rank() * width
    return Rows((2 * torch.randn(*LABELS.shape, vocab)).to(dtype), first, min(vocab, first + width))


def _logprobs(logits: Tensor) -> Tensor:
    at_labels = logits.log_softmax(-1).gather(-1, LABELS.clamp_min(0)[..., None])[..., 0]
    return torch.where(LABELS >= 0, at_labels, 0.0)


def _as_dtensor(mine: Tensor, vocab: int, mesh: DeviceMesh, *placements: Any) -> DTensor:
    shape = torch.Size((*LABELS.shape, vocab))
    return DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=shape, stride=torch.empty(shape, device="meta").stride()
    )


def case_cross_entropy_of_torchtitan(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    count = torch.tensor(7.0)
    loss = torchtitan.CrossEntropyLoss.Config(global_vocab_size=VOCAB).build(compile_config=None)
    grouped = torchtitan.CrossEntropyLoss.Config(global_vocab_size=VOCAB).build(tp_group=distributed.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16):
        rows = _rows(dtype)
        expected = -_logprobs(rows.exact).sum() / 7
        value, metrics = grouped(rows.mine, LABELS, count, positions=None)
        assert metrics == {}
        rows.check(value, expected)
        # The mesh of the logits, and torchtitan's own current mesh.
        value, _ = loss(_as_dtensor(rows.mine, VOCAB, mesh, Shard(-1)), LABELS, count)
        rows.check(value, expected)
        spmd = ModuleType("torchtitan.distributed.spmd_types")
        spmd.current_spmd_mesh = lambda: mesh  # type: ignore[attr-defined]
        with standing_in({spmd.__name__: spmd}):
            rows.check(loss(rows.mine, LABELS)[0], expected * 7)
    even = _rows(vocab=6 * world)
    value = torchtitan.cross_entropy_loss(even.mine, LABELS, tp_group=distributed.group.WORLD)
    even.check(value, -_logprobs(even.exact).sum())
    # Whole rows, on a mesh that has nothing to do with columns: sequences are spread over it.
    whole = even.exact.detach().float()
    mine = whole[rank : rank + 1].requires_grad_()
    pred = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
    labels = DTensor.from_local(LABELS[rank : rank + 1], mesh, [Shard(0)], run_check=False)
    total = torchtitan.cross_entropy_loss(pred, labels)
    assert isinstance(total, DTensor)
    assert total.placements == (Partial(),)
    torch.testing.assert_close(total.full_tensor().double(), -_logprobs(even.exact).sum(), rtol=1e-5, atol=1e-5)
    # Its sequences are given beside a vocabulary of the other dimension in 2-D; here one of both has one rank.
    both = init_device_mesh("cpu", (1, world), mesh_dim_names=("dp", "tp"))
    uneven = _rows()
    pred = _as_dtensor(uneven.mine, VOCAB, both, Shard(0), Shard(-1))
    found = torchtitan.cross_entropy_loss(pred, DTensor.from_local(LABELS, both, [Shard(0), Replicate()]))
    assert isinstance(found, DTensor)
    assert found.placements == (Partial(), Replicate())
    uneven.check(found.to_local(), -_logprobs(uneven.exact).sum())


def case_distillation_in_the_form_of_torchtitan(rank: int, world: int) -> None:
    group = distributed.group.WORLD
    config = torchtitan.DistillationLoss.Config(
        kind="js", beta=0.3, temperature=2.0, temperature_squared=True, global_vocab_size=VOCAB
    )
    loss = config.build(tp_group=group)
    rows, theirs = _rows(), _rows()
    q, p = (x.exact.div(2).softmax(-1) for x in (rows, theirs))
    mixture = 0.3 * p + 0.7 * q
    js = (0.3 * p * (p / mixture).log() + 0.7 * q * (q / mixture).log()).sum(-1)
    expected = 4 * torch.where(LABELS >= 0, js, 0.0).sum() / 13
    count = torch.tensor(13.0)
    value, metrics = loss(rows.mine, LABELS, count, teacher_logits=theirs.mine)
    assert metrics == {}
    rows.check(value, expected)
    assert not torch.autograd.grad(value, theirs.mine, retain_graph=True, allow_unused=True)[0]
    chunks = [x.split(2, dim=1) for x in (rows.mine, LABELS, theirs.mine)]
    rows.check(
        sum((loss(s, y, count, teacher_logits=t)[0] for s, y, t in zip(*chunks, strict=True)), torch.zeros(())),
        expected,
    )
    total = torchtitan.distillation_loss(rows.mine, theirs.mine, LABELS, global_vocab_size=VOCAB, tp_group=group)
    q, p = (x.exact.softmax(-1) for x in (rows, theirs))
    rows.check(total, torch.where(LABELS >= 0, (p * (p / q).log()).sum(-1), 0.0).sum())


def case_logprobs_of_torchtitan(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    rows = _rows()
    logits = _as_dtensor(rows.mine, VOCAB, mesh, Shard(-1))
    logprobs, entropies = torchtitan.compute_logprobs(logits, LABELS, return_entropy=True)
    rows.check(logprobs, _logprobs(rows.exact))
    q = rows.exact.softmax(-1)
    torch.testing.assert_close(entropies.double(), -(q * q.log()).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    assert not entropies.requires_grad
    alone = torchtitan.compute_logprobs(rows.exact.detach().float(), LABELS)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(alone.double(), _logprobs(rows.exact).detach(), rtol=1e-5, atol=1e-5)


def case_what_torchtitans_shards_cannot_be(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    rows, group = _rows(), distributed.group.WORLD
    pred = _as_dtensor(rows.mine, VOCAB, mesh, Shard(-1))
    with pytest.raises(ValueError, match=r"^cross_entropy_loss: pred has [56] columns; expected [67], those of rank"):
        torchtitan.cross_entropy_loss(rows.mine, LABELS, global_vocab_size=13, tp_group=group)
    with pytest.raises(ValueError, match=r"^cross_entropy_loss: tp_group is given beside a DTensor; expected None"):
        torchtitan.cross_entropy_loss(pred, LABELS, tp_group=group)
    with pytest.raises(ValueError, match=r"^compute_logprobs: global_vocab_size is 12; expected 11"):
        torchtitan.compute_logprobs(pred, LABELS, global_vocab_size=12)
    partial = DTensor.from_local(rows.mine, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"^distillation_loss: pred has the placements .*; expected Shard or Repl"):
        torchtitan.distillation_loss(partial, partial, LABELS)
