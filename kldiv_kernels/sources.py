"""Where the logits of a call come from, and what is asked of them: values, and a loss with its gradient.

The public functions check and put together; what they ask is the same for logits that are there (`Logits`) and for
those that hidden states and a head make chunk by chunk (`linear`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kldiv_kernels import autograd, ops
from kldiv_kernels.backends import Call, get, scale_in_place

# Gives a scalar the gradients that were found with its parts.
Attach = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PolicyTokens:
    """What a token-level policy loss knows before the logits, as the operators take it.

    coefficients [statistics, N], tokens [5, N] (csrc/policy.h), float32.
    """

    coefficients: Tensor
    tokens: Tensor
    term: str
    kl: str
    bounds: list[float]


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher on k tokens, and on the rest as one more; `scale` [N] is what each row counts."""

    logprobs: Tensor
    scale: Tensor
    kind: str
    alpha: float
    beta: float


class Source(Protocol):
    """`logits` and `reference` are what arguments are checked against; only their shape, dtype and device are asked.

    Of a `Call` everything but its logits and reference is used.
    """

    @property
    def logits(self) -> Tensor: ...

    @property
    def reference(self) -> Tensor | None: ...

    def wanted(self) -> tuple[bool, bool]:
        """Whether the student's side and the reference's want a gradient."""

    def waits(self) -> bool:
        """Whether a gradient waits for the loss scale, without which most of it would round to 0 (float16)."""

    def known_beforehand(self, where: str, why_not: str | None, call: Call, backend: str) -> bool:
        """Whether the gradient may be found with the values; `why_not` is a reason against it."""

    def statistics(self, call: Call, backend: str) -> Tensor:
        """Values [value_rows, N], differentiable."""

    def loss(self, call: Call, backend: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """Σ coefficients · values, with the gradients of both sides, and the values [value_rows, N], without."""

    def policy(self, call: Call, backend: str, known: PolicyTokens) -> tuple[Tensor, Attach]:
        """Values [value_rows, N], and what gives the loss of them its gradient, of the student's side."""

    def topk(self, call: Call, backend: str, teacher: TopKTeacher) -> tuple[Tensor, Attach]:
        """Divergences [N], and what gives Σ scale · divergence its gradient, of the student's side."""


@dataclass(frozen=True)
class Logits:
    """Logits as they are given. `in_place`: the gradient of a loss takes their place."""

    logits: Tensor
    reference: Tensor | None = None
    in_place: bool = False

    def wanted(self) -> tuple[bool, bool]:
        grad = torch.is_grad_enabled()
        return (
            grad and self.logits.requires_grad,
            grad and self.reference is not None and self.reference.requires_grad,
        )

    def waits(self) -> bool:
        pairs = zip(self.wanted(), (self.logits, self.reference), strict=True)
        return any(wanted and x is not None and x.dtype == torch.float16 for wanted, x in pairs)

    def known_beforehand(self, where: str, why_not: str | None, call: Call, backend: str) -> bool:
        student, reference = self.wanted()
        if why_not is None and self.waits():
            why_not = "the gradient of float16 logits waits for the loss scale"
        if self.in_place and student:
            refusal = self._refuses_in_place(why_not, call, backend)
            if refusal is not None:
                raise ValueError(f"{where}: in_place is True, but {refusal}; leave it out")
        return (student or reference) and why_not is None and not autograd.transformed()

    def _refuses_in_place(self, why_not: str | None, call: Call, backend: str) -> str | None:
        # First, because torch.compile cannot trace the other questions.
        if torch.compiler.is_compiling():
            return "torch.compile takes no function that writes into its arguments here"
        if autograd.transformed():
            return "torch.func transforms no function that writes into its arguments"
        logits, base = self.logits, self.logits._base
        if any(x is not None and x.is_leaf and x.requires_grad for x in (logits, base)):
            return "logits are a leaf, whose gradient belongs into .grad"
        if base is not None and not base.requires_grad:
            return "logits are a view of a tensor that autograd does not follow, as what is local of a DTensor is"
        if _overlaps_itself(logits):
            return f"rows of logits are the same memory (an expanded view, strides {list(logits.stride())})"
        if self.reference is not None and _overlap(logits, self.reference):
            return "reference_logits are the same memory"
        return why_not or get(backend).refuses_in_place(call, self.wanted()[1])

    def statistics(self, call: Call, backend: str) -> Tensor:
        return ops.statistics(call, backend, any(self.wanted()))

    def loss(self, call: Call, backend: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        student, reference = self.wanted()
        if not (self.in_place and student):
            return ops.loss(call, backend, coefficients, student, reference)

        def write() -> tuple[Tensor, list[Tensor]]:
            values, _, dreference = get(backend).one_read(_detached(call), coefficients, True, reference, True)
            return values, [dreference] if reference and dreference is not None else []

        values, attach = self._written(write)
        return attach(autograd.weighted_sum(coefficients, values)), values

    def policy(self, call: Call, backend: str, known: PolicyTokens) -> tuple[Tensor, Attach]:
        arguments = (known.coefficients, known.tokens, known.term, known.kl, known.bounds)
        if self.in_place:
            one_read = ops.one_read_policy(backend).policy
            return self._written(lambda: (one_read(_detached(call), *arguments, True)[0], []))
        values, dlogits = ops.policy_loss(call, backend, *arguments)
        return values, lambda loss: ops.with_gradients(loss, [self.logits], [dlogits])

    def topk(self, call: Call, backend: str, teacher: TopKTeacher) -> tuple[Tensor, Attach]:
        arguments = (teacher.logprobs, teacher.scale, teacher.kind, teacher.alpha, teacher.beta)
        if self.in_place:
            one_read = ops.one_read_topk(backend).topk
            return self._written(lambda: (one_read(_detached(call), *arguments, True)[1], []))
        divergences, dlogits = ops.topk_loss(call, backend, *arguments)
        return divergences, lambda loss: ops.with_gradients(loss, [self.logits], [dlogits])

    def _written(self, write: Callable[[], tuple[Tensor, list[Tensor]]]) -> tuple[Tensor, Attach]:
        """What is found as the gradient takes the logits' place, and what gives it to a loss."""
        tensors = [self.logits]
        if self.reference is not None and self.wanted()[1]:
            tensors.append(self.reference)
        nothing, found = autograd.InPlace.apply(scale_in_place, write, *tensors)  # type: ignore[no-untyped-call]
        return found, lambda loss: loss.detach() + nothing


def _detached(call: Call) -> Call:
    reference = None if call.reference is None else call.reference.detach()
    return replace(call, logits=call.logits.detach(), reference=reference)


def _overlaps_itself(x: Tensor) -> bool:
    """Whether two elements are the same memory, as in an expanded view."""
    behind = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= behind:
            return True
        behind += max(0, size - 1) * stride
    return False


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether a row of one tensor shares memory with a row of the other; base[:, :V] and base[:, V:] do not."""
    if a.device != b.device or a.numel() == 0 or b.numel() == 0:
        return False
    width, other_width = (x.shape[-1] * x.element_size() for x in (a, b))
    if max(a.data_ptr(), b.data_ptr()) >= min(_last_row(a) + width, _last_row(b) + other_width):
        return False
    rows, others = _row_addresses(a), _row_addresses(b).sort().values
    begun_before_end = torch.searchsorted(others, rows + width)
    ended_before_begin = torch.searchsorted(others + other_width, rows, right=True)
    return bool((begun_before_end > ended_before_begin).any())


def _last_row(x: Tensor) -> int:
    steps = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return x.data_ptr() + sum((size - 1) * stride for size, stride in steps) * x.element_size()


def _row_addresses(x: Tensor) -> Tensor:
    """[N], on the CPU."""
    rows = torch.tensor([x.data_ptr()], device="cpu")
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        rows = (rows[:, None] + torch.arange(size, device="cpu") * (stride * x.element_size())).reshape(-1)
    return rows
