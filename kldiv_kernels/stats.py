"""Per-token statistics of raw logits, differentiable, from one read of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kldiv_kernels import inputs
from kldiv_kernels.choices import Backend
from kldiv_kernels.dtensors import on_dtensors
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.parallel import Group, logits_or_shared, together
from kldiv_kernels.registry import STATISTICS
from kldiv_kernels.sources import Source


class TokenStats(dict[str, Tensor]):
    """The statistics asked for, by attribute (`stats.entropy`) and as a mapping (`stats["entropy"]`)."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            have = ", ".join(self)
            raise AttributeError(
                f"TokenStats has no statistic {name!r}; it has {have} (ask for it with stats=)"
            ) from None


@on_dtensors
@together
def token_stats(
    logits: Tensor,
    reference_logits: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    stats: Sequence[str] = ("logprob", "entropy"),
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    alpha: Parameter = 0.5,
    beta: Parameter = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    exclude: Tensor | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> TokenStats:
    r"""Exact per-token statistics of q = softmax(logits/τ) and p = softmax(reference_logits/τ').

    One forward pass reads the logits once (statistics that need the normalised rows read them again from
    cache); one backward pass turns the gradients of all of them into the gradient of the logits. Compose any
    loss from the results in plain PyTorch.

    Args:
        logits: [*, V], the student (policy); any leading strides, unit stride in V. float32, bfloat16, float16, or
            float64 (reference backend). A DTensor may be replicated, or spread its columns over one dimension of the
            mesh, and its rows over others: results are DTensors with its rows' placements, replicated where columns
            are spread.
        reference_logits: [*, V], the teacher; needed by statistics that compare two rows. May require grad.
        labels: [*] integers for logprob, untempered_logprob (at temperature 1) and reference_logprob, or [*, K] for K
            labels a token. A label equal to `ignore_index` (default -100) makes those statistics 0 there, without
            gradient.
            A causal model's logits at t predict token t + 1: give its own labels with `shift=True`, or labels[:, 1:]
            with logits[:, :-1].
        stats: names of the registry; the documentation of losses has their table.
        temperature: float or [*]; logits are divided by it. Default 1.
        reference_temperature: the same for the reference logits; default: `temperature`.
        alpha, beta: parameters of the divergences that have them, float or [*]; default 0.5.
        mask: [*] bool or integers; where it is 0 the row is not read, its statistics and gradient are 0.
        shift: False (default): the row at t belongs to what stands at t in labels, mask and exclude. True: to what
            stands at t + 1; the last row is left out. Logits are then [..., tokens, V] of whole sequences.
        vocab_size: columns from here on are padding: never read, gradient 0. Default: V.
        exclude: [*] integers, one column a row that both softmaxes leave out; -1 for none.
        group: a process group over which the vocabulary is spread (tensor parallel). Logits are then this process's
            columns of every row; labels, exclude and vocab_size speak of the whole vocabulary. All processes get the
            same values, and the gradient of their own logits. Default None: whole rows.
        vocab_start: the first column of this process. Default: rank times its number of columns, all having as many.
            Where they differ give it, and vocab_size; shards follow each other in the order of ranks and may be empty.
        backend: "auto" (the fastest that serves the call) or a name from `kldiv_kernels.backends()`.

    Returns:
        TokenStats: each statistic [*] ([*, K] where labels are), float32 (float64 for float64 logits), in nats;
        `argmax` is int64, -1 in a row that has none.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed. The values of labels,
        exclude and parameters per token are checked on the CPU, and on other devices with KLDIV_CHECK_VALUES=1; not
        where a call is compiled, exported, transformed by torch.func or captured. Unchecked, a label outside the
        vocabulary makes its row NaN, and an exclude outside leaves out nothing. NotImplementedError from forward-mode
        differentiation.

    >>> import torch, kldiv_kernels as kk
    >>> logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]], requires_grad=True)
    >>> stats = kk.token_stats(logits, labels=torch.tensor([1]))
    >>> round(stats.logprob.item(), 4), round(stats.entropy.item(), 4)
    (-1.8423, 0.8783)
    >>> (-stats.logprob.mean() - 0.01 * stats["entropy"].mean()).backward()
    """
    where = "token_stats"
    source = logits_or_shared(where, logits, reference_logits, group, vocab_start, vocab_size)
    return statistics_of(
        where, source, labels, stats=stats, temperature=temperature, reference_temperature=reference_temperature,
        alpha=alpha, beta=beta, mask=mask, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size,
        exclude=exclude, backend=backend,
    )  # fmt: skip


def statistics_of(
    where: str,
    source: Source,
    labels: Tensor | None,
    *,
    stats: Sequence[str],
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    alpha: Parameter = 0.5,
    beta: Parameter = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> TokenStats:
    """`token_stats` of logits wherever they come from."""
    logits = source.logits
    wanted = inputs.statistics(stats, where)
    labels, mask, exclude = inputs.shifted(
        where, shift, logits, labels, mask, ignore_index, exclude=(exclude, -1)
    )  # fmt: skip
    call = inputs.prepare(
        where, logits, source.reference, labels,
        stats=wanted, temperature=temperature, reference_temperature=reference_temperature, alpha=alpha, beta=beta,
        mask=mask, ignore_index=ignore_index, vocab_size=vocab_size, exclude=exclude,
    )  # fmt: skip
    chosen = inputs.select(call, backend, where)
    return _named(call.stats, source.statistics(call, chosen), labels, logits.shape[:-1])


def _named(names: tuple[str, ...], values: Tensor, labels: Tensor | None, leading: torch.Size) -> TokenStats:
    out = TokenStats()
    row = 0
    for name in names:
        statistic = STATISTICS[name]
        if statistic.per_label and labels is not None and labels.shape != leading:
            count = labels.shape[-1]
            out[name] = values[row : row + count].T.reshape(*leading, count)
            row += count
            continue
        value = values[row].reshape(leading)
        value = value if statistic.differentiable else value.detach()
        out[name] = value.to(torch.int64) if statistic.kind == "argmax" else value
        row += 1
    return out


def entropy(
    logits: Tensor,
    *,
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    exclude: Tensor | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Entropy H(q) = −Σ q log q of q = softmax(logits/temperature), per token, in nats, differentiable.

    Args and errors: see `token_stats`. Returns [*] float32.

    >>> import torch, kldiv_kernels as kk
    >>> torch.allclose(kk.entropy(torch.zeros(2, 8)), torch.tensor(8.0).log())
    True
    """
    return token_stats(
        logits, stats=("entropy",), temperature=temperature, mask=mask,
        vocab_size=vocab_size, exclude=exclude, group=group, vocab_start=vocab_start, backend=backend,
    )["entropy"]  # fmt: skip


def selective_log_softmax(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: Parameter = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    exclude: Tensor | None = None,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """log softmax(logits/temperature) at the labels, per token, differentiable: [*] or [*, K] like `labels`.

    The [*, V] log-softmax is never formed, forward or backward. A causal model's logits at t predict token t + 1: give
    its own labels with `shift=True` (the last value is then 0). Args and errors: see `token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.selective_log_softmax(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]])).exp()
    tensor([[0.2500, 0.2500],
            [0.2500, 0.2500]])
    """
    return token_stats(
        logits, labels=labels, stats=("logprob",), temperature=temperature, mask=mask,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, exclude=exclude, group=group,
        vocab_start=vocab_start, backend=backend,
    )["logprob"]  # fmt: skip
