"""A head that `fully_shard` has sharded, on two processes, and how much memory a call needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import start_ranks
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate

import kldiv_kernels as kk

# Not a multiple of the processes: their shards differ.
COLUMNS, WIDTH = 31, 8


class _Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body = nn.Linear(4, WIDTH)
        self.lm_head = nn.Linear(WIDTH, COLUMNS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()  # type: ignore[no-any-return]


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(5, 4, generator=generator), torch.randn(5, COLUMNS, generator=generator)


def _rank(rank: int, store: str, alone: bool) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = _Model(bias=True)
    torch.manual_seed(0)
    sharded = _Model(bias=True)
    if alone:
        fully_shard(sharded.lm_head, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    # What plain data parallelism would give: the mean of the ranks' gradients.
    wanted = [torch.zeros_like(x) for x in whole.lm_head.parameters()]
    for other in range(2):
        x, target = _batch(other)
        loss = kk.linear_divergence_loss(whole(x), whole.lm_head, reference_logits=target)
        for total, gradient in zip(wanted, torch.autograd.grad(loss, list(whole.lm_head.parameters())), strict=True):
            total += gradient / 2
    x, target = _batch(rank)
    for reduction in ("mean", "none"):
        hidden = sharded(x)
        sharded.lm_head.reshard() if alone else sharded.reshard()
        assert isinstance(sharded.lm_head.weight, DTensor)
        loss = kk.linear_divergence_loss(
            hidden, sharded.lm_head, reference_logits=target, reduction=reduction
        ).mean()  # fmt: skip
        loss.backward()
        for parameter, expected in zip(sharded.lm_head.parameters(), wanted, strict=True):
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.placements == parameter.placements
            torch.testing.assert_close(parameter.grad.full_tensor(), expected)
        assert sharded.body.weight.grad is not None
        sharded.zero_grad()
    distributed.destroy_process_group()


@pytest.mark.parametrize("alone", [False, True], ids=["with the model", "by itself"])
def test_the_gradient_of_a_sharded_head_is_that_of_all_ranks(alone: bool, tmp_path: Path) -> None:
    start_ranks(_rank, (str(tmp_path / "store"), alone))


def test_other_placements() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        hidden, weight = torch.randn(3, WIDTH), torch.randn(COLUMNS, WIDTH)
        there = DTensor.from_local(weight, mesh, [Replicate()])
        got = kk.linear_token_stats(hidden, there, stats=["entropy"]).entropy
        assert torch.equal(got, kk.linear_token_stats(hidden, weight, stats=["entropy"]).entropy)
        with pytest.raises(ValueError, match=r"the weight of head is a DTensor with placements \(Partial"):
            kk.linear_token_stats(hidden, DTensor.from_local(weight, mesh, [Partial()]), stats=["entropy"])
        placed = kk.linear_token_stats(DTensor.from_local(hidden, mesh, [Replicate()]), weight, stats=["entropy"])
        assert isinstance(placed.entropy, DTensor)
        assert torch.equal(placed.entropy.full_tensor(), got)
    finally:
        distributed.destroy_process_group()


# Peak memory of a call above what was resident before, in a process of its own.
_MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
import kldiv_kernels as kk

rows, columns, width, form = int(sys.argv[1]), 40_000, 256, sys.argv[2]
torch.set_num_threads(1)
hidden = torch.randn(rows, width).bfloat16().requires_grad_()
weight = (torch.randn(columns, width) / 16).bfloat16().requires_grad_()
theirs, their_weight = torch.randn(rows, width).bfloat16(), (torch.randn(columns, width) / 16).bfloat16()


def run():
    if form == "logits":
        (kk.forward_kl(hidden @ weight.T, theirs @ their_weight.T)).backward()
    elif form == "statistics":
        kk.linear_token_stats(
            hidden, weight, reference_hidden=theirs, reference_head=their_weight, stats=["forward_kl"],
            rows_per_chunk=256,
        ).forward_kl.mean().backward()
    else:
        kk.linear_divergence_loss(hidden, weight, theirs, their_weight, rows_per_chunk=256).backward()


def resident(field):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field))


run()
hidden.grad = weight.grad = None
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
run()
print(json.dumps(resident("VmHWM") - before))
"""


def _extra(rows: int, form: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(rows), form], capture_output=True, text=True, check=True
    )  # fmt: skip
    return int(json.loads(done.stdout))


def test_memory_does_not_grow_with_the_rows() -> None:
    planned = {}
    for rows in (1024, 4096):
        planned[rows] = kk.plan(rows=rows, vocab=40_000, kind="forward_kl", hidden_size=256, rows_per_chunk=256)
    logits = 2 * 4096 * 40_000
    assert _extra(4096, "logits") > 2.5 * logits
    for form in ("loss", "statistics"):
        few, many = _extra(1024, form), _extra(4096, form)
        # Beyond the plan: the slice of the weight in float32, and the gradient of the weight once more, rounded.
        more = (32 << 20) + 2 * 40_000 * 256 + (30 << 20)
        for rows, extra in ((1024, few), (4096, many)):
            assert extra <= planned[rows].extra_memory + more, (form, rows, extra)  # type: ignore[operator]
        # Hidden states' gradients grow, and nothing of [rows, columns] does.
        assert many - few < 0.1 * logits, (form, few, many)


def test_the_plan_of_hidden_states() -> None:
    plan = kk.plan(rows=2048, vocab=40_000, kind="js", hidden_size=256, rows_per_chunk=100)
    assert (plan.rows_per_chunk, plan.multiplications) == (100, 21 * 4)
    assert kk.plan(rows=50, vocab=100, stats=["entropy"], hidden_size=8).multiplications == 4
    assert kk.plan(rows=50, vocab=100, stats=["entropy"], hidden_size=8, gradient=False).multiplications == 1
    gpu = kk.plan(rows=8192, vocab=151_936, kind="forward_kl", hidden_size=4096, device="sm_90")
    assert (gpu.backend, gpu.kernel, gpu.rows_per_chunk) == ("cuda", "one-read", 2048)
    for wrong, says in (
        ({"rows_per_chunk": 5}, "rows_per_chunk is given without hidden_size"),
        ({"reference_hidden_size": 5}, "reference_hidden_size is given without hidden_size"),
        ({"hidden_size": 0}, "hidden_size is 0; expected an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=f"plan: {says}"):
            kk.plan(rows=50, vocab=100, **wrong)
