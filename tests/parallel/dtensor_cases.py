"""DTensors on meshes of several ranks: rows and columns spread, arguments of one kind and of both; run by all ranks.

Expected values are those of whole tensors, in float64, by definition (public_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from public_calls import CALLS, Given, given
from ranks import same_everywhere
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import kldiv_kernels as kk

# What "mean" divides by in these calls, over all rows.
_NORMALIZERS: dict[str, Callable[[Given], Tensor]] = {
    "divergence_loss": lambda x: x.mask.sum(),
    "divergence_loss, no options": lambda x: torch.tensor(x.labels.numel()),
    "policy_loss": lambda x: x.mask.sum(),
    "policy_loss of sequences": lambda x: torch.tensor(x.labels.shape[0]),
    "topk_divergence_loss": lambda x: x.mask.sum(),
}


def _meshes(world: int) -> list[DeviceMesh]:
    flat = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return [flat, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))] if world == 4 else [flat]


def _layouts(mesh: DeviceMesh) -> list[list[Placement]]:
    if mesh.ndim == 1:
        return [[Shard(2)], [Shard(0)], [Shard(1)]] if mesh.size() == 2 else [[Shard(2)]]
    return [[Shard(0), Shard(2)], [Replicate(), Shard(2)], [Shard(2), Replicate()], [Shard(1), Shard(0)]]


def _of_rows(placements: list[Placement]) -> list[Placement]:
    """What belongs to labels and the like."""
    return [Replicate() if placement == Shard(2) else placement for placement in placements]


def _spread(x: Given, mesh: DeviceMesh, placements: list[Placement]) -> Given:
    return Given(
        *(
            distribute_tensor(tensor, mesh, placements if name in ("logits", "teacher") else _of_rows(placements))
            for name, tensor in x._asdict().items()
        )
    )


def case_every_public_function(rank: int, world: int) -> None:
    for mesh in _meshes(world):
        for placements in _layouts(mesh):
            # Some ranks have fewer rows or columns than others, or none.
            _check_all(given(3, 5, vocab=29 if mesh.ndim == 2 else 5), mesh, placements)


def _check_all(x: Given, mesh: DeviceMesh, placements: list[Placement]) -> None:
    rows = [placement for placement in placements if placement in (Shard(0), Shard(1))]
    everything = _spread(x, mesh, placements)
    # Beside logits that are a DTensor: replicated ones, and what is here of them.
    replicated = Given(*(distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim) for tensor in x))
    local = Given(*(tensor.to_local() for tensor in everything))
    for name, call in CALLS.items():
        exact, theirs = x.logits.double().requires_grad_(), x.teacher.double().requires_grad_()
        expected = call.definition(x._replace(logits=exact, teacher=theirs))
        expected.sum().backward()
        options = {"normalizer": _NORMALIZERS[name](x)} if rows and name in _NORMALIZERS else {}
        assert exact.grad is not None
        for others in (everything, replicated, local):
            leaf = everything.logits.detach().clone().requires_grad_()
            got = call.ours(others._replace(logits=leaf), **options)
            of_rows = got.dim() >= 2
            scalar = [Partial() if placement in rows else Replicate() for placement in placements]
            assert isinstance(got, DTensor)
            assert list(got.placements) == (_of_rows(placements) if of_rows else scalar), name
            whole = got.full_tensor()
            same_everywhere(whole)
            torch.testing.assert_close(
                whole.double(), expected.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
            (got.sum() if of_rows else got).backward()
            assert isinstance(leaf.grad, DTensor)
            assert list(leaf.grad.placements) == placements
            error = (leaf.grad.full_tensor().double() - exact.grad).abs()
            assert (error <= 1e-5 * exact.grad.abs().max()).all(), (name, placements)


def case_the_teachers_gradient(rank: int, world: int) -> None:
    """Of a teacher that is spread, and of one that everybody has."""
    x = given(3, 4, vocab=29)
    exact = x.teacher.double().requires_grad_()
    logq = x.logits.double().log_softmax(-1)
    (exact.softmax(-1) * (exact.log_softmax(-1) - logq)).sum().backward()
    assert exact.grad is not None
    for mesh in _meshes(world):
        for placements in _layouts(mesh):
            logits = distribute_tensor(x.logits, mesh, placements)
            for of_teacher in (placements, [Replicate()] * mesh.ndim):
                teacher = distribute_tensor(x.teacher, mesh, of_teacher).requires_grad_()
                kk.forward_kl(logits, teacher, reduction="sum").backward()
                assert isinstance(teacher.grad, DTensor)
                assert list(teacher.grad.placements) == of_teacher
                torch.testing.assert_close(teacher.grad.full_tensor().double(), exact.grad, rtol=1e-5, atol=1e-5)


def case_everything_returned(rank: int, world: int) -> None:
    x = given(4, 3, vocab=11)
    for mesh in _meshes(world):
        for placements in _layouts(mesh):
            rows = [placement for placement in placements if placement in (Shard(0), Shard(1))]
            spread = _spread(x, mesh, placements)
            options = {"normalizer": 12, "aggregation": "token-mean"} if rows else {"aggregation": "token-mean"}
            out, plain = (
                kk.policy_loss(of.logits, of.labels, of.advantages, old_logprobs=of.old, **options)
                for of in (spread, x)
            )
            for name in ("loss", "per_token_loss", "logprob", "entropy"):
                got = getattr(out, name)
                assert isinstance(got, DTensor)
                torch.testing.assert_close(got.full_tensor(), getattr(plain, name), rtol=1e-5, atol=1e-5)
            assert out.metrics.keys() == plain.metrics.keys()
            # Of the rows that are here, where rows are spread.
            assert all(isinstance(value, DTensor) != bool(rows) for value in out.metrics.values())
            here = out.entropy.to_local()
            if rows and here.numel():
                torch.testing.assert_close(out.metrics["entropy"], here.mean())
            stats = kk.token_stats(spread.logits, spread.teacher, stats=("argmax", "js"))
            assert torch.equal(stats.argmax.full_tensor(), x.logits.argmax(-1))
            top = kk.topk(spread.logits, 3)
            largest = x.logits.log_softmax(-1).topk(3, -1)
            torch.testing.assert_close(top.values.full_tensor(), largest.values, rtol=1e-5, atol=1e-5)
            assert torch.equal(top.ids.full_tensor(), largest.indices)


def case_sequences_in_parts_and_packed(rank: int, world: int) -> None:
    """Without a normalizer, since the group counts; thresholds over the batch; sequences by numbers."""
    x = given(4, 6, vocab=11)
    numbers = torch.arange(4)[:, None].expand(4, 6)
    calls: dict[str, dict[str, Any]] = {
        "gspo": {"loss_type": "gspo"},
        "gmpo": {"loss_type": "gmpo"},
        "quantile": {"aggregation": "token-mean", "entropy_quantile": 0.5, "entropy_coef": 0.1},
    }
    (mesh, *_) = _meshes(world)
    for name, options in calls.items():
        plain = x.logits.clone().requires_grad_()
        expected = kk.policy_loss(plain, x.labels, x.advantages, old_logprobs=x.old, mask=x.mask, **options).loss
        expected.backward()
        assert plain.grad is not None
        for packed in (False, True):

            def on(y: Tensor, packed: bool = packed) -> DTensor:
                return distribute_tensor(y.flatten(0, 1) if packed else y, mesh, [Shard(0 if packed else 1)])

            leaf = on(x.logits).requires_grad_()
            more = {"sequence_ids": on(numbers)} if packed else {}
            loss = kk.policy_loss(
                leaf, on(x.labels), on(x.advantages), old_logprobs=on(x.old), mask=on(x.mask), **more, **options
            ).loss
            loss.backward()
            assert isinstance(loss, DTensor)
            torch.testing.assert_close(loss.full_tensor(), expected.detach(), rtol=1e-5, atol=1e-6)
            error = (leaf.grad.full_tensor().reshape(plain.grad.shape) - plain.grad).abs().max()
            assert error <= 1e-5 * plain.grad.abs().max(), (name, packed, error)


def case_a_whole_teacher_beside_columns(rank: int, world: int) -> None:
    """A teacher's logits that are no DTensor: of this process's columns, or of all."""
    (mesh, *_), x = _meshes(world), given(2, 3, vocab=13)
    logits = distribute_tensor(x.logits, mesh, [Shard(2)])
    expected = kk.forward_kl(x.logits, x.teacher)
    here = distribute_tensor(x.teacher, mesh, [Shard(2)]).to_local()
    for teacher in (x.teacher, here):
        torch.testing.assert_close(kk.forward_kl(logits, teacher).full_tensor(), expected, rtol=1e-5, atol=1e-6)
    if world > 1:
        with pytest.raises(ValueError, match=r"reference_logits has shape \[2, 3, 13\]; expected 13 columns"):
            kk.forward_kl(logits, x.teacher.clone().requires_grad_())


def case_what_is_refused(rank: int, world: int) -> None:
    x = given(2, 6, vocab=13)
    (mesh, *more) = _meshes(world)

    def on(tensor: Tensor, *placements: Placement, mesh: DeviceMesh = mesh) -> DTensor:
        return DTensor.from_local(tensor, mesh, placements, run_check=False)

    def refused(call: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            call()

    columns, rows = on(x.logits, Shard(2)), on(x.logits, Shard(0))
    kwargs = {"entropy_coef": 0.1, "entropy_aggregation": "token-mean", "normalizer": 3, "aggregation": "token-mean"}
    partial = on(x.logits, Partial())
    spread = r"is a DTensor with placements \(Partial\(sum\),\); expected Shard or Replicate"
    refused(lambda: kk.entropy(partial), rf"^token_stats: logits {spread}")
    refused(
        lambda: kk.forward_kl(rows, on(x.teacher, Partial()), reduction="sum"),
        r"^divergence_loss: reference_logits is a DTensor .*; expected \(Shard\(dim=0\),\) or Replicate\(\)",
    )
    refused(lambda: kk.entropy(columns, group=distributed.group.WORLD), r"^token_stats: group is given beside logits")
    refused(lambda: kk.forward_kl(rows, x.teacher), r"^divergence_loss: normalizer is None, but rows are spread")
    refused(lambda: kk.policy_loss(rows, x.labels, x.advantages), r"^policy_loss: normalizer is None, but rows are")
    refused(
        lambda: kk.policy_loss(rows, x.labels, x.advantages, **kwargs),
        r"^policy_loss: entropy_aggregation is 'token-mean', but rows are spread",
    )
    refused(
        lambda: kk.policy_loss(
            on(x.logits[0], Shard(0)), x.labels[0], x.advantages[0], cu_seqlens=torch.tensor([0, 6])
        ),
        r"^policy_loss: cu_seqlens is given, but tokens are spread",
    )
    tokens = on(x.logits, Shard(1))
    refused(lambda: kk.token_stats(tokens, shift=True), r"^token_stats: shift is True, but tokens are spread")
    refused(
        lambda: kk.forward_kl(x.logits, on(x.teacher, Shard(2))),
        r"^divergence_loss: reference_logits is a DTensor .*; expected \(Replicate\(\),\)",
    )
    refused(
        lambda: kk.selective_log_softmax(columns, on(x.labels, Shard(0))),
        r"^token_stats: labels is a DTensor with placements .*; expected \(Replicate\(\),\)",
    )
    for grid in more:
        refused(
            lambda: kk.policy_loss(
                on(x.logits, Shard(1), Shard(1), mesh=grid),  # noqa: B023
                x.labels,
                x.advantages,
            ),
            r"^policy_loss: sequence_group is None, but rows are spread over 2 dimensions",
        )
        refused(
            lambda: kk.entropy(on(x.logits, Shard(2), Shard(2), mesh=grid)),  # noqa: B023
            r"^token_stats: logits is a DTensor .*; expected its columns to be spread over one dimension",
        )
        refused(
            lambda: kk.forward_kl(columns, on(x.teacher, Shard(2), Replicate(), mesh=grid)),  # noqa: B023
            r"^divergence_loss: reference_logits is on .*; expected .* like the other DTensors",
        )
