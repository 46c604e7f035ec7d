"""The k likeliest tokens, and statistics of k tokens and the rest of a vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kldiv_kernels import autograd, inputs, ops
from kldiv_kernels.backends import native
from kldiv_kernels.choices import Backend
from kldiv_kernels.dtensors import on_dtensors
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.parallel import Group, SharedLogits, largest_of_shards, logits_or_shared, together
from kldiv_kernels.sources import Source
from kldiv_kernels.stats import TokenStats, statistics_of
from kldiv_kernels.top_k import inputs as topk_inputs


class TopK(NamedTuple):
    """values [*, k]: the largest log-probabilities, descending; ids [*, k] int64; log_mass [*]: log Σ exp(values)."""

    values: Tensor
    ids: Tensor
    log_mass: Tensor


@on_dtensors
@together
def topk(
    logits: Tensor,
    k: int,
    *,
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> TopK:
    """The k largest log-probabilities of softmax(logits/temperature), in nats, with their ids and joint mass.

    values and log_mass are differentiable, and 0 where masked; ids say nothing there. Args and errors: see
    `token_stats`; k: 1 to the vocabulary size. Of a group, ids are those of the whole vocabulary; k of each rank are
    gathered for them.

    >>> import torch, kldiv_kernels as kk
    >>> top = kk.topk(torch.tensor([[0.0, 2.0, 1.0, -1.0]]), 2)
    >>> top.ids.tolist(), round(top.log_mass.exp().item(), 4)
    ([[1, 2]], 0.8808)
    """
    source = logits_or_shared("topk", logits, None, group, vocab_start, vocab_size)
    ids = largest_of("topk", source, k, vocab_size, mask, backend)
    values = statistics_of(
        "topk", source, ids, stats=("logprob",), temperature=temperature, mask=mask, vocab_size=vocab_size,
        backend=backend,
    )["logprob"]  # fmt: skip
    mass = values.logsumexp(-1)
    return TopK(values, ids, mass if mask is None else torch.where(mask != 0, mass, 0.0))


# Of one label a token, beside the k.
_OF_LABELS = ("logprob", "untempered_logprob")


@on_dtensors
@together
def topk_token_stats(
    logits: Tensor,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    stats: tuple[str, ...] = ("topk_logprobs", "tail_logprob"),
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    check: bool | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> TokenStats:
    """Log-probabilities of k tokens and of all others together, per token, differentiable, from one read.

    Args:
        logits: [*, V]. topk_ids: [*, K] integers, each at most once in its row; -1 for none.
        labels: [*], for logprob and untempered_logprob; see `token_stats`.
        stats: "topk_logprobs" [*, K] (-inf where there is no id), "tail_logprob" [*] (-inf where nothing is left), and
            "logprob", "untempered_logprob", "entropy", "logsumexp" [*] of the whole row, in the same pass.
        check: whether values of topk_ids are checked. Default: on CPU tensors only, since it waits for the device. A
            token that occurs twice in a row of unchecked ids counts twice.
        temperature, mask, ignore_index, shift, vocab_size, group, vocab_start, backend: see `token_stats`. topk_ids are
            those of the rows.

    Returns: TokenStats, float32, in nats; 0 where masked.

    Raises: TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.topk_token_stats(torch.zeros(1, 8), torch.tensor([[3, 5, -1]]))
    >>> out.topk_logprobs.exp(), round(out.tail_logprob.exp().item(), 4)
    (tensor([[0.1250, 0.1250, 0.0000]]), 0.75)
    """
    return topk_statistics_of(
        "topk_token_stats", logits_or_shared("topk_token_stats", logits, None, group, vocab_start, vocab_size),
        topk_ids, labels, stats=stats, temperature=temperature, mask=mask,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, check=check, backend=backend,
    )  # fmt: skip


def topk_statistics_of(
    where: str,
    source: Source,
    topk_ids: Tensor,
    labels: Tensor | None = None,
    *,
    stats: tuple[str, ...],
    temperature: Parameter,
    mask: Tensor | None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None,
    check: bool | None,
    backend: str,
) -> TokenStats:
    """`topk_token_stats` of logits wherever they come from."""
    logits = source.logits
    allowed = ("topk_logprobs", "tail_logprob", *_OF_LABELS, "entropy", "logsumexp")
    for name in stats:
        if name not in allowed:
            raise ValueError(f"{where}: stats has {name!r}; expected {', '.join(allowed)}")
    of_labels = [name for name in stats if name in _OF_LABELS]
    if of_labels and labels is None:
        raise ValueError(
            f"{where}: labels is None; {of_labels[0]} needs one label a token, shape {list(logits.shape[:-1])}"
        )
    inputs.logits_checked(where, logits, "logits")
    labels, mask = inputs.shifted(where, shift, logits, labels, mask, ignore_index)
    looks = topk_inputs.looks_at(logits, check)
    ids = topk_inputs.ids_checked(where, "topk_ids", topk_ids, logits, vocab_size, looks)
    topk_inputs.each_once_checked(where, "topk_ids", ids, looks)
    shared: dict[str, Any] = {
        "temperature": temperature, "mask": mask, "vocab_size": vocab_size, "backend": backend,
    }  # fmt: skip
    if labels is not None and of_labels and ids.shape[-1] == inputs.shared_columns(where, logits, None, vocab_size):
        # One table has no place for a label beside the whole vocabulary.
        rest = tuple(name for name in stats if name not in of_labels) or ("topk_logprobs",)
        found = topk_statistics_of(where, source, ids, stats=rest, check=False, **shared)
        found |= statistics_of(where, source, labels, stats=of_labels, ignore_index=ignore_index, **shared)
        return TokenStats({name: found[name] for name in stats})
    asked = {"topk_logprobs": "logprob"}
    kernel = tuple(dict.fromkeys(asked.get(name, name) for name in stats))
    joined = ids
    if of_labels and labels is not None:
        inputs.per_token_checked(where, "labels", labels, logits, integers=True)
        # In the place of no token where it is one of the k already: then the tail is the rest of both.
        known = (ids == labels[..., None]).any(-1) | (labels == ignore_index)
        joined = torch.cat([ids, torch.where(known, -1, labels)[..., None]], dim=-1)
        kernel = kernel if "logprob" in kernel else (*kernel, "logprob")
    try:
        found = statistics_of(where, source, joined, stats=kernel, ignore_index=-1, **shared)
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
        elif name in _OF_LABELS and labels is not None:
            same = (ids == labels[..., None]) & (labels != ignore_index)[..., None]
            among = torch.where(same, found[name][..., :count], 0.0).sum(-1)
            out[name] = among + found[name][..., count]
        elif name == "tail_logprob" and joined is not ids:
            extra = torch.where(joined[..., count] < 0, -torch.inf, found["logprob"][..., count])
            out[name] = torch.where(extra == -torch.inf, found[name], torch.logaddexp(found[name], extra))
        else:
            out[name] = found[name]
    return out


def largest_of(where: str, source: Source, k: int, vocab_size: int | None, mask: Tensor | None, backend: str) -> Tensor:
    """`largest` of logits that may be spread over a group: k of each rank, and the largest of those."""
    if not isinstance(source, SharedLogits):
        return largest(where, source.logits, k, vocab_size, mask, backend)
    columns = inputs.shared_columns(where, source.logits, None, vocab_size)
    _count_checked(where, k, columns)
    flat = inputs.mask_checked(where, mask, source.logits, source.logits.shape[:-1])
    here = source.shard.columns(columns)
    few = min(k, here)
    ids = largest(where, source.here, few, here, mask, backend) if few else None
    return largest_of_shards(source, ids, k, columns, flat)


def largest(where: str, logits: Tensor, k: int, vocab_size: int | None, mask: Tensor | None, backend: str) -> Tensor:
    inputs.logits_checked(where, logits, "logits")
    columns = inputs.shared_columns(where, logits, None, vocab_size)
    _count_checked(where, k, columns)
    if backend in ("auto", "cpu") and native.selects(logits) and not autograd.transformed():
        flat = inputs.mask_checked(where, mask, logits, logits.shape[:-1])
        return ops.largest(logits.detach(), flat, k, columns).reshape(*logits.shape[:-1], k)
    return logits.detach()[..., :columns].topk(k, dim=-1).indices


def _count_checked(where: str, k: int, columns: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{where}: k is {type(k).__name__}; expected an int")
    if not 1 <= k <= columns:
        raise ValueError(f"{where}: k is {k!r}; expected 1 to {columns}, the vocabulary size")
