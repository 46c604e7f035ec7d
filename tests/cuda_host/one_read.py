"""Calls that know their coefficients, on the host's model of a GPU: which kernel ran, and whether it was right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import oracle
import pytest
import torch
from checks import check_gradient, check_value
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.backends import Call, get
from kldiv_kernels.registry import STATISTICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Option = float | Tensor | None
# js leaves grad_logq / q in the teacher's bfloat16 slot as float16, for its gradient: half an ulp of that.
PARKED = 2.0**-11
# What check_gradient multiplies a floor by.
_OF_FLOOR = 5e-7
_DEFAULTS: dict[str, Option] = {
    "temperature": 1.0, "reference_temperature": None, "alpha": 0.5, "beta": 0.5, "mask": None, "ignore_index": -100,
    "vocab_size": None, "exclude": None,
}  # fmt: skip


@dataclasses.dataclass
class Machine:
    """The model's device and the plan of the next calls; gone with the test's environment."""

    environment: pytest.MonkeyPatch

    def __call__(
        self,
        cluster: int = 4,
        stages: int = 2,
        *,
        clusters: int = 2,
        seed: int = 1,
        device: str = "sm_90",
        largest: int = 16,
        plan: str | None = None,
    ) -> None:
        chosen = f"cluster={cluster},stages={stages}" if plan is None else plan
        for name, value in (
            ("KLDIV_CUDA_PLAN", chosen), ("KLDIV_HOST_CLUSTERS", clusters), ("KLDIV_HOST_SEED", seed),
            ("KLDIV_HOST_DEVICE", device), ("KLDIV_HOST_LARGEST_CLUSTER", largest),
        ):  # fmt: skip
            self.environment.setenv(name, str(value))


def uneven(cluster: int) -> tuple[int, int]:
    """Columns of a CTA's slice, and of a row whose last CTA has eight; no plan has more than eight warps' worth."""
    slice_columns = 512 if cluster == 1 else min(64 * cluster, 576)
    return slice_columns, (cluster - 1) * slice_columns + 8 + 512 * (cluster == 1)


def pair(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    return (spread * torch.randn(rows, columns)).to(dtype), (spread * torch.randn(rows, columns)).to(dtype)


def prepare(
    stats: tuple[str, ...], logits: Tensor, reference: Tensor | None, labels: Tensor | None = None, **options: Option
) -> Call:
    given = {**_DEFAULTS, **options}
    return inputs.prepare("test", logits, reference, labels, stats=[STATISTICS[x] for x in stats], **given)  # type: ignore[arg-type]


def run(call: Call, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Values [stats, N] and the gradient of Σ coefficients · values."""
    values, dlogits, _ = get("cuda").one_read(call, coefficients, True, False)  # type: ignore[attr-defined]
    return values, dlogits


def kernel(call: Call, coefficients: Tensor) -> str:
    """What the launcher says of its choice when the model gives up at once. Masked rows would be launched before."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("KLDIV_HOST_STEPS", "1")
        with pytest.raises(RuntimeError, match="no end after 1 steps") as error:
            run(dataclasses.replace(call, mask=None), coefficients)
    return str(error.value)


def some_coefficients(stats: tuple[str, ...], rows: int) -> Tensor:
    """Of both signs, none near 0, all different."""
    return (torch.rand(len(stats), rows) + 0.5) * torch.randn(len(stats), rows).sign()


def _parked(call: Call, beta: float, weight: Tensor) -> Tensor:
    """|∂js/∂log q|/τ · |weight|, per column: what the rounding of a parked ratio is relative to."""
    assert call.reference is not None
    columns = call.vocab_size
    scales = call.parameters[:2] if call.token_parameters is None else call.token_parameters[:2, :, None].double()
    rows = [
        x.reshape(-1, x.shape[-1])[:, :columns].double() / y
        for x, y in zip((call.logits, call.reference), scales, strict=True)
    ]
    if call.exclude is not None:
        rows = [x.masked_fill(torch.arange(columns) == call.exclude[:, None], -torch.inf) for x in rows]
    q, p = (x.softmax(-1) for x in rows)
    terms = (1 - beta) * q * (q / (beta * p + (1 - beta) * q)).log()
    size = terms.nan_to_num(0.0).abs() * weight.double().abs()[:, None] / scales[0]
    return size.reshape(*call.logits.shape[:-1], columns)


def check(
    stats: tuple[str, ...],
    logits: Tensor,
    reference: Tensor | None,
    labels: Tensor | None = None,
    *,
    coefficients: Tensor | None = None,
    ran: Callable[[str], bool] = lambda kernel: "one-read" in kernel,
    **options: Option,
) -> tuple[Tensor, Tensor]:
    """Values and gradient, after comparing both with the oracle."""
    call = prepare(stats, logits, reference, labels, **options)
    weights = some_coefficients(stats, call.rows) if coefficients is None else coefficients
    chosen = kernel(call, weights)
    assert ran(chosen), chosen
    values, gradient = run(call, weights)
    assert gradient.dtype == logits.dtype
    columns = int(options.pop("vocab_size", None) or logits.shape[-1])  # type: ignore[arg-type]
    leading = logits.shape[:-1]
    expected, floor = torch.zeros(*leading, columns, dtype=torch.float64), torch.zeros(*leading, 1)
    seen = None if reference is None else reference[..., :columns]
    for name, value, weight in zip(stats, values, weights, strict=True):
        answer = oracle.evaluate(
            name, logits[..., :columns], seen, labels, cotangent=weight.reshape(leading), **options
        )  # fmt: skip
        check_value(value.reshape(leading), answer.value)
        expected, floor = expected + answer.student, floor + answer.student_floor
        beta = options.get("beta", 0.5)
        if name == "js" and logits.dtype == torch.bfloat16 and 0 < beta < 1:  # type: ignore[operator]
            floor = floor + _parked(call, beta, weight) * PARKED / _OF_FLOOR  # type: ignore[arg-type]
    check_gradient(gradient[..., :columns], expected, floor)
    assert not gradient[..., columns:].any()
    return values, gradient
