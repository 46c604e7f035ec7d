"""verl's `agg_loss`: the scalar of per-token losses."""

from __future__ import annotations

from torch import Tensor

from kldiv_kernels.policy import aggregate

_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """The scalar of per-token losses [batch, tokens].

    Args:
        loss_mask: [batch, tokens], 0 for tokens that do not count.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm" (the former, divided
            by `loss_scale_factor`, default: tokens), "seq-mean-token-mean". Sequences without a token do not count.
        dp_size: number of data-parallel ranks, which multiplies the loss because their gradients are averaged.
        batch_num_tokens, global_batch_size: tokens and sequences over all ranks. Default: those here, on one rank only.

    Raises:
        ValueError: naming the argument, what it was and what is allowed.

    >>> import torch
    >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    >>> agg_loss(losses, mask, "token-mean").item(), agg_loss(losses, mask, "seq-mean-token-mean").item()
    (3.0, 3.5)
    """
    where = "agg_loss"
    if loss_agg_mode not in _MODES:
        raise ValueError(f"{where}: loss_agg_mode is {loss_agg_mode!r}; expected one of {', '.join(_MODES)}")
    name = {"token-mean": "batch_num_tokens", "token-sum": None}.get(loss_agg_mode, "global_batch_size")
    normalizer = {"batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size}.get(name or "")
    if dp_size > 1 and name is not None and normalizer is None:
        raise ValueError(f"{where}: {name} is None; expected the number over all ranks, since dp_size is {dp_size}")
    how = loss_agg_mode.removesuffix("-norm")
    loss = aggregate(loss_mat, loss_mask != 0, how, normalizer, count_empty=False) * dp_size
    if how != loss_agg_mode:
        loss = loss / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return loss
