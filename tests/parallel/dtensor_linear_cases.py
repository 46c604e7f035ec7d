"""Hidden states and heads on meshes: spread vocabularies, spread rows, and parameters that FSDP spreads; by all ranks.

Expected values are those of the same functions on whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import Given, given
from ranks import same_everywhere
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import kldiv_kernels as kk

# No multiple of the ranks.
_COLUMNS, _WIDTH = 53, 8

_Call = Callable[..., Tensor]


def _calls(x: Given, on: Callable[[Tensor], Tensor]) -> dict[str, _Call]:
    """Losses of hidden states and head; `on` places what belongs to rows."""
    labels, mask, advantages, old, ids, topk = map(on, (x.labels, x.mask, x.advantages, x.old, x.ids, x.topk_logprobs))
    count = x.mask.sum()
    return {
        "statistics": lambda h, w, th, tw, **o: kk.linear_token_stats(
            h, w, labels, reference_hidden=th, reference_head=tw, stats=("logprob", "js"), mask=mask, **o
        ).js.sum(),
        "divergence": lambda h, w, th, tw, **o: kk.linear_divergence_loss(
            h, w, th, tw, "js", mask=mask, normalizer=count, **o
        ),
        "policy": lambda h, w, th, tw, **o: kk.linear_policy_loss(
            h, w, labels, advantages, old_logprobs=old, reference_hidden=th, reference_head=tw, kl_coef=0.1, mask=mask,
            kl_estimator="reverse_kl", aggregation="token-mean", normalizer=count, **o,
        ).loss,
        "top-k": lambda h, w, th, tw, **o: kk.linear_topk_divergence_loss(
            h, w, ids, topk, "js", mask=mask, normalizer=count, **o
        ),
    }  # fmt: skip


def _tensors() -> tuple[Given, list[Tensor]]:
    """Labels and the like, and hidden states, weight, bias, the teacher's hidden states and weight."""
    shapes = ((4, 6, _WIDTH), (_COLUMNS, _WIDTH), (_COLUMNS,), (4, 6, 5), (_COLUMNS, 5))
    return given(4, 6, vocab=_COLUMNS), [torch.randn(shape) for shape in shapes]


def _wanted(call: _Call, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = call(leaves[0], kk.Head(leaves[1], leaves[2]), leaves[3], leaves[4])
    return loss, list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    error = (got - expected).abs().max()
    assert error <= 2e-5 * expected.abs().max().clamp_min(1e-3), f"{what}: {error}"


def _check(mesh: DeviceMesh, of_rows: list[Placement], of_head: list[Placement], **options: Any) -> None:
    """Hidden states and heads as DTensors, and what belongs to rows too, or replicated."""
    x, tensors = _tensors()
    head = [Shard(0) if placement == Shard(0) else Replicate() for placement in of_head]
    # In a sequence-parallel group every process has what belongs to all of its rows.
    beside = [Replicate() if at == Shard(0) else placement for placement, at in zip(of_rows, head, strict=True)]
    placed = [of_rows, of_head, head, beside, of_head]
    for on in (
        lambda y: distribute_tensor(y, mesh, beside),
        lambda y: distribute_tensor(y, mesh, [Replicate()] * mesh.ndim),
    ):
        for name, call in _calls(x, on).items():
            expected, gradients = _wanted(_calls(x, lambda y: y)[name], tensors)
            leaves = [
                distribute_tensor(tensor, mesh, at).requires_grad_() for tensor, at in zip(tensors, placed, strict=True)
            ]
            loss = call(leaves[0], kk.Head(leaves[1], leaves[2]), leaves[3], leaves[4], rows_per_chunk=5, **options)
            assert isinstance(loss, DTensor)
            loss.backward()
            whole = loss.full_tensor()
            same_everywhere(whole)
            _close(whole, expected, name)
            for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
                if leaf.grad is None:
                    assert not gradient.any(), (name, i)
                    continue
                assert leaf.grad.placements == leaf.placements
                _close(leaf.grad.full_tensor(), gradient, f"{name}, {i}, {of_rows}")


def case_hidden_states_that_are_dtensors(rank: int, world: int) -> None:
    if world == 2:
        mesh = init_device_mesh("cpu", (2,))
        _check(mesh, [Replicate()], [Shard(0)])
        # Sequence parallel, which has to be said: the rows may be a batch's as well.
        _check(mesh, [Shard(1)], [Shard(0)], group=mesh.get_group())
        # A batch that is spread, and a head that everyone has, or a part of it.
        _check(mesh, [Shard(0)], [Replicate()])
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _check(mesh, [Shard(0), Replicate()], [Replicate(), Shard(0)])
    _check(mesh, [Shard(0), Shard(1)], [Replicate(), Shard(0)], group=mesh["tp"].get_group())


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, _WIDTH)
        self.lm_head = nn.Linear(_WIDTH, _COLUMNS)


def case_a_model_under_fsdp_and_tensor_parallel(rank: int, world: int) -> None:
    """Gradients are the mean over data-parallel ranks, as those of the rest of the model are."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(3)
    plain = _Model()
    torch.manual_seed(3)
    model = _Model()
    parallelize_module(
        model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    )
    fully_shard(model, mesh=mesh["dp"])
    inputs, teacher = torch.randn(2, 6, 4), torch.randn(2, 6, _COLUMNS)
    losses = [
        kk.linear_divergence_loss(plain.body(x), plain.lm_head, reference_logits=t)
        for x, t in zip(inputs, teacher, strict=True)
    ]
    (sum(losses) / 2).backward()
    mine = mesh["dp"].get_local_rank()
    group = mesh["tp"].get_group()
    here = distribute_tensor(teacher[mine], mesh["tp"], [Shard(1)]).to_local()
    model.unshard()
    hidden = model.body(inputs[mine])
    model.reshard()
    loss = kk.linear_divergence_loss(hidden, model.lm_head, reference_logits=here, group=group)
    _close(loss, losses[mine], "loss")
    loss.backward()
    for parameter, exact in zip(model.lm_head.parameters(), plain.lm_head.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor)
        assert exact.grad is not None
        assert parameter.grad.placements == parameter.placements
        _close(parameter.grad.full_tensor(), exact.grad, "head")


def case_what_is_refused_of_heads(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    weight = distribute_tensor(torch.randn(_COLUMNS, _WIDTH), mesh, [Shard(0)])
    hidden = distribute_tensor(torch.randn(2, 3, _WIDTH), mesh, [Shard(2)])
    with pytest.raises(ValueError, match=r"^linear_token_stats: hidden is a DTensor .*; expected its last dimension"):
        kk.linear_token_stats(hidden, weight, stats=("entropy",))
    with pytest.raises(ValueError, match=r"^linear_token_stats: vocab_start is given beside a head that is a DTensor"):
        kk.linear_token_stats(
            torch.randn(2, _WIDTH), weight, stats=("entropy",), group=mesh.get_group(), vocab_start=0, vocab_size=53
        )
    rows = distribute_tensor(torch.randn(2, 3, _WIDTH), mesh, [Shard(0)])
    teacher = torch.randn(2, 3, _COLUMNS)
    with pytest.raises(ValueError, match=r"^linear_divergence_loss: normalizer is None, but rows are spread"):
        kk.linear_divergence_loss(rows, weight, reference_logits=teacher)
