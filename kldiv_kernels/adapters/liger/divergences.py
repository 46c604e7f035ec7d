"""Liger's KL, JSD and TVD, of rows of log-probabilities (TVD: probabilities); `log_probabilities` has the formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kldiv_kernels import inputs
from kldiv_kernels.adapters.liger import log_probabilities


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """KL(target ‖ input) = Σ p (log max(p, eps) − log q), with the gradient −p to each log q.

    Args:
        input: [rows, V] log-probabilities of the student. Gets the gradient; target gets none.
        target: [rows, V] probabilities of the teacher, or log-probabilities with `log_target=True`.
        size_average, reduce: of older PyTorch; True, or use `reduction`.
        reduction: "mean" (default: over rows × V), "batchmean" (over rows), "sum", or "none" ([rows, V]).
        eps: lower bound of p inside the logarithm; unused with `log_target=True`.

    Returns:
        float32 scalar, or [rows, V], in nats.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> logq, p = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]])
    >>> round(liger_kl_div(logq, p, reduction="batchmean").item(), 4)
    0.6931
    """
    where = "liger_kl_div"
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None and value is not True:
            raise ValueError(f"{where}: {name} is {value!r}; expected True (pass reduction= 'sum' or 'none' instead)")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise TypeError(
            f"{where}: eps is {eps!r}; expected a number of 0 or more (in LigerKLDIVLoss the first argument)"
        )
    valid = _rows(where, input, target, None, -100, reduction)
    divergence = log_probabilities.kl_of_log() if log_target else log_probabilities.kl(eps)
    return log_probabilities.reduce(divergence, input, target, valid, reduction)


class LigerKLDIVLoss(nn.KLDivLoss):
    """`liger_kl_div` as a module: eps, then the arguments of `torch.nn.KLDivLoss`.

    >>> loss = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    >>> loss(torch.zeros(1, 4).log_softmax(-1), torch.zeros(1, 4).log_softmax(-1)).item()
    0.0
    """

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps)


def liger_jsd(
    input: Tensor, target: Tensor, shift_labels: Tensor | None = None, beta: float = 0.5, ignore_index: int = -100
) -> Tensor:
    """β·KL(p‖m) + (1−β)·KL(q‖m) with m = βp + (1−β)q, the mean over rows; β = 0 is KL(p‖q), β = 1 is KL(q‖p).

    Args:
        input: [rows, V] log q of the student. Gets the gradient, (1−β) q log(q/m) per column; target gets none.
        target: [rows, V] log p of the teacher.
        shift_labels: [rows]; rows whose label is `ignore_index` (default -100) are left out.
        beta: 0 to 1. Default 0.5.

    Returns:
        float32 scalar, in nats.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> logq, logp = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    >>> round(liger_jsd(logq, logp).item(), 4)
    0.2158
    """
    where = "liger_jsd"
    if not 0 <= beta <= 1:
        raise ValueError(f"{where}: beta is {beta}; expected between 0 and 1")
    valid = _rows(where, input, target, shift_labels, ignore_index, "batchmean")
    return log_probabilities.reduce(log_probabilities.jsd(beta), input, target, valid, "batchmean")


class LigerJSD(nn.Module):
    """`liger_jsd` as a module.

    >>> LigerJSD(beta=0.1)(torch.zeros(1, 4).log_softmax(-1), torch.zeros(1, 4).log_softmax(-1)).item()
    0.0
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


def liger_tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """½ Σ |p − q| of probabilities, with the gradient ½ sign(p − q) to the first argument, 0 where they are equal.

    Args:
        input: [rows, V] probabilities of the student. Gets the gradient; target gets none.
        target: [rows, V] probabilities of the teacher.
        shift_labels: [rows]; rows whose label is `ignore_index` (default -100) are left out.
        reduction: "mean" (default: over valid rows × V), "batchmean" (over valid rows; the module's default), "sum", or
            "none" ([rows, V]).

    Returns:
        float32 scalar, or [rows, V].

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed.

    >>> liger_tvd(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]), reduction="batchmean").item()
    0.5
    """
    valid = _rows("liger_tvd", input, target, shift_labels, ignore_index, reduction)
    return log_probabilities.reduce(log_probabilities.total_variation(), input, target, valid, reduction)


class LigerTVDLoss(nn.Module):
    """`liger_tvd` as a module.

    >>> LigerTVDLoss()(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).item()
    0.5
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)


def _rows(
    where: str, input: Tensor, target: Tensor, labels: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Bool [rows], which rows count; raises where an argument is wrong."""
    for name, tensor in (("input", input), ("target", target)):
        inputs.logits_checked(where, tensor, name)
        if tensor.dim() != 2:
            raise ValueError(f"{where}: {name} has shape {list(tensor.shape)}; expected [rows, vocabulary]")
    if target.shape != input.shape or target.device != input.device:
        raise ValueError(
            f"{where}: target has shape {list(target.shape)} on {target.device}; expected {list(input.shape)} on "
            f"{input.device} like input"
        )
    if reduction not in log_probabilities.REDUCTIONS:
        raise ValueError(f"{where}: reduction is {reduction!r}; expected {', '.join(log_probabilities.REDUCTIONS)}")
    if labels is None:
        return torch.ones(input.shape[0], dtype=torch.bool, device=input.device)
    inputs.per_token_checked(where, "shift_labels", labels, input, integers=True)
    return labels != ignore_index
