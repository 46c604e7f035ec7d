"""NeMo-RL's signatures on several ranks, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_checks import Rows
from ranks import uneven
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from kldiv_kernels.adapters import nemo_rl

WIDTH, TOKENS, K = 9, 8, 4


def _columns(rank: int, world: int, dtype: torch.dtype = torch.float32) -> Rows:
    whole = (2 * torch.randn(3, TOKENS, WIDTH * world)).to(dtype)
    return Rows(whole, rank * WIDTH, (rank + 1) * WIDTH)


def _next_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _mine(rank: int, world: int, tokens: int) -> Tensor:
    """A rank's tokens of a sequence in the balanced order of context parallelism: one chunk from each end."""
    chunks = torch.arange(tokens).chunk(2 * world)
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]])


class TokensOf:
    """This rank's tokens of whole rows as a leaf, and whole rows in float64; each rank has a loss of its own."""

    def __init__(self, whole: Tensor, here: Tensor) -> None:
        self.here = here
        self.mine = whole[:, here].clone().requires_grad_()
        self.exact = whole.double().requires_grad_()

    def check(self, value: Tensor, expected: Tensor, rank: int, world: int, *, summed: bool = True) -> None:
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        cotangents = [torch.randn(expected.shape, dtype=torch.float64) for _ in range(world)]
        (got,) = torch.autograd.grad(value, self.mine, cotangents[rank].float(), retain_graph=True)
        total = sum(cotangents, torch.zeros(expected.shape)) if summed else cotangents[rank]
        (wanted,) = torch.autograd.grad(expected, self.exact, total, retain_graph=True)
        assert ((got - wanted[:, self.here]).abs() <= 1e-5 * wanted.abs().max()).all()


def case_nemo_rls_logprobs_of_columns(rank: int, world: int) -> None:
    group, ids = distributed.group.WORLD, torch.randint(WIDTH * world, (3, TOKENS))
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("cp", "tp"))
    for dtype in (torch.float32, torch.bfloat16):
        rows = _columns(rank, world, dtype)
        expected = _next_logprobs(rows.exact, ids)
        bounds = rank * WIDTH, (rank + 1) * WIDTH
        spread = DTensor.from_local(rows.mine, mesh, [Replicate(), Shard(2)], run_check=False)
        forms: list[Tensor] = [
            nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids, *bounds, group, chunk_size=3),
            nemo_rl.dtensor_from_parallel_logits_to_logprobs(rows.mine, ids, *bounds, group),
            nemo_rl.get_logprobs_from_vocab_parallel_logits(spread, ids),
            nemo_rl.get_next_token_logprobs_from_logits(ids, spread),
            nemo_rl.get_next_token_logprobs_from_logits(
                ids, rows.mine, vocab_parallel_rank=rank, vocab_parallel_group=group
            ),
        ]
        for found in forms:
            rows.check(found, expected)
        # Targets that are shorter than the padded logits.
        found = nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids[:, :5], *bounds, group)
        rows.check(found, _next_logprobs(rows.exact[:, :5], ids[:, :5]))
        assert not nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids, *bounds, group, True).requires_grad
    alone = nemo_rl.get_next_token_logprobs_from_logits(ids, rows.exact.detach().float())
    torch.testing.assert_close(alone.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    # Columns that the ranks do not share evenly.
    first, end = uneven(WIDTH * world, world)[rank : rank + 2]
    rows = Rows(2 * torch.randn(3, TOKENS, WIDTH * world), first, end)
    found = nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids, first, end, group, vocab_size=WIDTH * world)
    rows.check(found, _next_logprobs(rows.exact, ids))


def case_nemo_rls_logprobs_of_packed_sequences(rank: int, world: int) -> None:
    """One of them is empty, one has a single token and one is longer than a row of the result."""
    group, vocab = distributed.group.WORLD, WIDTH * world
    bounds = torch.tensor([0, 5, 5, 6, 15, 17])
    ids = torch.randint(vocab, (1, 17))
    rows = Rows(2 * torch.randn(1, 17, vocab), rank * WIDTH, (rank + 1) * WIDTH)

    def by_definition(logits: Tensor, bounds: Tensor, ids: Tensor, length: int) -> Tensor:
        out = []
        for start, end in pairwise(bounds.tolist()):
            one = _next_logprobs(logits[:, start:end], ids[:, start:end])[0] if end > start else logits.new_zeros(0)
            out.append(torch.nn.functional.pad(one[: length - 1], (0, max(0, length - 1 - one.shape[0]))))
        return torch.stack(out)

    call: Callable[..., Tensor] = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences
    expected = by_definition(rows.exact, bounds, ids, 7)
    columns = (bounds, 7, rank * WIDTH, (rank + 1) * WIDTH, group)
    rows.check(call(rows.mine, ids, *columns), expected)
    rolled = ids.roll(-1, dims=-1)
    rows.check(call(rows.mine, rolled, *columns, target_is_pre_rolled=True), expected)
    # The tokens of each sequence spread over ranks, its columns over none.
    alone = distributed.new_group([rank], use_local_synchronization=True)
    bounds, ids = torch.tensor([0, 4, 4, 16]) * world // 2, torch.randint(vocab, (1, 8 * world))
    sequences = [(start, end) for start, end in pairwise(bounds.tolist()) if end > start]
    here = torch.cat([start + _mine(rank, world, end - start) for start, end in sequences])
    tokens = TokensOf(2 * torch.randn(1, 8 * world, vocab), here)
    found = call(tokens.mine, ids, bounds, 9, 0, vocab, alone, cp_group=group)
    tokens.check(found, by_definition(tokens.exact, bounds, ids, 9), rank, world)
    whole = torch.cat([ids[:, start:end].roll(-1, dims=-1) for start, end in sequences], dim=-1)
    found = call(tokens.mine, whole[:, here], bounds, 9, 0, vocab, alone, cp_group=group, target_is_pre_rolled=True)
    tokens.check(found, by_definition(tokens.exact, bounds, ids, 9), rank, world)


def case_nemo_rls_logprobs_of_spread_tokens(rank: int, world: int) -> None:
    group, vocab, tokens = distributed.group.WORLD, 13, 4 * world
    alone = distributed.new_group([rank], use_local_synchronization=True)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("cp", "tp"))
    ids = torch.randint(vocab, (3, tokens))
    order = torch.cat([_mine(r, world, tokens) for r in range(world)])
    rows = TokensOf(2 * torch.randn(3, tokens, vocab), _mine(rank, world, tokens))
    expected = _next_logprobs(rows.exact, ids)
    found = nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids, 0, vocab, alone, cp_group=group)
    rows.check(found, expected, rank, world)
    found = nemo_rl.from_parallel_logits_to_logprobs(rows.mine, ids[:, :-3], 0, vocab, alone, cp_group=group)
    rows.check(found, expected[:, :-3], rank, world)
    target = DTensor.from_local(ids[:, rows.here], mesh, [Shard(1), Replicate()], run_check=False)
    logits = DTensor.from_local(rows.mine, mesh, [Shard(1), Shard(2)], run_check=False)
    for found in (
        nemo_rl.get_logprobs_from_vocab_parallel_logits(logits, target, seq_index=order),
        nemo_rl.get_next_token_logprobs_from_logits(target, logits, seq_index=order),
        nemo_rl.dtensor_from_parallel_logits_to_logprobs(rows.mine, target, 0, vocab, alone, seq_index=order),
    ):
        rows.check(found, expected, rank, world, summed=False)
    with pytest.raises(ValueError, match=r"^get_logprobs_from_vocab_parallel_logits: seq_index is None; expected"):
        nemo_rl.get_logprobs_from_vocab_parallel_logits(logits, target)


def _topk_by_definition(logits: Tensor, teacher: Tensor, ids: Tensor, zero_outside: bool) -> tuple[Tensor, ...]:
    whole = logits.log_softmax(-1)
    on_ids = (whole if zero_outside else logits).gather(-1, ids)
    student = on_ids if zero_outside else on_ids.log_softmax(-1)
    sums = (whole.exp() * whole).sum(-1)
    return student[:, :-1], teacher.double().log_softmax(-1)[:, :-1], sums[:, :-1]


def _loss_by_definition(config: Any, q: Tensor, p: Tensor, sums: Tensor, weight: Tensor, count: float) -> Tensor:
    forward = (p.exp() * (p - q)).sum(-1)
    reverse = (q.exp() * (q - p)).sum(-1)
    if config["zero_outside_topk"]:
        reverse = reverse + (sums - (q.exp() * q).sum(-1)) + 100 * (1 - q.exp().sum(-1))
    share = {"forward": 1.0, "reverse": 0.0}.get(config["kl_type"], config["mixed_kl_weight"])
    per_token = share * forward + (1 - share) * reverse
    return torch.where(weight != 0, per_token * weight, 0.0).sum() / count


def case_nemo_rls_distillation(rank: int, world: int) -> None:
    group = distributed.group.WORLD
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("cp", "tp"))
    rows = _columns(rank, world)
    ids = torch.stack([torch.randperm(WIDTH * world)[:K] for _ in range(3 * TOKENS)]).reshape(3, TOKENS, K)
    teacher = 2 * torch.randn(3, TOKENS, K)
    data = {"input_ids": ids[..., 0], "token_mask": (torch.rand(3, TOKENS) < 0.7).float(), "sample_mask": torch.ones(3)}
    data["sample_mask"][1] = 0
    weight = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    for zero_outside in (False, True):
        expected = _topk_by_definition(rows.exact, teacher, ids, zero_outside)
        spread = DTensor.from_local(rows.mine, mesh, [Replicate(), Shard(2)], run_check=False)
        of_group: dict[str, Any] = {"vocab_parallel_rank": rank, "vocab_parallel_group": group}
        for logits, options in ((rows.mine, of_group), (spread, {})):
            q, p, sums = nemo_rl.get_distillation_topk_logprobs_from_logits(
                logits, teacher, ids, zero_outside, zero_outside, **options
            )
            rows.check(q, expected[0])
            torch.testing.assert_close(p.double(), expected[1], rtol=1e-5, atol=1e-5)
            assert (sums is not None) == zero_outside
            if sums is not None:
                rows.check(sums, expected[2])
        for kind in ("forward", "reverse", "mixed"):
            config = {"kl_type": kind, "mixed_kl_weight": 0.3, "zero_outside_topk": zero_outside}
            # Where a mask is 0 nothing is looked at.
            nothing = torch.where(weight == 0, torch.nan, 0.0)[..., None]
            as_object = nemo_rl.DistillationLossFn(SimpleNamespace(**config))
            value, metrics = as_object(q + nothing, p, sums, data, torch.tensor(2), torch.tensor(17))
            rows.check(value, _loss_by_definition(config, *expected, weight, 17), tolerance=3e-5)
            assert metrics == {"loss": value.item(), "num_valid_samples": 3}
            value, _ = nemo_rl.DistillationLossFn(config)(q, p, sums, {"input_ids": ids})
            everything = torch.ones_like(weight)
            rows.check(value, _loss_by_definition(config, *expected, everything, weight.numel()), tolerance=3e-5)
    # Tokens spread over ranks, in whole rows.
    spread_rows = TokensOf(2 * torch.randn(3, 4 * world, 13), _mine(rank, world, 4 * world))
    ids = torch.stack([torch.randperm(13)[:K] for _ in range(3 * 7)]).reshape(3, 7, K)
    for zero_outside in (False, True):
        q, _, sums = nemo_rl.get_distillation_topk_logprobs_from_logits(
            spread_rows.mine, teacher[:, :7], ids, zero_outside, zero_outside, context_parallel_group=group
        )
        expected = _topk_by_definition(spread_rows.exact[:, :7], teacher[:, :7], ids, zero_outside)
        spread_rows.check(q, expected[0], rank, world)
        if sums is not None:
            spread_rows.check(sums, expected[2], rank, world)


def case_what_nemo_rls_arguments_cannot_be(rank: int, world: int) -> None:
    group, logits, ids = distributed.group.WORLD, torch.randn(1, 4, WIDTH), torch.zeros(1, 4, dtype=torch.long)
    bounds = rank * WIDTH, (rank + 1) * WIDTH
    top = torch.zeros(1, 4, 2, dtype=torch.long)
    calls: list[tuple[str, Callable[[], Any]]] = [
        (
            "vocab_start_index and vocab_end_index are 0 and 8; expected 9",
            lambda: nemo_rl.from_parallel_logits_to_logprobs(logits, ids, 0, 8, group),
        ),
        (
            "target has 6 tokens; expected 4 at most",
            lambda: nemo_rl.from_parallel_logits_to_logprobs(logits, ids.new_zeros(1, 6), *bounds, group),
        ),
        (
            "sampling_params.top_k is 5; expected None",
            lambda: nemo_rl.from_parallel_logits_to_logprobs(
                logits, ids, *bounds, group, sampling_params=SimpleNamespace(top_k=5, top_p=1.0)
            ),
        ),
        (
            r"sampling_params.top_p is 0.9; expected 1.0",
            lambda: nemo_rl.get_next_token_logprobs_from_logits(
                ids, logits, sampling_params=SimpleNamespace(top_k=None, top_p=0.9)
            ),
        ),
        (
            "chunk_size is 0; expected",
            lambda: nemo_rl.from_parallel_logits_to_logprobs(logits, ids, *bounds, group, chunk_size=0),
        ),
        (
            f"vocab_parallel_rank is None; expected {rank}",
            lambda: nemo_rl.get_next_token_logprobs_from_logits(ids, logits, vocab_parallel_group=group),
        ),
        (
            "calculate_entropy is True beside zero_outside_topk=False",
            lambda: nemo_rl.get_distillation_topk_logprobs_from_logits(logits, top * 1.0, top, False, True),
        ),
        (
            r"teacher_topk_logits and teacher_topk_indices have shapes \[1, 4, 1\] and \[1, 4, 2\]",
            lambda: nemo_rl.get_distillation_topk_logprobs_from_logits(logits, top[..., :1] * 1.0, top, True, True),
        ),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()
