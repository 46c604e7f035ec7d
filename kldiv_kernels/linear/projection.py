r"""A teacher for forward KL in [N, H] numbers, where the student's head is frozen.

With z = W h + b the student's logits, KL(p‖q) = logsumexp(z/τ) − (⟨Pᵀ, h⟩ + Σ p b)/τ − H(p), P = Σ_j p_j W_j. P, Σ p b
and H(p) do not change while W and b do not: they are all that forward KL wants of a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import autograd, inputs, registry
from kldiv_kernels.backends import Call, get
from kldiv_kernels.choices import Backend
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.linear.chunks import Rows
from kldiv_kernels.linear.gemm import Gemm
from kldiv_kernels.linear.head import Side
from kldiv_kernels.linear.source import AnyHead, HiddenStates, hidden_states
from kldiv_kernels.linear.work import Task, run


@dataclass(frozen=True)
class TeacherProjection:
    """What `teacher_projection` returns, float32: projection [*, H], offset [*] and entropy [*] in nats.

    vocab_size: the columns that they were summed over.
    """

    projection: Tensor
    offset: Tensor
    entropy: Tensor
    vocab_size: int


@torch.no_grad()
def teacher_projection(
    head: AnyHead,
    reference_logits: Tensor | None = None,
    *,
    reference_hidden: Tensor | None = None,
    reference_head: AnyHead | None = None,
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    rows_per_chunk: int | None = None,
    backend: Backend = "auto",
) -> TeacherProjection:
    """The teacher as forward KL sees it through a frozen student head: H + 2 numbers a token in place of V.

    `linear_divergence_loss(hidden, head, kind="forward_kl", reference_projection=…)` is then KL(teacher ‖ student) over
    the whole vocabulary, without the teacher, and so is its gradient by the hidden states.

    Args:
        head: the student's: a weight [V, H], `nn.Linear` or `kk.Head` without a softcap. It has to stay as it is.
        reference_logits: [*, V], the teacher's; or reference_hidden and reference_head, as in `linear_token_stats`.
        temperature: of the teacher's softmax, a float or [*]. mask: where it is 0 the row is not read, and gets 0.
        vocab_size, rows_per_chunk, backend: see `linear_token_stats`.

    Returns: TeacherProjection, without gradient.

    Raises: TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> import torch, kldiv_kernels as kk
    >>> head, hidden, teacher = torch.randn(50, 8), torch.randn(4, 8), torch.randn(4, 50)
    >>> known = kk.teacher_projection(head, teacher)
    >>> loss = kk.linear_divergence_loss(hidden, head, kind="forward_kl", reference_projection=known)
    >>> torch.allclose(loss, kk.forward_kl(hidden @ head.T, teacher), atol=1e-5)
    True
    """
    where = "teacher_projection"
    if reference_logits is None and reference_hidden is None:
        raise ValueError(f"{where}: reference_logits is None; pass them, or reference_hidden and reference_head")
    leading = (reference_logits if reference_hidden is None else reference_hidden).shape[:-1]  # type: ignore[union-attr]
    weight = _weight(head)
    # Of the student the head alone is there: hidden states of its width stand for those to come.
    nobody = weight.new_zeros(1).expand(*leading, weight.shape[-1])
    source = hidden_states(
        where, nobody, head, reference_hidden, reference_head, reference_logits, rows_per_chunk=rows_per_chunk
    )  # fmt: skip
    _linear_checked(where, source.student)
    theirs, columns = source.reference, inputs.shared_columns(where, source.logits, source.reference, vocab_size)
    assert theirs is not None
    call = inputs.prepare(
        where, theirs, None, None, stats=[registry.STATISTICS[name] for name in ("entropy", "logsumexp")],
        temperature=temperature, reference_temperature=None, alpha=0.5, beta=0.5, mask=mask, ignore_index=-100,
        vocab_size=columns, exclude=None,
    )  # fmt: skip
    return _projected(source, call, inputs.select(call, backend, where), leading)


def _projected(source: HiddenStates, call: Call, backend: str, leading: torch.Size) -> TeacherProjection:
    """Of a call of the teacher's statistics: the gradient of a logsumexp is its softmax over the temperature."""
    student, teacher, columns = source.student, source.other, call.vocab_size
    assert teacher is not None
    task = Task(teacher, None, call, backend, torch.float32, source.rows)
    gemm = Gemm(student.weight.detach()[:columns])
    bias = None if student.bias is None else student.bias.detach()[:columns].to(torch.float32)
    projection = student.weight.new_zeros((task.count, student.weight.shape[1]), dtype=torch.float32)
    offset = projection.new_zeros(task.count)

    def turn(of_rows: Call, rows: Rows, in_place: bool) -> tuple[Tensor, None, None]:
        if isinstance(teacher, Tensor):
            # A copy, in which the softmax is not rounded.
            of_rows = replace(of_rows, logits=of_rows.logits[:, :columns].to(torch.float32))
        if of_rows.token_parameters is None:
            temperatures = offset.new_full((of_rows.rows,), of_rows.parameters[0])
        else:
            temperatures = of_rows.token_parameters[0]
        wanted = torch.stack([torch.zeros_like(temperatures), temperatures])
        values, softmax, _ = get(backend).one_read(of_rows, wanted, True, False, in_place)
        assert softmax is not None
        projection[rows] = gemm.times_weight_exactly(softmax)
        if bias is not None:
            offset[rows] = softmax @ bias
        return values, None, None

    (entropy, _), _ = run(task, [False] * 6, turn)
    shaped = projection.reshape(*leading, -1), offset.reshape(leading), entropy.reshape(leading)
    return TeacherProjection(*shaped, columns)


@dataclass(frozen=True)
class Projected(HiddenStates):
    """A `Source` of forward KL: the student's logsumexp is made of logits, the rest is a sum over H."""

    given: Tensor
    known: TeacherProjection

    def statistics(self, call: Call, backend: str) -> Tensor:
        return super().statistics(_logsumexp_of(call), backend) + self._rest(call)

    def loss(self, call: Call, backend: str, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        total, values = super().loss(_logsumexp_of(call), backend, coefficients)
        rest = self._rest(call)
        return total + autograd.weighted_sum(coefficients, rest), values + rest.detach()

    def _rest(self, call: Call) -> Tensor:
        """[1, N]: − ⟨P, h⟩ s/τ − Σ p b s/τ − H(p)."""
        mean = (self.given.to(torch.float32) * self.known.projection).sum(-1) + self.known.offset
        temperature = call.parameters[0] if call.token_parameters is None else call.token_parameters[0]
        rest = -(self.student.scale * mean.reshape(-1) / temperature + self.known.entropy.reshape(-1))
        return (rest if call.mask is None else torch.where(call.mask, rest, 0.0))[None]


def _logsumexp_of(call: Call) -> Call:
    return replace(call, reference=None, stats=("logsumexp",))


def projected(
    where: str, source: HiddenStates, hidden: Tensor, known: TeacherProjection, kind: str, options: dict[str, Any]
) -> Projected:
    """The source for a teacher that is known by its projection; `options` of the loss get its vocabulary."""
    _checked(where, source, known, kind, source.logits.shape[:-1], options["vocab_size"])
    for name in ("reference_temperature", "exclude"):
        if options[name] is not None:
            raise ValueError(
                f"{where}: {name} is given beside reference_projection, which is made already; leave it out"
            )
    options["vocab_size"] = known.vocab_size
    # A reference of the same shape: the divergence is of two.
    return Projected(where, source.student, None, source.logits, source.logits, source.rows, None, True, hidden, known)


def _checked(
    where: str, source: HiddenStates, known: TeacherProjection, kind: str, leading: torch.Size, vocab_size: int | None
) -> None:
    if not isinstance(known, TeacherProjection):
        raise TypeError(f"{where}: reference_projection is {type(known).__name__}; expected kk.teacher_projection(…)")
    if kind != "forward_kl":
        raise ValueError(f"{where}: kind is {kind!r}; expected 'forward_kl', which reference_projection is for")
    if source.shard is not None:
        raise ValueError(f"{where}: reference_projection is given beside group; expected a teacher's columns")
    if source.other is not None:
        raise ValueError(f"{where}: reference_projection is given beside another reference; pass one of them")
    if vocab_size not in (None, known.vocab_size):
        raise ValueError(
            f"{where}: vocab_size is {vocab_size}; expected {known.vocab_size}, as in reference_projection"
        )
    _linear_checked(where, source.student)
    side = source.student
    if side.weight.requires_grad or (side.bias is not None and side.bias.requires_grad):
        raise ValueError(f"{where}: head requires grad; reference_projection is that of a frozen head (detach it)")
    expected = [*leading, side.weight.shape[1]]
    if list(known.projection.shape) != expected:
        raise ValueError(f"{where}: reference_projection has shape {list(known.projection.shape)}; expected {expected}")


def _linear_checked(where: str, side: Side) -> None:
    if side.softcap:
        raise ValueError(f"{where}: softcap of head is {side.softcap}; expected none: its logits are not linear")


def _weight(head: Any) -> Tensor:
    """The weight, if it is one: `hidden_states` says what is wrong otherwise."""
    weight = getattr(head, "weight", head)
    weight = getattr(weight, "weight", weight)
    return weight if isinstance(weight, Tensor) and weight.dim() > 0 else torch.zeros(1, 1)
