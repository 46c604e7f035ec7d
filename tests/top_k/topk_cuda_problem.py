"""Top-k divergences as the cuda backend is given them, and what they are in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from checks import check_gradient, check_value
from cuda_host.one_read import Option, prepare
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends import Call, OneReadTopK, get

TWO_SWEEP = "two-sweep"
PLANS = [f"cluster={c},stages={s}" for c, s in itertools.product((1, 2, 4, 8, 16), (1, 2, 3, 4))]
COLUMNS = 776


@dataclasses.dataclass(frozen=True)
class Problem:
    call: Call
    teacher: Tensor
    scale: Tensor
    kind: str
    alpha: float = 0.5
    beta: float = 0.5

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values, divergences and dlogits."""
        backend = get("cuda")
        assert isinstance(backend, OneReadTopK)
        return backend.topk(self.call, self.teacher, self.scale, self.kind, self.alpha, self.beta)

    def kernel(self) -> str:
        """What the launcher says of its choice when the model gives up at once."""
        call = dataclasses.replace(self.call, mask=None)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("KLDIV_HOST_STEPS", "1")
            with pytest.raises(RuntimeError, match="no end after 1 steps") as error:
                dataclasses.replace(self, call=call).run()
        return str(error.value)

    def rows(self, index: slice | list[int] | Tensor) -> Problem:
        c = self.call
        call = dataclasses.replace(
            c, logits=c.logits[index], labels=None if c.labels is None else c.labels[index],
            mask=None if c.mask is None else c.mask[index],
        )  # fmt: skip
        return dataclasses.replace(self, call=call, teacher=self.teacher[index], scale=self.scale[index])

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same in float64, composed of statistics."""
        leaf = self.call.logits.double().requires_grad_()
        exact = dataclasses.replace(self.call, logits=leaf)
        values = ops.statistics(exact, "reference", False)
        assert exact.labels is not None
        none = torch.zeros_like(self.teacher, dtype=torch.bool)
        none[:, : exact.labels_per_row] = exact.labels < 0
        outcomes = torch.where(none, -torch.inf, values.T)
        parameters = {"alpha": self.alpha, "beta": self.beta, "mask": exact.mask}
        divergences = kk.token_stats(outcomes, self.teacher.double(), stats=(self.kind,), **parameters)[self.kind]
        # A row of weight 0 takes no part, whatever its divergence is: 0 · inf is not NaN here.
        weighted = torch.where(self.scale == 0, 0.0, self.scale.double() * divergences)
        (gradient,) = torch.autograd.grad(weighted.sum(), leaf)
        return values.detach(), divergences.detach(), gradient


def problem(
    logits: Tensor,
    labels: Tensor,
    kind: str = "forward_kl",
    tail: str = "bucket",
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    scale: Tensor | None = None,
    near: float = 1.0,
    **options: Option,
) -> Problem:
    """A teacher of its own, at a distance from the student."""
    rows, count = labels.shape
    theirs = (
        torch.where(labels < 0, -torch.inf, near * torch.randn(rows, count))
        .log_softmax(-1)
        .nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    )
    if tail != "renormalize":
        theirs = torch.cat([theirs + torch.tensor(0.7).log(), torch.tensor(0.3).log().expand(rows, 1)], -1)
    if tail == "renormalize_teacher":
        theirs[:, -1] = -torch.inf
    stats = ("logprob",) if tail == "renormalize" else ("logprob", "tail_logprob")
    call = prepare(stats, logits, None, labels.reshape(*logits.shape[:-1], count), ignore_index=-1, **options)
    weights = torch.rand(rows) + 0.5 if scale is None else scale
    return Problem(call, theirs, weights, kind, alpha, beta)


def some_labels(rows: int, columns: int, count: int) -> Tensor:
    return torch.stack([torch.randperm(columns)[:count] for _ in range(rows)])


def logits_of(rows: int, columns: int = COLUMNS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (2 * torch.randn(rows, columns)).to(dtype)


def check(given: Problem, form: str = "one-read") -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels of that form give, after comparing it with float64."""
    chosen = given.kernel()
    assert form in chosen, chosen
    values, divergences, gradient = given.run()
    wanted = given.expected()
    check_value(values, wanted[0].float())
    check_value(divergences, wanted[1].float())
    assert gradient.dtype == given.call.logits.dtype
    temperature = given.call.parameters[0] if given.call.token_parameters is None else 0.5
    floor = 2 * given.scale.abs().reshape(*gradient.shape[:-1], 1) / temperature
    finite = wanted[2].isfinite().all(-1)
    check_gradient(gradient[finite], wanted[2][finite], floor[finite])
    return values, divergences, gradient
