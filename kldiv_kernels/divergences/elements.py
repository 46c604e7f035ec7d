"""What a divergence is made of: the logarithms of both rows, column by column, and helpers that lose no digits.

Notation, per row: p = softmax(t) is the teacher (reference), q = softmax(s) the student (policy),
u_j = log p_j - log q_j. A statistic is D = combine(sum_j value_j) and its gradients come from
g_j = d value_j / d log q_j:  dD/ds_k = g_k - q_k sum_j g_j  (the same with p for the teacher).

Every `value` is written so that each term is non-negative (a Bregman form: terms that sum to zero over a
row, such as q_j - p_j, are added). That keeps divergences of 1e-7 accurate, and makes sum_j g_j vanish for
the KL divergences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Below this log-probability a float64 softmax underflows to 0: such a column counts as p_j = 0.
LOG_ZERO = -745.0


@dataclass(frozen=True)
class Elements:
    """log p, log q [rows, columns] and the parameters [rows, 1] that an elementwise function may use.

    `sums` and `log_sum` [rows, 1] are the finished row sums, there when a gradient is asked for.
    """

    logp: Tensor
    logq: Tensor
    log_ratio: Tensor
    alpha: Tensor
    beta: Tensor
    sums: tuple[Tensor, ...] = ()
    log_sum: Tensor | None = None

    @cached_property
    def p(self) -> Tensor:
        return self.logp.exp()

    @cached_property
    def q(self) -> Tensor:
        return self.logq.exp()

    @property
    def u(self) -> Tensor:
        return self.log_ratio

    def swapped(self) -> Elements:
        """The same columns with the roles of student and teacher exchanged."""
        return Elements(self.logq, self.logp, -self.log_ratio, self.alpha, self.beta, self.sums, self.log_sum)

    def p_times(self, x: Tensor) -> Tensor:
        """p * x with 0 * inf = 0, and inf where p is positive but too small for the dtype."""
        return _times(self.p, self.logp, x)

    def q_times(self, x: Tensor) -> Tensor:
        return _times(self.q, self.logq, x)


def _times(weight: Tensor, log_weight: Tensor, x: Tensor) -> Tensor:
    product = torch.where(x.isinf(), x, weight * x)
    return torch.where(log_weight <= LOG_ZERO, torch.zeros_like(product), product)


Term = Callable[[Elements], Tensor | tuple[Tensor, ...]]
Combine = Callable[..., Tensor]


def expm1_over(c: Tensor, u: Tensor) -> Tensor:
    """expm1(c u) / c, which is u at c = 0."""
    return torch.where(c == 0, u, torch.expm1(c * u) / torch.where(c == 0, torch.ones_like(c), c))


def difference(e: Elements) -> Tensor:
    """p - q, relative to itself exact where the two are close."""
    return torch.where(e.u.abs() < 1, e.q * torch.expm1(e.u), e.p - e.q)
