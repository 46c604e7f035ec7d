r"""A teacher for forward KL in [N, H] numbers, where the student's head is frozen.

With z = W h + b the student's logits, KL(p‖q) = logsumexp(z/τ) − (⟨Pᵀ, h⟩ + Σ p b)/τ − H(p), P = Σ_j p_j W_j. P, Σ p b
and H(p) do not change while W and b do not: they are all that forward KL wants of a teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kldiv_kernels import inputs, registry
from kldiv_kernels.backends import Call, get
from kldiv_kernels.choices import Backend
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.linear.chunks import chunks, kept_rows, take_logits
from kldiv_kernels.linear.gemm import Gemm
from kldiv_kernels.linear.head import Side
from kldiv_kernels.linear.source import AnyHead, HiddenStates, hidden_states
from kldiv_kernels.linear.work import Made, Task
from kldiv_kernels.losses import gradient_waits, reduced, reduction_checked, token_scale


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
    call = inputs.prepare(
        where, source.logits, source.reference, None,
        stats=[registry.STATISTICS["reference_entropy"]], temperature=1.0, reference_temperature=temperature, alpha=0.5,
        beta=0.5, mask=mask, ignore_index=-100, vocab_size=vocab_size, exclude=None,
    )  # fmt: skip
    return _projected(source, call, inputs.select(call, backend, where), leading)


def _projected(source: HiddenStates, call: Call, backend: str, leading: torch.Size) -> TeacherProjection:
    task = Task(source.student, source.other, call, backend, torch.float32, source.rows)
    size, index, columns = task.chunk_rows(), kept_rows(call.mask), call.vocab_size
    count = task.count if index is None else index.shape[0]
    student, other = source.student, source.other
    made = Made(other, task, min(size, count), (False, False, False)) if isinstance(other, Side) else None
    gemm = Gemm(student.weight.detach()[:columns])
    float32: dict[str, Any] = {"dtype": torch.float32, "device": student.weight.device}
    projection = torch.zeros((task.count, student.weight.shape[1]), **float32)
    offset, entropy = torch.zeros(task.count, **float32), torch.zeros(task.count, **float32)
    for rows in chunks(count, size, index):
        if made is not None:
            logits = made.logits(rows)
        else:
            assert isinstance(other, Tensor)
            # A copy: it is written over.
            logits = take_logits(other, rows)[:, :columns].to(torch.float32, copy=True)
        scale = 1.0 if made is None or made.side.softcap else made.side.scale
        temperatures = torch.full((task.count,), call.parameters[1], **float32)[rows] / scale
        if call.token_parameters is not None:
            temperatures = call.token_parameters[1][rows] / scale
        parameters = torch.stack([temperatures, *torch.full((3, len(temperatures)), 0.5, **float32)])
        own = Call(
            logits, None, None, None, None, parameters.contiguous(), (1.0, 1.0, 0.5, 0.5), ("entropy", "logsumexp"),
            columns,
        )  # fmt: skip
        # The gradient of a logsumexp is its softmax over the temperature.
        wanted = torch.stack([torch.zeros_like(temperatures), temperatures])
        one, in_place = get(backend), get(backend).refuses_in_place(own, False) is None
        values, softmax, _ = one.one_read(own, wanted, True, False, in_place)
        assert softmax is not None
        entropy[rows] = values[0]
        projection[rows] = gemm.times_weight_exactly(softmax)
        if student.bias is not None:
            offset[rows] = softmax @ student.bias.detach()[:columns].to(torch.float32)
    shaped = projection.reshape(*leading, -1), offset.reshape(leading), entropy.reshape(leading)
    return TeacherProjection(*shaped, columns)


def divergence_from_projection(
    where: str,
    source: HiddenStates,
    hidden: Tensor,
    known: TeacherProjection,
    kind: str,
    *,
    weight: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    reduction: Any,
    temperature: Parameter,
    reference_temperature: Parameter | None,
    temperature_squared: bool,
    ignore_index: int,
    shift: bool,
    vocab_size: int | None,
    exclude: Tensor | None,
    backend: str,
    **_: Any,
) -> Tensor:
    """`linear_divergence_loss` of a teacher that is known by its projection."""
    logits, side = source.logits, source.student
    _checked(where, source, known, kind, logits.shape[:-1], vocab_size)
    for name, given in (("reference_temperature", reference_temperature), ("exclude", exclude)):
        if given is not None:
            raise ValueError(
                f"{where}: {name} is given beside reference_projection, which is made already; leave it out"
            )
    reduction_checked(where, reduction)
    labels, mask, weight = inputs.shifted(where, shift, logits, labels, mask, ignore_index, weight=(weight, 0))
    inputs.label_mask_checked(where, labels, logits)
    inputs.weight_checked(where, weight, logits)
    leading = logits.shape[:-1]
    valid = inputs.valid_tokens(inputs.mask_checked(where, mask, logits, leading), labels, ignore_index)
    call = inputs.prepare(
        where, logits, None, None, stats=[registry.STATISTICS["logsumexp"]], temperature=temperature,
        reference_temperature=None, alpha=0.5, beta=0.5, mask=None if valid is None else valid.reshape(leading),
        ignore_index=ignore_index, vocab_size=known.vocab_size, exclude=None,
    )  # fmt: skip
    chosen = inputs.select(call, backend, where)
    scale = token_scale(
        where, logits, weight, call.mask, normalizer, reduction, temperature if temperature_squared else None
    )  # fmt: skip
    mean = (hidden.to(torch.float32) * known.projection).sum(-1) + known.offset
    taken = temperature.to(torch.float32) if isinstance(temperature, Tensor) else temperature
    rest = -(side.scale * mean / taken + known.entropy).reshape(-1)
    if call.mask is not None:
        rest = torch.where(call.mask, rest, 0.0)
    if source.known_beforehand(where, gradient_waits(reduction, scale), call, chosen):
        return source.loss(call, chosen, scale[None])[0] + reduced(rest, scale, reduction, leading)
    return reduced(source.statistics(call, chosen)[0] + rest, scale, reduction, leading)


def _checked(
    where: str, source: HiddenStates, known: TeacherProjection, kind: str, leading: torch.Size, vocab_size: int | None
) -> None:
    if not isinstance(known, TeacherProjection):
        raise TypeError(f"{where}: reference_projection is {type(known).__name__}; expected kk.teacher_projection(…)")
    if kind != "forward_kl":
        raise ValueError(f"{where}: kind is {kind!r}; expected 'forward_kl', which reference_projection is for")
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
