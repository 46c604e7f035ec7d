"""Statistics of rows whose columns are spread over a group: two sweeps at most, with one exchange behind each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.autograd import DOUBLE_BACKWARD, keep, kept
from kldiv_kernels.backends import Call, Sharded, get
from kldiv_kernels.parallel.shard import Shard, all_gather


def forward(shard: Shard, call: Call, logits: Tensor, reference: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """Values [value_rows, N], the same bits on every rank, and the state from which `backward` makes gradients.

    `call` speaks of whole rows; its own logits are not looked at.
    """
    sweeps = _sharded(backend)
    local = shard.local(call, logits.detach(), None if reference is None else reference.detach())
    picked = shard.picked(call, local)
    state = sweeps.shard_state(local, shard.start)
    states, all_picked = gathered(shard, state, picked)
    if all_picked is not None:
        # One rank has it, the others have 0: exact in any order.
        all_picked = all_picked.sum(0)
    sums = sweeps.shard_sums(local, states)
    all_sums = None if sums is None else gathered(shard, sums, None)[0]
    return sweeps.shard_finish(local, states, all_sums, all_picked)


def backward(
    shard: Shard,
    call: Call,
    logits: Tensor,
    reference: Tensor | None,
    backend: str,
    state: Tensor,
    coefficients: Tensor,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ coefficients · values by this rank's logits: nothing is exchanged."""
    if shard.columns(call.vocab_size) == 0:
        return (
            torch.zeros_like(logits) if wanted[0] else None,
            None if reference is None or not wanted[1] else torch.zeros_like(reference),
        )
    local = shard.local(call, logits, reference)
    return get(backend).backward(local, state, coefficients.to(state.dtype).contiguous(), *wanted)


def statistics(shard: Shard, call: Call, logits: Tensor, reference: Tensor | None, backend: str) -> Tensor:
    """Values [value_rows, N], differentiable."""
    # The backend was chosen for whole rows that have no strides of their own.
    if get(backend).unsupported(replace(call, logits=logits, reference=reference)) is not None:
        logits, reference = logits.contiguous(), None if reference is None else reference.contiguous()
    found: Tensor = _Statistics.apply(shard, call, backend, logits, reference)  # type: ignore[no-untyped-call]
    return found


def _sharded(backend: str) -> Sharded:
    found = get(backend)
    assert isinstance(found, Sharded)
    return found


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, call: Call, backend: str, logits: Tensor, reference: Tensor | None) -> Tensor:
        values, state = forward(shard, call, logits, reference, backend)
        ctx.shard, ctx.backend = shard, backend
        # The stand-ins of the call's logits are not kept. Of its other tensors exclude may be the caller's.
        ctx.call = replace(call, logits=logits.new_empty(0), reference=None, exclude=None)
        keep(ctx, logits, reference, call.exclude, state)
        return values

    @staticmethod
    def backward(ctx: Any, coefficients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        logits, reference, exclude, state = kept(ctx)
        wanted = ctx.needs_input_grad[3], reference is not None and ctx.needs_input_grad[4]
        call = replace(ctx.call, exclude=exclude)
        dlogits, dreference = backward(ctx.shard, call, logits, reference, ctx.backend, state, coefficients, wanted)
        return None, None, None, dlogits if wanted[0] else None, dreference if wanted[1] else None


def gathered(shard: Shard, table: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both of every rank, [ranks, *shape], in one exchange of bytes."""
    parts = [table.contiguous()] if more is None else [table.contiguous(), more.contiguous()]
    mine = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    everything = all_gather(shard.group, mine)
    found, begin = [], 0
    for part in parts:
        end = begin + part.numel() * part.element_size()
        # Flat: of no rows at all, a table of bytes has strides that are no view of wider numbers.
        of_part = everything[:, begin:end].reshape(-1).view(part.dtype)
        found.append(of_part.reshape(shard.size, *part.shape))
        begin = end
    return found[0], found[1] if more is not None else None
