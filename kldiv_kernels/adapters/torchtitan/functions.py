"""torchtitan's functions of logits, and distillation in their form: labels of −100 do not count, sums over tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kldiv_kernels.adapters.torchtitan.shards import here, local, summed
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.parallel import Group
from kldiv_kernels.stats import selective_log_softmax, token_stats


def cross_entropy_loss(
    pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None, tp_group: Group | None = None
) -> Tensor:
    """Σ −log softmax(pred) at the labels, over the tokens whose label is not −100.

    Args:
        pred: [*, V], or this rank's columns of every row; also a DTensor, split over its last dimension or others.
        labels: [*] integers of the whole vocabulary, which stand at their tokens. −100: the token does not count.
        global_vocab_size: V, for columns of a vocabulary that the ranks do not share evenly: ceil(V/ranks) for each,
            and what is left for the last ones. Default: as many on every rank, or those of the DTensor.
        tp_group: the process group that the columns are spread over. Default: that of the DTensor's mesh, or of the
            dimension "tp" of torchtitan's current mesh; without these, whole rows.

    Returns:
        float32 scalar, in nats, the same on all ranks of the group; a DTensor where both arguments are.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed.

    >>> import torch
    >>> round(cross_entropy_loss(torch.zeros(1, 3, 8), torch.tensor([[5, 1, -100]])).item(), 4)  # 2 log 8
    4.1589
    """
    rows = here("cross_entropy_loss", pred, global_vocab_size, tp_group)
    return summed(-selective_log_softmax(rows.logits, local(labels), **rows.columns).sum(), pred, labels)


def distillation_loss(
    pred: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    temperature_squared: bool = False,
    alpha: float | None = None,
    beta: float | None = None,
    normalizer: float | Tensor | None = None,
    global_vocab_size: int | None = None,
    tp_group: Group | None = None,
) -> Tensor:
    """Σ D(teacher, student) over the tokens whose label is not −100, of every divergence of `divergence_loss`.

    Args:
        teacher_logits: as pred, on the same columns. No gradient.
        kind, temperature, temperature_squared, alpha, beta: see `kldiv_kernels.divergence_loss`.
        normalizer: what the sum is divided by. Default: nothing.
        pred, labels, global_vocab_size, tp_group: see `cross_entropy_loss`.

    Returns and raises: as `cross_entropy_loss`.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 2, 4), torch.tensor([0.5, 0.5, 0.0, 0.0]).log().expand(1, 2, 4)
    >>> round(distillation_loss(student, teacher, torch.tensor([[0, -100]])).item(), 4)  # log 2
    0.6931
    """
    where = "distillation_loss"
    rows = here(where, pred, global_vocab_size, tp_group)
    total = divergence_loss(
        rows.logits, local(teacher_logits).detach(), kind, labels=local(labels), temperature=temperature,
        temperature_squared=temperature_squared, alpha=alpha, beta=beta,
        reduction="sum" if normalizer is None else "mean",
        normalizer=local(normalizer) if isinstance(normalizer, Tensor) else normalizer, **rows.columns,
    )  # fmt: skip
    return summed(total, pred, labels)


def compute_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    return_entropy: bool = False,
    global_vocab_size: int | None = None,
    tp_group: Group | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits) at the labels, per token of this rank; 0 where the label is −100.

    Args:
        return_entropy: also the entropies, from the same read, without gradient.
        logits, labels, global_vocab_size, tp_group: pred, labels and these of `cross_entropy_loss`.

    Returns:
        [*] float32, in nats; or (log-probabilities, entropies). Raises: as `cross_entropy_loss`.

    >>> import torch
    >>> logprobs, entropy = compute_logprobs(torch.zeros(1, 2, 4), torch.tensor([[3, 0]]), return_entropy=True)
    >>> logprobs.exp(), entropy.exp()
    (tensor([[0.2500, 0.2500]]), tensor([[4., 4.]]))
    """
    rows = here("compute_logprobs", logits, global_vocab_size, tp_group)
    asked: dict[str, Any] = {"labels": local(labels), "stats": ("logprob", "entropy")[: 1 + return_entropy]}
    found = token_stats(rows.logits, **asked, **rows.columns)
    return (found.logprob, found.entropy.detach()) if return_entropy else found.logprob
