r"""Divergences and statistics on k tokens of a vocabulary and the rest of it, exact in value and gradient.

q is the student's softmax over the whole vocabulary, I the k ids of a token, p the teacher's log-probabilities there.
Both become distributions on few outcomes, on which every divergence of the registry is defined:

    bucket               the k tokens, and all others as one: q_rest = Σ_{j∉I} q_j, p_rest = 1 − Σ_I p
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

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels import backends, inputs, ops, registry, topk_inputs
from kldiv_kernels.backends import native
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.losses import Reduction, reduced, reduction_checked, token_scale
from kldiv_kernels.stats import TokenStats, token_stats

Tail = Literal["bucket", "renormalize", "renormalize_teacher", "none"]
Support = Literal["teacher", "student", "union"]
_TAILS = ("bucket", "renormalize", "renormalize_teacher", "none")
# What a raw sum over some tokens is used for; the others are not sums of their distributions' terms.
_RAW = ("forward_kl", "reverse_kl", "jeffreys", "cross_entropy")


class TopK(NamedTuple):
    """values [*, k]: the largest log-probabilities, descending; ids [*, k] int64; log_mass [*]: log Σ exp(values)."""

    values: Tensor
    ids: Tensor
    log_mass: Tensor


def topk(
    logits: Tensor,
    k: int,
    *,
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> TopK:
    """The k largest log-probabilities of softmax(logits/temperature), in nats, with their ids and joint mass.

    values and log_mass are differentiable, and 0 where masked. Args and errors: see `token_stats`; k: 1 to the
    vocabulary size.

    >>> import torch, kldiv_kernels as kk
    >>> top = kk.topk(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), 2)
    >>> top.ids.tolist(), round(top.log_mass.exp().item(), 4)
    ([[1, 2]], 0.8808)
    """
    ids = _largest("topk", logits, k, vocab_size, mask, backend)
    values = token_stats(
        logits, labels=ids, stats=("logprob",), temperature=temperature, mask=mask, vocab_size=vocab_size,
        backend=backend,
    )["logprob"]  # fmt: skip
    mass = values.logsumexp(-1)
    return TopK(values, ids, mass if mask is None else torch.where(mask != 0, mass, 0.0))


def topk_token_stats(
    logits: Tensor,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    stats: tuple[str, ...] = ("topk_logprobs", "tail_logprob"),
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-probabilities of k tokens and of all others together, per token, differentiable, from one read.

    Args:
        logits: [*, V]. topk_ids: [*, K] integers, each at most once in its row; -1 for none.
        labels: [*], for logprob; see `token_stats`.
        stats: "topk_logprobs" [*, K] (-inf where there is no id), "tail_logprob" [*] (-inf where nothing is left), and
            "logprob", "entropy", "logsumexp" [*] of the whole row, in the same pass.
        check: whether values of topk_ids are checked. Default: on CPU tensors only, since it waits for the device. A
            token that occurs twice in a row of unchecked ids counts twice.
        temperature, mask, ignore_index, vocab_size, backend: see `token_stats`.

    Returns: TokenStats, float32, in nats; 0 where masked.

    Raises: TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.topk_token_stats(torch.zeros(1, 8), torch.tensor([[3, 5, -1]]))
    >>> out.topk_logprobs.exp(), round(out.tail_logprob.exp().item(), 4)
    (tensor([[0.1250, 0.1250, 0.0000]]), 0.75)
    """
    where = "topk_token_stats"
    allowed = ("topk_logprobs", "tail_logprob", "logprob", "entropy", "logsumexp")
    for name in stats:
        if name not in allowed:
            raise ValueError(f"{where}: stats has {name!r}; expected {', '.join(allowed)}")
    if "logprob" in stats and labels is None:
        raise ValueError(f"{where}: labels is None; logprob needs one label a token, shape {list(logits.shape[:-1])}")
    inputs.logits_checked(where, logits, "logits")
    ids = topk_inputs.ids_checked(where, "topk_ids", topk_ids, logits, vocab_size, topk_inputs.looks_at(logits, check))
    asked = {"topk_logprobs": "logprob"}
    kernel = tuple(dict.fromkeys(asked.get(name, name) for name in stats))
    joined = ids
    if "logprob" in stats and labels is not None:
        inputs.per_token_checked(where, "labels", labels, logits, integers=True)
        # In the place of no token where it is one of the k already: then the tail is the rest of both.
        known = (ids == labels[..., None]).any(-1) | (labels == ignore_index)
        joined = torch.cat([ids, torch.where(known, -1, labels)[..., None]], dim=-1)
    try:
        found = token_stats(
            logits, labels=joined, stats=kernel, temperature=temperature, mask=mask, ignore_index=-1,
            vocab_size=vocab_size, backend=backend,
        )  # fmt: skip
    except IndexError as error:
        # Of the table in which the ids come first and a label last.
        raise IndexError(f"{where}: topk_ids or labels, in one table: {error}") from None
    out = TokenStats()
    count = ids.shape[-1]
    for name in stats:
        if name == "topk_logprobs":
            none = ids < 0
            none = none if mask is None else none & (mask != 0)[..., None]
            out[name] = torch.where(none, -torch.inf, found["logprob"][..., :count])
        elif name == "logprob" and labels is not None:
            among = torch.where(ids == labels[..., None], found["logprob"][..., :count], 0.0).sum(-1)
            out[name] = among + found["logprob"][..., count]
        elif name == "tail_logprob" and joined is not ids:
            extra = torch.where(joined[..., count] < 0, -torch.inf, found["logprob"][..., count])
            out[name] = torch.where(extra == -torch.inf, found[name], torch.logaddexp(found[name], extra))
        else:
            out[name] = found[name]
    return out


def topk_divergence_loss(
    logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    kind: str = "forward_kl",
    *,
    tail: Tail = "bucket",
    tail_logprob: Tensor | None = None,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: Parameter = 1.0,
    temperature_squared: bool = False,
    alpha: Parameter = 0.5,
    beta: Parameter = 0.5,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """A divergence from a teacher that is known by k log-probabilities a token.

    Args:
        logits: [*, V], the student's.
        topk_ids: [*, K] int64 or int32, each at most once in its row; -1 for none.
        topk_logprobs: [*, K] float32, bfloat16 or float16, the teacher's at its temperature, not renormalised; -inf
            allowed. No gradient.
        kind: a divergence of the registry.
        tail: "bucket" (default), "renormalize", "renormalize_teacher" or "none"; see the head of this module. "none"
            has forward_kl, reverse_kl, jeffreys and cross_entropy.
        tail_logprob: [*], the teacher's log-mass outside of topk_ids. Default: log(1 − Σ exp(topk_logprobs)), as
            exact as these are.
        check: whether the values of topk_ids and topk_logprobs are checked; see `topk_token_stats`.
        weight, labels, mask, normalizer, reduction, temperature, temperature_squared, alpha, beta, ignore_index,
            vocab_size, backend: see `divergence_loss`.

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
    registry.get(kind, f"{where}: kind", registry.divergence_names())
    if tail not in _TAILS:
        raise ValueError(f"{where}: tail is {tail!r}; expected {', '.join(_TAILS[:-1])} or {_TAILS[-1]}")
    if tail == "none" and kind not in _RAW:
        raise ValueError(f"{where}: kind is {kind!r}; expected {', '.join(_RAW)} where tail is 'none'")
    if tail_logprob is not None and tail != "bucket":
        raise ValueError(f"{where}: tail_logprob is given, but tail is {tail!r}; expected 'bucket'")
    reduction_checked(where, reduction)
    inputs.logits_checked(where, logits, "logits")
    inputs.weight_checked(where, weight, logits)
    looks = topk_inputs.looks_at(logits, check)
    valid = topk_inputs.masked(mask, labels, ignore_index, logits, where)
    ids = topk_inputs.ids_checked(where, "topk_ids", topk_ids, logits, vocab_size, looks)
    teacher = topk_inputs.logprobs_checked(where, "topk_logprobs", topk_logprobs, ids, looks)
    inputs.per_token_checked(where, "tail_logprob", tail_logprob, logits)

    scale = token_scale(
        where, logits, weight, None if valid is None else valid.reshape(-1), normalizer, reduction,
        temperature if temperature_squared else None,
    )  # fmt: skip
    leading = logits.shape[:-1]
    theirs = teacher if tail in ("renormalize", "none") else _with_rest(teacher, tail, tail_logprob)
    if tail != "none" and reduction != "none" and not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
        call = inputs.prepare(
            where, logits, None, ids, stats=[registry.STATISTICS[name] for name in _statistics(tail)],
            temperature=temperature, reference_temperature=None, alpha=alpha, beta=beta, mask=valid, ignore_index=-1,
            vocab_size=vocab_size, exclude=None,
        )  # fmt: skip
        chosen = inputs.select(call, backend, where)
        if _takes_one_read(logits, scale, kind, chosen):
            divergences, dlogits = ops.topk_loss(
                call, chosen, theirs.reshape(call.rows, -1), scale, kind, float(alpha), float(beta)
            )
            return ops.with_gradient(reduced(divergences, scale, reduction, leading), logits, dlogits)

    stats = ("topk_logprobs",) if tail in ("renormalize", "none") else ("topk_logprobs", "tail_logprob")
    student = topk_token_stats(
        logits, ids, stats=stats, temperature=temperature, mask=valid, vocab_size=vocab_size, check=False,
        backend=backend,
    )  # fmt: skip
    ours = student["topk_logprobs"]
    if tail == "none":
        values = _raw_sum(kind, ours, teacher)
    else:
        if tail != "renormalize":
            ours = torch.cat([ours, student["tail_logprob"][..., None]], dim=-1)
        # Logits of what they are the log-probabilities of.
        values = token_stats(ours, theirs, stats=(kind,), alpha=alpha, beta=beta, mask=valid)[kind]
    return reduced(values.reshape(-1), scale, reduction, leading)


def _statistics(tail: Tail) -> tuple[str, ...]:
    return ("logprob",) if tail == "renormalize" else ("logprob", "tail_logprob")


def _with_rest(teacher: Tensor, tail: Tail, tail_logprob: Tensor | None) -> Tensor:
    """The teacher's log-probabilities with that of the rest as one more."""
    if tail == "renormalize_teacher":
        rest = torch.full_like(teacher[..., 0], -torch.inf)
    else:
        rest = topk_inputs.tail_of(teacher) if tail_logprob is None else tail_logprob.detach().to(teacher.dtype)
    return torch.cat([teacher, rest[..., None]], dim=-1)


def _takes_one_read(logits: Tensor, scale: Tensor, kind: str, backend: str) -> bool:
    needed = torch.is_grad_enabled() and logits.requires_grad and not scale.requires_grad
    # float16 waits for the loss scale, as in `policy_loss`.
    served = logits.dtype in (torch.float32, torch.bfloat16) and registry.STATISTICS[kind].builtin
    return needed and served and _has_one_read(backend)


def _serves_topk(backend: str) -> bool:
    return isinstance(backends.get(backend), backends.OneReadTopK)


# torch.compile takes the answer as it is instead of tracing it.
_has_one_read: Callable[[str], bool] = torch.compiler.assume_constant_result(_serves_topk)  # type: ignore[no-untyped-call]


def topk_divergence_from_logits(
    logits: Tensor,
    reference_logits: Tensor,
    kind: str = "forward_kl",
    *,
    k: int,
    support: Support = "teacher",
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    tail: Tail = "bucket",
    backend: str = "auto",
    **options: object,
) -> Tensor:
    """`topk_divergence_loss` on the k likeliest tokens of the teacher, of the student, or of either.

    Args:
        logits, reference_logits: [*, V]. The reference gets no gradient. k: 1 to the vocabulary size.
        support: whose k likeliest tokens: "teacher" (default), "student" or "union" (up to 2k of them, each once).
        options: weight, labels, normalizer, reduction, temperature_squared, alpha, beta, ignore_index.
        kind, tail, temperature, reference_temperature, vocab_size, mask, backend: see `topk_divergence_loss` and
            `divergence_loss`.

    Returns and raises: as `topk_divergence_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> student, teacher = torch.zeros(1, 4), torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    >>> round(kk.topk_divergence_from_logits(student, teacher, k=4).item(), 5) == round(
    ...     kk.forward_kl(student, teacher).item(), 5)
    True
    """
    where = "topk_divergence_from_logits"
    if support not in ("teacher", "student", "union"):
        raise ValueError(f"{where}: support is {support!r}; expected teacher, student or union")
    inputs.logits_checked(where, reference_logits, "reference_logits")
    reference = reference_logits.detach()
    ids = _largest(where, logits if support == "student" else reference, k, vocab_size, mask, backend)
    if support == "union":
        ids = _union(ids, _largest(where, logits, k, vocab_size, mask, backend))
    shared = inputs.shared_columns(where, logits, reference, vocab_size)
    teacher = topk_token_stats(
        reference, ids, temperature=temperature if reference_temperature is None else reference_temperature,
        mask=mask, vocab_size=shared, check=False, backend=backend,
    )  # fmt: skip
    return topk_divergence_loss(
        logits, ids, teacher["topk_logprobs"], kind, tail=tail,
        tail_logprob=teacher["tail_logprob"] if tail == "bucket" else None, temperature=temperature, mask=mask,
        vocab_size=vocab_size, check=False, backend=backend, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def _largest(where: str, logits: Tensor, k: int, vocab_size: int | None, mask: Tensor | None, backend: str) -> Tensor:
    inputs.logits_checked(where, logits, "logits")
    columns = logits.shape[-1] if vocab_size is None else vocab_size
    if not isinstance(k, int) or not 1 <= k <= columns:
        raise ValueError(f"{where}: k is {k!r}; expected 1 to {columns}, the vocabulary size")
    if backend in ("auto", "cpu") and native.selects(logits):
        flat = inputs.mask_checked(where, mask, logits, logits.shape[:-1])
        return ops.largest(logits.detach(), flat, k, columns).reshape(*logits.shape[:-1], k)
    return logits.detach()[..., :columns].topk(k, dim=-1).indices


def _union(first: Tensor, second: Tensor) -> Tensor:
    """[*, 2k]: -1 in place of those of the second that the first has."""
    both = torch.cat([first, second], dim=-1)
    ordered, order = both.sort(dim=-1, stable=True)
    again = torch.zeros_like(both, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return both.masked_fill(torch.zeros_like(again).scatter_(-1, order, again), -1)


def _raw_sum(kind: str, logq: Tensor, logp: Tensor) -> Tensor:
    """Sums over the k tokens as they are; a token without mass adds nothing to the sum that it weighs."""

    def weighted(weight: Tensor, value: Tensor) -> Tensor:
        mass = weight.exp()
        return torch.where(mass == 0, 0.0, mass * torch.where(mass == 0, 0.0, value)).sum(-1)

    if kind == "cross_entropy":
        return -weighted(logp, logq)
    forward, reverse = weighted(logp, logp - logq), weighted(logq, logq - logp)
    return {"forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse}[kind]
