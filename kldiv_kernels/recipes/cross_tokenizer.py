r"""A teacher whose tokenizer is another: divergences on the tokens that both have, and on sorted probabilities.

`vocabularies` says which tokens both have, `token_spans` where two tokenizations of a text meet.

    mapped_divergence_loss   one position: the common tokens, and the rest of each side as one outcome
    uld_loss                 one position: Σ_k |q_(k) − p_(k)| of the sorted probabilities, whatever the tokens are
    gold_loss                spans of a text: the common tokens by JS, the others sorted

The rest as one outcome takes no column of its own. With p_rest spread over the student's other columns as q is there,

    p'_j = p_j (common),    p'_j = p_rest·q_j/q_rest (the others),

all of these have one ratio p'/q, that of the rests, so that an f-divergence of p' and q is that of the outcomes. So is
its gradient, with p' held fixed: f' of the one ratio, times q_j. The student's logits are read as for any divergence.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kldiv_kernels.choices import Backend, DivergenceKind
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.policy import aggregate
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.reductions import masked, over_rows, tempered_softmax, valid_rows, widened
from kldiv_kernels.recipes.token_spans import Merge, Spans, span_logprobs
from kldiv_kernels.recipes.vocabularies import VocabularyMap, mapped_columns

# Whose value does not change where outcomes of one ratio become one: all of Σ f(q/p)·p, and renyi, a function of such.
_OF_RATIOS = (
    "forward_kl", "reverse_kl", "jeffreys", "js", "skew_kl", "skew_reverse_kl", "hellinger", "tvd", "forward_chi2",
    "reverse_chi2", "triangular", "alpha", "renyi",
)  # fmt: skip


def mapped_divergence_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    vocab_map: Tensor | VocabularyMap,
    kind: DivergenceKind | str = "forward_kl",
    *,
    tail: Literal["bucket", "renormalize"] = "bucket",
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    **options: Any,
) -> Tensor:
    r"""A divergence on the tokens that student and teacher have in common, and one more outcome for all others.

    For a student whose vocabulary was pruned or extended, or shares tokens with its teacher's.

    Args:
        logits: [*, V]. teacher_logits: [*, V_teacher], at the same positions; no gradient.
        vocab_map: [V_teacher] integers, the student's id of each of the teacher's tokens, −1 for none; see
            `vocabulary_map`. Or a `VocabularyMap` of it, made once: a tensor on a GPU is looked at in every call.
        kind: a divergence; with "bucket" one that depends on ratios alone: not cross_entropy, alpha_beta,
            cauchy_schwarz.
        tail: "bucket": the rest of each side is one outcome. A side without other tokens never has it, and forward_kl
            of a student that has none is infinite. "renormalize": the common tokens alone, normalised on both sides, as
            for a student with a pruned vocabulary.
        temperature, reference_temperature: numbers or [*]. options: of `kk.divergence_loss` but vocab_size, exclude and
            group.

    Returns: as `kk.divergence_loss`; value and gradient in one read of the logits, but for a copy of the teacher's, and
    where columns are left out, or one is missing, of the student's.

    >>> import torch, kldiv_kernels as kk
    >>> student, teacher = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log(), torch.tensor([[0.3, 0.5, 0.2]]).log()
    >>> loss = kk.recipes.mapped_divergence_loss(student, teacher, torch.tensor([-1, 0, -1]))
    >>> loss.abs() < 1e-6
    tensor(True)
    """
    where = "mapped_divergence_loss"
    if tail not in ("bucket", "renormalize"):
        raise ValueError(f"{where}: tail is {tail!r}; expected bucket or renormalize")
    if tail == "bucket" and kind not in _OF_RATIOS:
        raise ValueError(f"{where}: kind is {kind!r}; with tail 'bucket' expected one of {', '.join(_OF_RATIOS)}")
    for name in ("vocab_size", "exclude", "group", "vocab_start"):
        if options.get(name) is not None:
            raise ValueError(f"{where}: {name} is given; vocab_map says which columns count, expected none")
    if logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"{where}: teacher_logits has shape {list(teacher_logits.shape)}; expected the positions of logits, "
            f"{list(logits.shape[:-1])}"
        )
    columns = mapped_columns(where, vocab_map, logits, teacher_logits)
    if tail == "bucket":
        theirs = temperature if reference_temperature is None else reference_temperature
        logits, teacher = _with_rest(logits, teacher_logits.detach(), columns, temperature, theirs)
    elif columns.student_rest.numel():
        logits, teacher = logits[..., columns.student_ids], teacher_logits.detach()[..., columns.teacher_ids]
    else:
        teacher = teacher_logits.detach()[..., columns.teacher_ids[columns.student_ids.argsort()]]
    return divergence_loss(
        logits, teacher, kind, temperature=temperature, reference_temperature=reference_temperature, **options
    )


def _with_rest(
    logits: Tensor, teacher: Tensor, columns: VocabularyMap, temperature: Parameter, teacher_temperature: Parameter
) -> tuple[Tensor, Tensor]:
    """The student's logits, and the teacher's over its columns with the rest spread over the others as q is."""
    if columns.teacher_rest.numel() and not columns.student_rest.numel():
        logits = pad(logits, (0, 1), value=-torch.inf)
    with torch.no_grad():
        dtype = torch.promote_types(widened(logits).dtype, teacher.dtype)
        tau, scale = (x[..., None] if isinstance(x, Tensor) else x for x in (temperature, teacher_temperature))
        out = torch.full(logits.shape, -torch.inf, dtype=dtype, device=logits.device)
        out[..., columns.student_ids] = teacher[..., columns.teacher_ids].to(dtype)
        if not columns.teacher_rest.numel():
            return logits, out
        mass = (teacher[..., columns.teacher_rest].to(dtype) / scale).logsumexp(-1, keepdim=True)
        if not columns.student_rest.numel():
            out[..., -1:] = scale * mass
            return logits, out
        own = logits[..., columns.student_rest].to(dtype) / tau
        own_mass = own.logsumexp(-1, keepdim=True)
        # Where the student has no mass there, one column takes all of the teacher's.
        first = torch.where(torch.arange(own.shape[-1], device=own.device) == 0, 0.0, -torch.inf)
        spread = torch.where(own_mass == -torch.inf, first, own - torch.where(own_mass == -torch.inf, 0.0, own_mass))
        out[..., columns.student_rest] = scale * (mass + spread)
    return logits, out


def uld_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Σ_k |q_(k) − p_(k)|, q_(1) ≥ q_(2) ≥ … the probabilities in order: universal logit distillation (2402.12030).

    The 1-Wasserstein distance where all tokens are as far from each other. What the smaller vocabulary has not counts
    as 0. It tells nothing of which token is meant.

    Args: logits: [*, V]. teacher_logits: [*, V_teacher], at the same positions; no gradient. temperature: of the
    student; teacher_temperature: default the same. reduction: "mean" over the rows, or over `normalizer`; "sum";
    "none": [*]. mask: [*]. Makes tensors of [N, V] in PyTorch.

    >>> import torch, kldiv_kernels as kk
    >>> student, teacher = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()
    >>> round(kk.recipes.uld_loss(student, teacher).item(), 4)
    0.4
    """
    if logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"uld_loss: teacher_logits has shape {list(teacher_logits.shape)}; expected the positions of logits, "
            f"{list(logits.shape[:-1])}"
        )
    valid = valid_rows(logits, None, mask)
    other = temperature if teacher_temperature is None else teacher_temperature
    q = tempered_softmax(masked(widened(logits), valid[..., None]), temperature)
    p = tempered_softmax(masked(widened(teacher_logits.detach()), valid[..., None]), other)
    return over_rows("uld_loss", _sorted_distance(q, p), valid, reduction, normalizer)


def gold_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    teacher_token_ids: Tensor,
    spans: Spans,
    vocab_map: Tensor | VocabularyMap | None = None,
    *,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
    merge: Merge = "observed",
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    floor: float = 1e-8,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""w_m·JS_β of the common tokens + w_u·sorted |q − p| of the others, over spans of two tokenizations: TRL's GOLD.

    q and p are the distributions of spans (`token_spans`), which do not sum to 1; with m = βp + (1 − β)q, JS_β is
    Σ β·p log(p/m) + (1 − β)·q log(q/m) over the common tokens, β = 0 Σ p log(p/q), β = 1 Σ q log(q/p). The sum over a
    sequence's spans is divided by their number, the mean taken over sequences, one without spans counting 0.

    Args:
        logits: [B, T, V], teacher_logits: [B, T_teacher, V_teacher], row t of the token that stands at t in token_ids
            [B, T] and teacher_token_ids [B, T_teacher]; the teacher gets no gradient. TRL's "observed" gives the row
            behind it, its "bayesian" this one.
        spans: of `align_spans`. vocab_map: see `mapped_divergence_loss`; None: all tokens sorted, extended ULD.
        beta: as in `kk.js_divergence`. matched_weight, unmatched_weight: w_m and w_u; default: the share of the
            teacher's columns that both have, and the rest of 1. Where a side has no other tokens the second term is 0.
        merge: see `token_spans`. floor: of probabilities, as in TRL: below it they count as it, without gradient.
        temperature, teacher_temperature: of the softmaxes. normalizer: default: the number of sequences.

    Returns: float32 scalar. Makes tensors of [B, spans, V] in PyTorch.

    >>> import torch, kldiv_kernels as kk
    >>> spans = kk.recipes.align_spans(torch.tensor([[3, 6, 10]]), torch.tensor([[3, 7, 10]]))
    >>> ids = torch.tensor([[0, 1, 2]])
    >>> loss = kk.recipes.gold_loss(
    ...     torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), ids, ids, spans, torch.tensor([0, 1, 2, -1, -1]))
    >>> round(loss.item(), 4)
    0.0649
    """
    if (matched_weight is None) != (unmatched_weight is None) or (vocab_map is None and matched_weight is not None):
        raise ValueError(
            f"gold_loss: matched_weight is {matched_weight} and unmatched_weight {unmatched_weight}; expected both "
            "with a vocab_map, or none"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"gold_loss: beta is {beta}; expected 0 to 1")
    of_tokens_checked(token_ids, spans=spans.student)
    of_tokens_checked(teacher_token_ids, spans=spans.teacher)
    count = min(token_ids.shape[1], teacher_token_ids.shape[1])
    shared: dict[str, Any] = {"merge": merge, "floor": floor, "backend": backend}
    rows, others = span_logprobs(logits, token_ids, spans.student, count, temperature=temperature, **shared)
    theirs, their_others = span_logprobs(
        teacher_logits.detach(), teacher_token_ids, spans.teacher, count, temperature=teacher_temperature, **shared
    )
    logq, logp = rows + others[..., None], (theirs + their_others[..., None]).to(rows.dtype)
    valid = torch.arange(count, device=rows.device) < spans.total[:, None]
    if vocab_map is None:
        values = _sorted_distance(logq.exp(), logp.exp())
    else:
        columns = mapped_columns("gold_loss", vocab_map, logits, teacher_logits)
        share = columns.teacher_ids.numel() / max(columns.teacher_size, 1)
        matched = share if matched_weight is None else matched_weight
        unmatched = 1 - share if unmatched_weight is None else unmatched_weight
        common_q, common_p = (
            x.clamp_min(math.log(floor)) for x in (logq[..., columns.student_ids], logp[..., columns.teacher_ids])
        )
        values = matched * _generalized_js(common_q, common_p, beta)
        if columns.student_rest.numel() and columns.teacher_rest.numel():
            apart = _sorted_distance(logq[..., columns.student_rest].exp(), logp[..., columns.teacher_rest].exp())
            values = values + unmatched * apart
    return aggregate(values, valid, "seq-mean-token-mean", normalizer, True)


def _generalized_js(logq: Tensor, logp: Tensor, beta: float) -> Tensor:
    """β·Σ p log(p/m) + (1 − β)·Σ q log(q/m), of sums that need not be 1."""
    if beta == 0:
        return (logp.exp() * (logp - logq)).sum(-1)
    if beta == 1:
        return (logq.exp() * (logq - logp)).sum(-1)
    share = torch.tensor([beta, 1 - beta], dtype=logq.dtype, device=logq.device).log()
    mixture = torch.logaddexp(logp + share[0], logq + share[1])
    return (beta * logp.exp() * (logp - mixture) + (1 - beta) * logq.exp() * (logq - mixture)).sum(-1)


def _sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """Σ_k |q_(k) − p_(k)|, the shorter one with zeros behind."""
    columns = max(q.shape[-1], p.shape[-1])
    q, p = (pad(x.sort(dim=-1, descending=True).values, (0, columns - x.shape[-1])) for x in (q, p))
    return (q - p).abs().sum(-1)
