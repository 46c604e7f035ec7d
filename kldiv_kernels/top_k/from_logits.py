"""A top-k divergence from the logits of both: on the likeliest tokens of the teacher, of the student, or of either."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.choices import Backend, DivergenceKind, Reduction, Support, Tail
from kldiv_kernels.dtensors import on_dtensors
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.parallel import Group, logits_or_shared, together
from kldiv_kernels.top_k import inputs as topk_inputs
from kldiv_kernels.top_k.divergences import topk_divergence_loss
from kldiv_kernels.top_k.statistics import largest_of, topk_statistics_of


@on_dtensors
@together
def topk_divergence_from_logits(
    logits: Tensor,
    reference_logits: Tensor,
    kind: DivergenceKind | str = "forward_kl",
    *,
    k: int,
    support: Support = "teacher",
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    tail: Tail = "bucket",
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    temperature_squared: bool = False,
    alpha: Parameter | None = None,
    beta: Parameter | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`topk_divergence_loss` on the k likeliest tokens of the teacher, of the student, or of either.

    Args:
        logits, reference_logits: [*, V]. The reference gets no gradient. k: 1 to the vocabulary size.
        support: whose k likeliest tokens: "teacher" (default), "student" or "union" (up to 2k of them, each once).
        the others: see `topk_divergence_loss` and `divergence_loss`.

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
    if not isinstance(reference_logits, Tensor):
        inputs.logits_checked(where, reference_logits, "reference_logits")
    labels, mask, weight = inputs.shifted(where, shift, logits, labels, mask, ignore_index, weight=(weight, 0))
    reference = reference_logits.detach()
    student_source, source = (
        logits_or_shared(where, x, None, group, vocab_start, vocab_size) for x in (logits, reference)
    )
    ids = largest_of(where, student_source if support == "student" else source, k, vocab_size, mask, backend)
    if support == "union":
        ids = _union(ids, largest_of(where, student_source, k, vocab_size, mask, backend))
        ids = ids[..., : inputs.shared_columns(where, student_source.logits, None, vocab_size)]
    shared = inputs.shared_columns(where, student_source.logits, source.logits, vocab_size)
    teacher = topk_statistics_of(
        where, source, ids, stats=("topk_logprobs", "tail_logprob"),
        temperature=temperature if reference_temperature is None else reference_temperature,
        mask=mask, vocab_size=shared, check=False, backend=backend,
    )  # fmt: skip
    return topk_divergence_loss(
        logits, ids, teacher["topk_logprobs"], kind, tail=tail,
        tail_logprob=teacher["tail_logprob"] if tail == "bucket" else None, temperature=temperature, mask=mask,
        vocab_size=vocab_size, check=False, backend=backend, weight=weight, labels=labels, normalizer=normalizer,
        reduction=reduction, temperature_squared=temperature_squared, alpha=alpha, beta=beta, ignore_index=ignore_index,
        group=group, vocab_start=vocab_start,
    )  # fmt: skip


def _union(first: Tensor, second: Tensor) -> Tensor:
    """[*, 2k]: each once, and -1 behind them."""
    both = torch.cat([first, second], dim=-1)
    return both.masked_fill(topk_inputs.occur_before(both), -1).sort(dim=-1, descending=True).values
