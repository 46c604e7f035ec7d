r"""Divergences and statistics on k tokens of a vocabulary and the rest of it, exact in value and gradient.

q is the student's softmax over the whole vocabulary, I the k ids of a token, p the teacher's log-probabilities there.
Both become distributions on few outcomes, on which every divergence of the registry is defined:

    bucket               the k tokens, and all others as one: q_rest = Σ_{j∉I} q_j, p_rest = 1 − Σ_I p, known to the
                         rounding of the log-probabilities and at least that (`inputs.tail_of`)
    renormalize          the k tokens: q_i/Σ_I q and p_i/Σ_I p
    renormalize_teacher  the student as in bucket, p_i/Σ_I p with p_rest = 0
    none                 raw sums over I, of which neither side is a distribution: Σ p (log p − log q) and the like

q_rest is summed over the rest itself (`tail_logprob`), not taken from 1: at q_rest = 1e-7 it has all its digits, and
its gradient. With c_i and c_rest the gradients by log q_i and log q_rest and C their sum,

    dD/ds_i = c_i − C·q_i (i ∈ I),    dD/ds_j = (c_rest/q_rest − C)·q_j (j ∉ I).

Sources: "bucket" is the tail of TRL's SDFT and DistillKit's SYMMETRIC_UNIFORM, "renormalize" NeMo-RL's and TRL's form
without a tail, "renormalize_teacher" DistillKit's ZERO, "none" verl's forward_kl_topk.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from kldiv_kernels import inputs, registry
from kldiv_kernels.backends import Call, OneReadTopK, get
from kldiv_kernels.choices import Backend, DivergenceKind, Reduction, Tail
from kldiv_kernels.divergences import Statistic
from kldiv_kernels.dtensors import on_dtensors
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.losses import gradient_waits, in_place_checked, reduced, reduction_checked, token_scale
from kldiv_kernels.parallel import Group, logits_or_shared, together
from kldiv_kernels.sources import Source, TopKTeacher
from kldiv_kernels.stats import token_stats
from kldiv_kernels.top_k import inputs as topk_inputs
from kldiv_kernels.top_k.statistics import topk_statistics_of
from kldiv_kernels.tracing import constant

_TAILS = get_args(Tail)
# What a raw sum over some tokens is used for; the others are not sums of their distributions' terms.
_RAW = ("forward_kl", "reverse_kl", "jeffreys", "cross_entropy")
# Of these, sums that are linear in the student's log-probabilities.
_LINEAR = ("forward_kl", "cross_entropy")


@on_dtensors
@together
def topk_divergence_loss(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: DivergenceKind | str = "forward_kl",
    *,
    tail: Tail = "bucket",
    tail_logprob: Tensor | None = None,
    tail_floor: float | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: Parameter = 1.0,
    temperature_squared: bool = False,
    alpha: Parameter | None = None,
    beta: Parameter | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    check: bool | None = None,
    in_place: bool = False,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A divergence from a teacher that is known by k log-probabilities a token.

    Args:
        logits: [*, V], the student's.
        topk_ids: [*, K] int64 or int32, each at most once in its row; -1 for none.
        topk_logprobs: [*, K] float32, bfloat16 or float16, the teacher's at its temperature, not renormalised. No
            gradient. -inf is a token that the teacher never has, or, beside the same id, a pad that is left out.
        kind: a divergence of the registry.
        tail: what becomes of the tokens outside of topk_ids. "bucket" (default): one more outcome, on both sides.
            "renormalize": left out on both sides. "renormalize_teacher": left out of the teacher, whose k tokens then
            sum to 1; where the k have no mass it is an error, NaN if unchecked. "none": raw sums over topk_ids, of
            forward_kl, reverse_kl, jeffreys and cross_entropy.
        tail_logprob: [*], the teacher's log-mass outside of topk_ids. Default: log(1 − Σ p), p = exp(topk_logprobs), as
            exact as these are: where the ids are the whole vocabulary what is left of 1 is nothing, unless it is more
            than rounding can leave (then it is a token that the student does not have, and forward_kl infinite).
        tail_floor: 0 to 1, what 1 − Σ p is at least. Default: what rounding can make of it, max(k·ε, ½ε'·Σ p |log p|),
            ε = 1.2e-7 of float32, ε' of the dtype of topk_logprobs. With 0, a Σ p that rounds to 1 says that the
            teacher never has another token, and reverse_kl is infinite.
        check: whether values are checked, of topk_ids and topk_logprobs; default: on CPU tensors only, since it waits
            for the device. Unchecked, a token with two log-probabilities makes its row NaN.
        weight, labels, mask, normalizer, reduction, temperature, temperature_squared, alpha, beta, ignore_index,
            vocab_size, backend: see `divergence_loss`.
        group, vocab_start: see `token_stats`; topk_ids are of the whole vocabulary, the same on all ranks.
        in_place: see `divergence_loss`. On CPUs; GPUs read the logits of several labels twice, which is an error then.

    Returns: float32 scalar ([*] for "none"), in nats; 0 with zero gradient when no token is valid.

    Raises: TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> import torch, kldiv_kernels as kk
    >>> student = torch.tensor([[2.0, 0.5, -1.0, 0.0]], requires_grad=True)
    >>> ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log()
    >>> loss = kk.topk_divergence_loss(student, ids, logprobs, "js")
    >>> loss.backward()
    >>> round(loss.item(), 6), [round(x, 4) for x in student.grad[0].tolist()]
    (0.023705, [0.0481, -0.0221, -0.007, -0.0191])
    """
    where = "topk_divergence_loss"
    source = logits_or_shared(where, logits, None, group, vocab_start, vocab_size, in_place_checked(where, in_place))
    return topk_divergence_of(
        where, source, topk_ids, topk_logprobs, kind, tail=tail,
        tail_logprob=tail_logprob, tail_floor=tail_floor, weight=weight, labels=labels, mask=mask,
        normalizer=normalizer, reduction=reduction, temperature=temperature, temperature_squared=temperature_squared,
        alpha=alpha, beta=beta, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, check=check,
        backend=backend,
    )  # fmt: skip


def topk_divergence_of(
    where: str,
    source: Source,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: str,
    *,
    tail: Tail,
    tail_logprob: Tensor | None = None,
    tail_floor: float | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: Parameter,
    temperature_squared: bool = False,
    alpha: Parameter | None = None,
    beta: Parameter | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None,
    check: bool | None = None,
    backend: str,
) -> Tensor:
    """`topk_divergence_loss` of logits wherever they come from."""
    logits = source.logits
    statistic = registry.get(kind, f"{where}: kind", registry.divergence_names())
    tail_checked(where, kind, tail)
    if tail_logprob is not None and tail != "bucket":
        raise ValueError(f"{where}: tail_logprob is given, but tail is {tail!r}; expected 'bucket'")
    topk_inputs.tail_floor_checked(where, tail_floor, tail, tail_logprob)
    alpha, beta = inputs.of_a_kind(where, statistic, alpha, beta)
    reduction_checked(where, reduction)
    inputs.logits_checked(where, logits, "logits")
    labels, mask, weight = inputs.shifted(where, shift, logits, labels, mask, ignore_index, weight=(weight, 0))
    inputs.weight_checked(where, weight, logits)
    inputs.alpha_and_beta_checked(where, statistic, alpha, beta, logits)
    looks = topk_inputs.looks_at(logits, check)
    valid = topk_inputs.masked(mask, labels, ignore_index, logits, where)
    ids, teacher = topk_inputs.teacher_checked(where, topk_ids, topk_logprobs, logits, vocab_size, looks)
    inputs.per_token_checked(where, "tail_logprob", tail_logprob, logits)

    scale = token_scale(
        where, logits, weight, None if valid is None else valid.reshape(-1), normalizer, reduction,
        temperature if temperature_squared else None,
    )  # fmt: skip
    leading, columns = logits.shape[:-1], inputs.shared_columns(where, logits, None, vocab_size)
    if tail.startswith("renormalize") and looks:
        topk_inputs.mass_checked(where, teacher, scale.reshape(leading) != 0, tail)
    if tail == "bucket" and tail_logprob is None:
        tail_logprob = topk_inputs.tail_of(
            where, teacher, ids, columns, given=topk_logprobs.dtype, floor=tail_floor, check=looks
        )
    theirs = teacher if tail in ("renormalize", "none") else _with_rest(teacher, tail_logprob)
    theirs = theirs.to(scale.dtype)
    if any(source.wanted()):
        call = inputs.prepare(
            where, logits, None, ids, stats=[registry.STATISTICS[name] for name in _statistics(tail)],
            temperature=temperature, reference_temperature=None, alpha=alpha, beta=beta, mask=valid, ignore_index=-1,
            vocab_size=vocab_size, exclude=None,
        )  # fmt: skip
        chosen = inputs.select(call, backend, where)
        numbers = None if isinstance(alpha, Tensor) or isinstance(beta, Tensor) else (float(alpha), float(beta))
        waits = gradient_waits(reduction, scale)
        if waits is None and not (tail == "none" and kind in _LINEAR):
            waits = _waits(kind, tail, numbers, statistic, chosen)
        if source.known_beforehand(where, waits, call, chosen):
            table = theirs.reshape(call.rows, theirs.shape[-1])
            if tail == "none":
                return _linear(kind, source, call, chosen, table, scale)
            assert numbers is not None
            divergences, attach = source.topk(call, chosen, TopKTeacher(table, scale, kind, *numbers))
            return attach(reduced(divergences, scale, reduction, leading))

    stats = tuple("topk_logprobs" if name == "logprob" else name for name in _statistics(tail))
    student = topk_statistics_of(
        where, source, ids, stats=stats, temperature=temperature, mask=valid, vocab_size=vocab_size, check=False,
        backend=backend,
    )  # fmt: skip
    ours = student["topk_logprobs"]
    if tail == "none":
        values = _raw_sum(kind, ours, theirs)
    else:
        if "tail_logprob" in student:
            ours = torch.cat([ours, student["tail_logprob"][..., None]], dim=-1)
        # Logits of what they are the log-probabilities of.
        values = token_stats(ours, theirs, stats=(kind,), alpha=alpha, beta=beta, mask=valid)[kind]
    return reduced(values.reshape(-1), scale, reduction, leading)


def _waits(
    kind: str, tail: Tail, numbers: tuple[float, float] | None, statistic: Statistic, backend: str
) -> str | None:
    """Why the gradient does not come out of the pass that finds the values, or None."""
    if tail == "none":
        return f"the raw sum of {kind} needs the log-probabilities first"
    if numbers is None:
        return "alpha or beta is a tensor of one a token"
    if not statistic.builtin:
        return f"{kind} is a statistic of your own"
    return None if _has_one_read(backend) else f"the {backend} backend has no top-k loss of one read"


def tail_checked(where: str, kind: str, tail: str) -> None:
    if tail not in _TAILS:
        raise ValueError(f"{where}: tail is {tail!r}; expected {', '.join(_TAILS[:-1])} or {_TAILS[-1]}")
    if tail == "none" and kind not in _RAW:
        raise ValueError(f"{where}: kind is {kind!r}; expected {', '.join(_RAW)} where tail is 'none'")


def _statistics(tail: Tail) -> tuple[str, ...]:
    return ("logprob",) if tail in ("renormalize", "none") else ("logprob", "tail_logprob")


def _with_rest(teacher: Tensor, tail_logprob: Tensor | None) -> Tensor:
    """The teacher's log-probabilities with that of the rest as one more; None: it has nothing there."""
    rest = torch.full_like(teacher[..., 0], -torch.inf) if tail_logprob is None else tail_logprob.detach()
    return torch.cat([teacher, rest.to(teacher.dtype)[..., None]], dim=-1)


def _serves_topk(backend: str) -> bool:
    return isinstance(get(backend), OneReadTopK)


# torch.compile takes the answer as it is instead of tracing it.
_has_one_read = constant(_serves_topk)


def _linear(kind: str, source: Source, call: Call, backend: str, logp: Tensor, scale: Tensor) -> Tensor:
    """Σ scale Σ p (log p − log q), or − Σ scale Σ p log q: coefficients that are known before the logits are read."""
    p = torch.where((scale == 0)[:, None], 0.0, logp.exp()).to(scale.dtype)
    loss, _ = source.loss(call, backend, -(scale[:, None] * p).t().contiguous())
    if kind == "cross_entropy":
        return loss
    return loss + (scale[:, None] * torch.where(p == 0, 0.0, p * logp)).sum()


def _raw_sum(kind: str, logq: Tensor, logp: Tensor) -> Tensor:
    """Sums over the k tokens as they are; a token without mass adds nothing to the sum that it weighs."""

    def weighted(weight: Tensor, value: Tensor) -> Tensor:
        mass = weight.exp()
        return torch.where(mass == 0, 0.0, mass * torch.where(mass == 0, 0.0, value)).sum(-1)

    if kind == "cross_entropy":
        return -weighted(logp, logq)
    forward, reverse = weighted(logp, logp - logq), weighted(logq, logq - logp)
    return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}[kind]
