"""The parts that a call on vocabulary shards is made of, on every backend that has them: all shards in one process.

A loop stands in the place of the processes of a group. Expected is the definition on whole rows in float64
(oracle.py), and where a definition has no finite value, what the same backend says of whole rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from checks import BACKENDS, CUDA_ON_HOST, INTERPRETED, STATISTIC_NAMES, check_gradient, check_value
from small_divergences import near
from torch import Tensor

from kldiv_kernels.backends import Call, Sharded, get, value_rows
from kldiv_kernels.parallel import statistics
from kldiv_kernels.parallel.shard import Shard
from kldiv_kernels.registry import STATISTICS

sys.path.insert(0, str(Path(__file__).parent))

from ranks import uneven

SHARDED = [name for name in BACKENDS if isinstance(get(name), Sharded)]
pytestmark = pytest.mark.parametrize("backend", SHARDED)
# A model of a GPU and an interpreter have no time for more.
SLOW = INTERPRETED or CUDA_ON_HOST
VOCAB = 61 if INTERPRETED else 211
ALPHA = BETA = 0.3
# What sweeps take alone, what losses take together, and all statistics.
_AT_A_TIME = len(STATISTIC_NAMES) if INTERPRETED else 6
SETS: list[tuple[str, ...]] = [
    ("logprob",),
    ("logprob", "tail_logprob"),
    ("logprob", "forward_kl", "tail_logprob", "js"),
    *(tuple(STATISTIC_NAMES[i : i + _AT_A_TIME]) for i in range(0, len(STATISTIC_NAMES), _AT_A_TIME)),
    *(() if SLOW else ((name,) for name in STATISTIC_NAMES)),
    ("forward_kl", "untempered_logprob"),
]


@dataclass(frozen=True)
class Found:
    """Values [value_rows, N], and gradients of whole rows as the shards have made them."""

    values: Tensor
    student: Tensor
    teacher: Tensor | None


def _shards(borders: list[int]) -> list[Shard]:
    size, total = len(borders) - 1, borders[-1]
    return [Shard(None, rank, size, borders[rank], borders[rank + 1] - borders[rank], total) for rank in range(size)]


def shared(backend: str, call: Call, borders: list[int], coefficients: Tensor) -> Found:
    """The call with columns [borders[i], borders[i + 1]) in the i-th shard, as `parallel/statistics.py` makes it."""
    sweeps, shards = get(backend), _shards(borders)
    assert isinstance(sweeps, Sharded)

    def part(x: Tensor | None, shard: Shard) -> Tensor | None:
        return None if x is None else x[..., shard.start : shard.start + shard.width].clone()

    locals_: list[Call] = []
    for shard in shards:
        logits = part(call.logits, shard)
        assert logits is not None
        locals_.append(shard.local(call, logits, part(call.reference, shard)))
    states = torch.stack(
        [sweeps.shard_state(local, shard.start) for local, shard in zip(locals_, shards, strict=True)]
    )  # fmt: skip
    assert states[0].numel() * states.element_size() <= 64 * 4 * call.rows
    all_picked = [shard.picked(call, local) for local, shard in zip(locals_, shards, strict=True)]
    picked = None if call.labels is None else torch.stack([x for x in all_picked if x is not None]).sum(0)
    all_sums = [x for local in locals_ if (x := sweeps.shard_sums(local, states)) is not None]
    sums = torch.stack(all_sums) if all_sums else None
    finished = [sweeps.shard_finish(local, states, sums, picked) for local in locals_]
    for values, _ in finished:
        assert torch.equal(values.nan_to_num(7.25), finished[0][0].nan_to_num(7.25)), "shards differ in their bits"
    student, teacher = torch.zeros_like(call.logits), None
    if call.reference is not None:
        teacher = torch.zeros_like(call.reference)
    for shard, local, (_, state) in zip(shards, locals_, finished, strict=True):
        if shard.columns(call.vocab_size) == 0:
            continue
        ds, dt = sweeps.backward(local, state, coefficients, True, teacher is not None)
        for whole, gradient in ((student, ds), (teacher, dt)):
            if whole is not None and gradient is not None:
                whole[..., shard.start : shard.start + shard.width] = gradient
    return Found(finished[0][0], student, teacher)


def unshared(backend: str, call: Call, coefficients: Tensor) -> Found:
    one = get(backend)
    values, state = one.forward(call, True)
    student, teacher = one.backward(call, state, coefficients, True, call.reference is not None)
    assert student is not None
    return Found(values, student, None if call.reference is None else teacher)


def _rows(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Student and teacher as users have them: masks over whole shards, offsets, peaks, near rows, ties."""
    student, teacher = 3 * torch.randn(10, vocab), 3 * torch.randn(10, vocab)
    lowest = torch.finfo(dtype).min
    student[1, vocab // 4 :] = teacher[1, vocab // 4 :] = -1e4
    student[2, : vocab // 2] = teacher[2, : vocab // 2] = lowest
    student[3] += 1e4
    teacher[3] -= 1e4
    student[4, vocab // 3] += 60
    teacher[5] = student[5] + 1e-3 * torch.randn(vocab)
    # Or bfloat16 leaves the same logits, and normalisers that differ by less than a rounding: tvd has no slope there.
    teacher[5, student[5].argmax()] += 0.5
    teacher[6] = student[6]
    student[7, vocab // 2 :] = teacher[7, vocab // 2 :] = -torch.inf
    student[8, [1, vocab - 2]] = 40.0
    student[9] = teacher[9, vocab // 2] = 20.0
    return student.to(dtype), teacher.to(dtype)


def _options(vocab: int) -> Iterable[dict[str, Any]]:
    """One label a row; then tables of labels, some of them twice, elsewhere or none, and everything else."""
    labels = torch.tensor([0, vocab - 1, vocab // 2, -1, 5, vocab // 3, 7, 9, vocab // 2 - 1, 3])
    yield {"labels": labels[:, None]}
    others = torch.where(labels < 0, labels, (labels + 3).clamp_max(vocab - 1))
    yield {
        "labels": torch.stack([labels, labels, others, torch.full_like(labels, -1)], dim=-1),
        "exclude": torch.tensor([1, -1, vocab - 1, -1, -1, -1, 3, -1, 2, vocab // 2]),
        "mask": torch.tensor([True] * 8 + [False, True]),
        "temperature": torch.linspace(0.5, 2, 10),
    }


def _call(stats: tuple[str, ...], student: Tensor, teacher: Tensor, options: dict[str, Any]) -> Call:
    asked = [STATISTICS[name] for name in stats]
    temperature = options.get("temperature")
    return Call(
        logits=student,
        reference=teacher if any(s.reference for s in asked) else None,
        labels=options.get("labels") if any(s.needs_labels for s in asked) else None,
        mask=options.get("mask"),
        exclude=options.get("exclude"),
        token_parameters=None if temperature is None else torch.stack(
            [temperature, temperature, *(torch.full_like(temperature, x) for x in (ALPHA, BETA))]
        ),
        parameters=(1.0, 1.0, ALPHA, BETA),
        stats=stats,
        vocab_size=options.get("vocab_size", student.shape[-1]),
    )  # fmt: skip


def _check(backend: str, call: Call, borders: list[int]) -> None:
    """Values of each statistic by its definition, and the gradient of their sum with coefficients of their size."""
    columns = call.vocab_size
    labels = torch.zeros(call.rows, 1, dtype=torch.int64) if call.labels is None else call.labels
    rest: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "mask": call.mask, "exclude": call.exclude}
    if call.token_parameters is not None:
        rest["temperature"] = call.token_parameters[0]
    student = call.logits[..., :columns]
    teacher = student if call.reference is None else call.reference[..., :columns]
    expected, weights = [], []
    for name in call.stats:
        shape = labels.shape if STATISTICS[name].per_label else labels.shape[:1]
        sign = torch.randn(shape).sign() * (torch.rand(shape) + 0.5)
        value = oracle.evaluate(name, student, teacher, labels, ignore_index=-1, **rest).value
        weight = (sign / value.abs().clamp_min(1)).float() * STATISTICS[name].differentiable
        weights.append(weight)
        expected.append(
            oracle.evaluate(name, student, teacher, labels, ignore_index=-1, cotangent=weight, **rest)
        )  # fmt: skip
    table = torch.cat([w.reshape(call.rows, -1).T for w in weights]).contiguous()
    assert len(table) == value_rows(call.stats, call.labels_per_row)
    found = shared(backend, call, borders, table)
    at = 0
    for name, of in zip(call.stats, expected, strict=True):
        count = call.labels_per_row if STATISTICS[name].per_label else 1
        check_value(found.values[at : at + count].T.reshape(of.value.shape), of.value, call.logits.dtype)
        at += count
    sides = [(found.student, "student")]
    if found.teacher is not None:
        sides.append((found.teacher, "teacher"))
    for got, side in sides:
        exact = sum(getattr(of, side) for of in expected)
        floor = sum(getattr(of, f"{side}_floor") for of in expected)
        check_gradient(got[..., :columns], exact, floor)
        assert not got[..., columns:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_those_of_whole_rows(dtype: torch.dtype, backend: str) -> None:
    student, teacher = _rows(VOCAB, dtype)
    for several, options in enumerate(_options(VOCAB)):
        for i, stats in enumerate(SETS):
            if INTERPRETED and (i + several) % 2:
                continue
            call = _call(stats, student, teacher, options)
            world = 3 if SLOW else 2 + (i + several) % 4
            _check(backend, call, uneven(VOCAB, world, empty=several == 1))


def test_padding_and_many_shards(backend: str) -> None:
    """More than a warp has lanes. The last ones have padding, which may hold anything, and nothing else."""
    stats = ("logprob", "entropy", "argmax", "tail_logprob", "forward_kl", "hellinger", "js", "renyi")
    vocab, width = 34 if INTERPRETED else 170, 4
    shards = vocab // width + 2
    student, teacher = (x[:3] for x in _rows(shards * width, torch.float32))
    student[:, vocab:] = torch.nan
    labels = torch.tensor([[0, 0, vocab - 1], [vocab // 2, 1, 1], [-1, vocab - 2, vocab - 3]])
    call = _call(stats, student, teacher, {"labels": labels, "vocab_size": vocab})
    _check(backend, call, [i * width for i in range(shards + 1)])


@pytest.mark.skipif(INTERPRETED, reason="under TRITON_INTERPRET=1 smaller rows have several slices")
def test_shards_of_several_slices(backend: str) -> None:
    vocab = 50_003
    student, teacher = (x[[1, 5, 9]] for x in _rows(vocab, torch.bfloat16))
    labels = torch.randint(vocab, (3, 40))
    labels[0, :3], labels[2, 5:] = labels[0, 3], -1
    for stats in (("logprob", "tail_logprob", "entropy", "argmax"), ("forward_kl", "hellinger", "js", "renyi")):
        call = _call(stats, student, teacher, {"labels": labels, "exclude": torch.tensor([3, vocab - 1, -1])})
        _check(backend, call, [0, 17_000, 17_008, vocab])


def test_small_divergences_keep_their_digits(backend: str) -> None:
    vocab = 300 if SLOW else 5000
    student, teacher = near(2 * torch.randn(4, vocab) + 50)
    stats = ("forward_kl", "reverse_kl", "hellinger", "js", "jeffreys")
    call = _call(stats, student, teacher, {})
    values = shared(backend, call, uneven(vocab, 3), torch.ones(len(stats), call.rows)).values
    for name, value in zip(stats, values, strict=True):
        expected = oracle.evaluate(name, student, teacher, beta=BETA).value
        assert (expected < 1e-5).all()
        assert ((value.double() - expected).abs() <= 1e-2 * expected).all(), name


def test_rows_without_a_finite_value(backend: str) -> None:
    """Masks in one of two rows, of any size, and rows that are no distributions: as the backend has them whole."""
    student, teacher = 2 * torch.randn(10, VOCAB), 2 * torch.randn(10, VOCAB)
    half = VOCAB // 2
    student[0, :half], teacher[1, half:] = -torch.inf, -torch.inf
    student[2, :half], teacher[3, half:] = -1e4, -1e9
    student[4, 3], teacher[5, VOCAB - 1] = torch.nan, torch.nan
    student[6, half], teacher[6, 0] = torch.inf, torch.inf
    student[7], teacher[8] = -torch.inf, -torch.inf
    student[9, :half], teacher[9, half:] = torch.finfo(torch.float32).min, -torch.inf
    labels = torch.tensor([1, VOCAB - 1, 2, 3, 4, 5, 6, 7, -1, half])[:, None]
    for stats in [("logprob", "forward_kl", "hellinger", "argmax", "js", "renyi")] if INTERPRETED else SETS:
        call = _call(stats, student, teacher, {"labels": labels})
        counted = torch.tensor([float(STATISTICS[name].differentiable) for name in stats])
        coefficients = counted[:, None] * torch.rand(len(stats), call.rows)
        found = shared(backend, call, uneven(VOCAB, 3), coefficients)
        whole = unshared(backend, call, coefficients)
        torch.testing.assert_close(found.values, whole.values, rtol=2e-6, atol=2e-6, equal_nan=True)
        for got, expected in ((found.student, whole.student), (found.teacher, whole.teacher)):
            if got is None or expected is None:
                assert got is expected
                continue
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.isinf() * got.sign(), expected.isinf() * expected.sign())
            largest = expected.where(expected.isfinite(), 0.0).abs().amax(-1, keepdim=True)
            error = (got - expected).where(expected.isfinite(), 0.0).abs()
            assert (error <= 1e-5 * largest + 1e-7).all(), stats


def test_strides_that_the_backend_does_not_take(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is chosen for whole rows that nobody has; here with the gradient, of a group of one."""
    monkeypatch.setattr(
        statistics, "gathered", lambda _, table, more: (table[None], None if more is None else more[None])
    )  # fmt: skip
    strided = torch.randn(2, 2, 2, 2, 2, 9).permute(4, 3, 2, 1, 0, 5)
    found = []
    for logits in (strided, strided.contiguous()):
        leaf = logits.detach().requires_grad_()
        call = _call(("entropy",), logits.contiguous(), logits, {})
        values = statistics.statistics(Shard(None, 0, 1, 0, 9, 9), call, leaf, None, backend)
        values.sum().backward()
        assert leaf.grad is not None
        found.append((values.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any()
