"""Every kernel on exactly allocated tensors: run by `make sanitize`, where reading or writing past one is fatal."""

from __future__ import annotations

import os

import pytest
import torch

import kldiv_kernels as kk
from kldiv_kernels.backends.native import LIBRARY
from kldiv_kernels.registry import STATISTICS, divergence_names

pytestmark = pytest.mark.skipif(kk.backends()["cpu"] != "available", reason="the compiled part is not built")

DIFFERENTIABLE = [name for name, statistic in STATISTICS.items() if statistic.differentiable and statistic.builtin]


def test_the_library_is_the_one_meant() -> None:
    folder = os.environ.get("KLDIV_EXPECT_UNDER")
    if folder is None:
        pytest.skip("only the sanitized run says where its library lies")
    assert LIBRARY.is_relative_to(folder)
    assert b"__asan_init" in LIBRARY.read_bytes()


def rows(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 3, 15, 17, 2047, 2049, 8191, 8209])
@pytest.mark.parametrize("count", [1, 9])
def test_every_statistic_stays_inside_its_tensors(dtype: torch.dtype, columns: int, count: int) -> None:
    student = rows((count, columns), dtype, 0).requires_grad_()
    teacher = rows((count, columns), dtype, 1).requires_grad_()
    labels = torch.arange(count)[:, None].expand(count, min(columns, 2)) % columns
    exclude = torch.arange(count) % columns if columns > 3 else None
    stats = kk.token_stats(student, teacher, labels, stats=list(STATISTICS), exclude=exclude, backend="cpu")
    sum(stats[name].float().clamp(-9, 9).sum() for name in DIFFERENTIABLE).backward()
    for name in divergence_names():
        mask, alpha = torch.arange(count) % 3 != 1, 0.7 if STATISTICS[name].alpha else None
        kk.divergence_loss(student, teacher, name, mask=mask, alpha=alpha, backend="cpu").mul(0.5).backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 3, 17, 63, 65, 2049, 8209])
@pytest.mark.parametrize("count", [1, 9])
def test_the_largest_columns_and_their_divergences(dtype: torch.dtype, columns: int, count: int) -> None:
    student, teacher = rows((count, columns), dtype, 6).requires_grad_(), rows((count, columns), dtype, 7)
    for k in {1, min(columns, 64), columns}:
        top = kk.topk(teacher, k, backend="cpu")
        for tail in ("bucket", "renormalize"):
            loss = kk.topk_divergence_loss(student, top.ids, top.values, "js", tail=tail, backend="cpu")
            loss.backward()
            assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_views_and_padding_are_read_only_where_they_may_be(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = rows((2, 5, 20_011), torch.bfloat16, 2).requires_grad_()
        teacher = rows((2, 5, 20_003), torch.float32, 3)
        loss = kk.js_divergence(whole[:, :-1], teacher[:, 1:], vocab_size=20_001, temperature=0.5)
        loss.backward()
        assert whole.grad is not None
        assert (whole.grad[..., 20_001:] == 0).all()
        assert (whole.grad[:, -1] == 0).all()
        assert (whole.grad[:, :-1, :20_001] != 0).any()
    finally:
        torch.set_num_threads(before)


def test_infinite_and_missing_columns() -> None:
    student, teacher = rows((6, 2_050), torch.float32, 4), rows((6, 2_050), torch.float32, 5)
    student[1, :1_030] = -torch.inf
    teacher[2] = -torch.inf
    student[3, 7] = torch.nan
    teacher[4, 2_049] = torch.inf
    student[5] *= 1e7
    student.requires_grad_()
    stats = kk.token_stats(student, teacher, torch.zeros(6, dtype=torch.int64), stats=list(STATISTICS), backend="cpu")
    sum(stats[name][0] + stats[name][5] for name in DIFFERENTIABLE).backward()
    assert stats.entropy[[0, 1, 5]].isfinite().all()
    assert stats.forward_kl[[2, 3, 4]].isnan().all()
