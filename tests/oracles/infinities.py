"""Where a statistic is infinite, by its definition, and which side's gradient stays finite there."""

from __future__ import annotations

from collections.abc import Callable

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
    "alpha_beta": lambda alpha, beta: beta < 0,
}
NO_TEACHER_MASS: dict[str, Condition] = {
    "reverse_kl": lambda alpha, beta: True,
    "jeffreys": lambda alpha, beta: True,
    "reverse_chi2": lambda alpha, beta: True,
    "js": lambda alpha, beta: beta == 1,
    "skew_reverse_kl": lambda alpha, beta: alpha == 0,
    "alpha": lambda alpha, beta: alpha <= 0,
    "alpha_beta": lambda alpha, beta: alpha < 0,
}
# Infinite values whose gradient stays finite: q − p of the student, p − q of the teacher.
FINITE_GRADIENT = {"forward_kl": "student", "cross_entropy": "student", "reverse_kl": "teacher"}
