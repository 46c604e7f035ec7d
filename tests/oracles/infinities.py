"""Where a statistic is infinite, by its definition, and which side's gradient stays finite there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Condition = Callable[[float, float], bool]

# When a statistic is +inf because the teacher has mass where the student has none, and the other way round.
NO_STUDENT_MASS: dict[str, Condition] = {
    "forward_kl": lambda alpha, beta: True,
    "jeffreys": lambda alpha, beta: True,
    "cross_entropy": lambda alpha, beta: True,
    "forward_chi2": lambda alpha, beta: True,
    "js": lambda alpha, beta: beta == 0,
    "skew_kl": lambda alpha, beta: alpha == 0,
    "alpha": lambda alpha, beta: alpha >= 1,
    "renyi": lambda alpha, beta: alpha > 1,
    "alpha_beta": lambda alpha, beta: beta < 0 or alpha + beta < 0,
}
NO_TEACHER_MASS: dict[str, Condition] = {
    "reverse_kl": lambda alpha, beta: True,
    "jeffreys": lambda alpha, beta: True,
    "reverse_chi2": lambda alpha, beta: True,
    "js": lambda alpha, beta: beta == 1,
    "skew_reverse_kl": lambda alpha, beta: alpha == 0,
    "alpha": lambda alpha, beta: alpha <= 0,
    "alpha_beta": lambda alpha, beta: alpha < 0 or alpha + beta < 0,
}
# Infinite values whose gradient stays finite: q − p of the student, p − q of the teacher.
FINITE_GRADIENT = {"forward_kl": "student", "cross_entropy": "student", "reverse_kl": "teacher"}

# Logarithms of a sum: where it is 0 or infinite no column has a share of it, and this is left of the gradients.
WITHOUT_SHARES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "renyi": lambda p, q, alpha: (q, -alpha / (alpha - 1) * p),
    "cauchy_schwarz": lambda p, q, alpha: tuple(2 * x * x / (x * x).sum(-1, keepdim=True) for x in (q, p)),
}
# Beyond those of every test: negative, above 1, and with a sum of either sign.
WIDE_ALPHAS = ((-1.0, 0.5), (2.0, 0.5), (2.5, 0.5))
WIDE_ALPHA_BETAS = ((-1.0, 0.5), (0.5, -1.0), (-1.0, -0.5), (-0.5, -1.5), (2.0, 1.0), (2.5, -0.5), (-0.5, 2.5))
