"""Top-k kernels on the host's model of a GPU: which of the two forms runs, and any split and order of the rows."""

from __future__ import annotations

import pytest
import torch
from checks import CUDA_ON_HOST
from cuda_host.one_read import Machine, uneven
from topk_cuda_problem import COLUMNS, PLANS, TWO_SWEEP, check, logits_of, problem, some_labels

if not CUDA_ON_HOST:
    pytest.skip("runs under KLDIV_CUDA_HOST=1", allow_module_level=True)


@pytest.mark.parametrize("plan", PLANS)
def test_plans_and_rows(plan: str, machine: Machine) -> None:
    cluster, stages = (int(part.split("=")[1]) for part in plan.split(","))
    _, columns = uneven(cluster)
    for rows in (1, 2, 2 * stages + 3):
        machine(cluster, stages, clusters=2 if rows > 2 else 3, seed=cluster + stages)
        labels = some_labels(rows, columns, 24)
        labels[0, 5:] = -1
        check(problem(logits_of(rows, columns), labels))
        check(problem(logits_of(rows, columns, torch.float32), labels, "js"))


@pytest.mark.parametrize("kept", [[0], [8], [0, 8], [1, 2, 3, 5, 6, 7], []], ids=str)
@pytest.mark.parametrize("stages", [1, 3])
def test_mask(kept: list[int], stages: int, machine: Machine) -> None:
    machine(4, stages)
    logits = logits_of(9)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[kept] = True
    logits[~mask] = torch.nan
    given = problem(logits, some_labels(9, COLUMNS, 12), mask=mask)
    values, divergences, gradient = given.run()
    assert not values[:, ~mask].any()
    assert not divergences[~mask].any()
    assert not gradient[~mask].any()
    if kept:
        check(given.rows(mask))
        assert torch.equal(given.rows(mask).run()[2], gradient[mask])


@pytest.mark.parametrize(
    ("columns", "count", "dtype", "device"),
    [
        (COLUMNS, 30, torch.float16, "sm_90"), (2600, 1025, torch.float32, "sm_90"), (775, 30, torch.float32, "sm_90"),
        (COLUMNS, 30, torch.bfloat16, "sm_80"),
    ],
)  # fmt: skip
def test_what_takes_two_sweeps(columns: int, count: int, dtype: torch.dtype, device: str, machine: Machine) -> None:
    machine(device=device)
    check(problem(logits_of(3, columns, dtype), some_labels(3, columns, count)), TWO_SWEEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_any_order_and_batch(dtype: torch.dtype, machine: Machine) -> None:
    logits, labels = logits_of(7, 1032, dtype), some_labels(7, 1032, 100)
    labels[2, 50:] = labels[2, :50]
    given = problem(logits, labels, "js")
    machine(4, 2)
    expected = given.run()
    for seed in range(30):
        machine(4, 1 + seed % 3, clusters=1 + seed % 4, seed=seed)
        rows = [slice(None), [seed % 7], [6, 2, 3]][seed % 3]
        values, divergences, gradient = given.rows(rows).run()
        assert torch.equal(values, expected[0][:, rows]), seed
        assert torch.equal(divergences, expected[1][rows]), seed
        assert torch.equal(gradient, expected[2][rows]), seed
