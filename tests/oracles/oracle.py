"""What every statistic and its gradients are, in float64: the textbook formulas, differentiated by autograd.

Shares no code with the package. A column at −inf is taken as the limit of a column far below the others: `floor`
says how far, so that evaluating at two floors tells a finite limit from a divergent one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 700.0


@dataclass(frozen=True)
class Rows:
    """s [N, V] scaled student logits, log p and log q [N, V], parameters [N, 1], labels [N, K]."""

    s: Tensor
    logp: Tensor
    logq: Tensor
    alpha: Tensor
    beta: Tensor
    labels: Tensor

    @property
    def p(self) -> Tensor:
        return self.logp.exp()

    @property
    def q(self) -> Tensor:
        return self.logq.exp()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _mixture(r: Rows, weight_of_p: Tensor) -> Tensor:
    return torch.logaddexp(weight_of_p.log() + r.logp, (1 - weight_of_p).log() + r.logq)


def _picked(logs: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels < 0, 0.0, logs.gather(1, labels.clamp_min(0)))


def _without(logs: Tensor, labels: Tensor) -> Tensor:
    columns = torch.arange(logs.shape[1])
    return torch.where((labels[:, :, None] == columns).any(1), -torch.inf, logs)


def _js(r: Rows) -> Tensor:
    inner = (r.beta > 0) & (r.beta < 1)
    beta = torch.where(inner, r.beta, 0.5)
    log_m = _mixture(r, beta)
    mixed = beta[:, 0] * _kl(r.logp, log_m) + (1 - beta[:, 0]) * _kl(r.logq, log_m)
    ends = torch.where(r.beta[:, 0] == 0, _kl(r.logp, r.logq), _kl(r.logq, r.logp))
    return torch.where(inner[:, 0], mixed, ends)


def _skew(log_a: Tensor, log_b: Tensor, alpha: Tensor) -> Tensor:
    """KL(a || αa + (1−α)b)"""
    inner = alpha < 1
    weight = torch.where(inner, alpha, 0.5)
    log_m = torch.where(weight > 0, torch.logaddexp(weight.clamp_min(1e-300).log() + log_a, (1 - weight).log() + log_b),
                        log_b)  # fmt: skip
    return torch.where(inner[:, 0], _kl(log_a, log_m), 0.0)


def _power_sum(r: Rows, alpha: Tensor) -> Tensor:
    return (alpha * r.logp + (1 - alpha) * r.logq).logsumexp(-1)


def _alpha(r: Rows) -> Tensor:
    pole = (r.alpha == 0) | (r.alpha == 1)
    a = torch.where(pole, 0.5, r.alpha)
    general = (_power_sum(r, a).exp() - 1) / (a * (a - 1))[:, 0]
    ends = torch.where(r.alpha[:, 0] == 1, _kl(r.logp, r.logq), _kl(r.logq, r.logp))
    return torch.where(pole[:, 0], ends, general)


def _alpha_beta(r: Rows) -> Tensor:
    a, b = r.alpha, r.beta
    cross = (a * r.logp + b * r.logq).exp()
    powers = a / (a + b) * ((a + b) * r.logp).exp() + b / (a + b) * ((a + b) * r.logq).exp()
    return (-(cross - powers) / (a * b)).sum(-1)


def _cauchy_schwarz(r: Rows) -> Tensor:
    return (2 * r.logp).logsumexp(-1) + (2 * r.logq).logsumexp(-1) - 2 * (r.logp + r.logq).logsumexp(-1)


FORMULAS: dict[str, Callable[[Rows], Tensor]] = {
    "logprob": lambda r: _picked(r.logq, r.labels),
    "reference_logprob": lambda r: _picked(r.logp, r.labels),
    "untempered_logprob": lambda r: _picked(r.logq, r.labels),
    "tail_logprob": lambda r: _without(r.logq, r.labels).logsumexp(-1),
    "logsumexp": lambda r: r.s.logsumexp(-1),
    "entropy": lambda r: -(r.q * r.logq).sum(-1),
    "reference_entropy": lambda r: -(r.p * r.logp).sum(-1),
    "cross_entropy": lambda r: -(r.p * r.logq).sum(-1),
    "forward_kl": lambda r: _kl(r.logp, r.logq),
    "reverse_kl": lambda r: _kl(r.logq, r.logp),
    "jeffreys": lambda r: ((r.p - r.q) * (r.logp - r.logq)).sum(-1),
    "js": _js,
    "skew_kl": lambda r: _skew(r.logp, r.logq, r.alpha),
    "skew_reverse_kl": lambda r: _skew(r.logq, r.logp, r.alpha),
    "hellinger": lambda r: 0.5 * (((0.5 * r.logp).exp() - (0.5 * r.logq).exp()) ** 2).sum(-1),
    "tvd": lambda r: 0.5 * (r.p - r.q).abs().sum(-1),
    "forward_chi2": lambda r: (2 * r.logp - r.logq).exp().sum(-1) - 1,
    "reverse_chi2": lambda r: (2 * r.logq - r.logp).exp().sum(-1) - 1,
    "renyi": lambda r: _power_sum(r, r.alpha) / (r.alpha[:, 0] - 1),
    "alpha": _alpha,
    "alpha_beta": _alpha_beta,
    "triangular": lambda r: ((r.p - r.q) ** 2 / (r.p + r.q).clamp_min(1e-300)).sum(-1),
    "collision": lambda r: (2 * r.logq).logsumexp(-1),
    "cauchy_schwarz": _cauchy_schwarz,
    "max_logprob": lambda r: r.logq.amax(-1),
    "argmax": lambda r: r.logq.argmax(-1).double(),
}


@dataclass(frozen=True)
class Expected:
    """A statistic [*] or [*, K], its gradients [*, V], and their floors [*, 1].

    A gradient is a difference, ∂D/∂s_k = (g_k − q_k Σ_j g_j)/τ with g = ∂D/∂log q. No fp32 code has an error below a
    rounding of its two terms, however small their difference: the floor is the largest of the row's terms and
    probabilities.
    """

    value: Tensor
    student: Tensor
    teacher: Tensor
    student_floor: Tensor
    teacher_floor: Tensor


def evaluate(
    name: str,
    logits: Tensor,
    reference: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cotangent: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    reference_temperature: float | Tensor | None = None,
    alpha: float | Tensor = 0.5,
    beta: float | Tensor = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    exclude: Tensor | None = None,
    floor: float = FLOOR,
) -> Expected:
    """The statistic `name` and the gradients of (cotangent · value).sum()."""
    temperature = 1.0 if name == "untempered_logprob" else temperature
    leading, columns = logits.shape[:-1], logits.shape[-1]
    reference = logits if reference is None else reference

    def per_row(x: float | Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64).expand(leading).reshape(-1, 1)

    tau = per_row(temperature)
    tau_p = tau if reference_temperature is None else per_row(reference_temperature)
    left_out = torch.zeros(leading.numel(), columns, dtype=torch.bool)
    if exclude is not None:
        left_out = torch.arange(columns) == exclude.reshape(-1, 1)
    read = torch.ones(leading.numel(), 1, dtype=torch.bool) if mask is None else (mask != 0).reshape(-1, 1)
    given = torch.zeros(leading, dtype=torch.int64) if labels is None else labels
    per_token = given.shape[-1] if given.dim() > len(leading) else 1
    table = torch.where(given == ignore_index, -1, given).reshape(leading.numel(), per_token)

    def rows(x: Tensor, scale: Tensor) -> Tensor:
        flat = x.detach().double().reshape(-1, columns)
        flat = torch.where(read & ~left_out, flat, torch.where(read, -torch.inf, 0.0))
        lowest = flat.amax(-1, keepdim=True) - floor * scale
        return torch.where(flat == -torch.inf, lowest, flat).requires_grad_()

    s, t = rows(logits, tau), rows(reference, tau_p)
    student, teacher = s / tau, t / tau_p
    logq, logp = student.log_softmax(-1), teacher.log_softmax(-1)
    value = FORMULAS[name](Rows(student, logp, logq, per_row(alpha), per_row(beta), table))
    value = torch.where(read if value.dim() == 2 else read[:, 0], value, 0.0)
    weight = torch.ones_like(value) if cotangent is None else cotangent.detach().double().reshape(value.shape)
    ds, dt, dlogq, dlogp = torch.zeros_like(s), torch.zeros_like(t), torch.zeros_like(s), torch.zeros_like(t)
    if value.requires_grad:
        ds, dt, dlogq, dlogp = torch.autograd.grad((weight * value).sum(), [s, t, logq, logp], materialize_grads=True)
    ds, dt = ds.masked_fill(left_out, 0.0), dt.masked_fill(left_out, 0.0)
    coefficient = (weight.abs() if value.dim() == 2 else weight.abs()[:, None]).sum(-1, keepdim=True)

    def gradient_floor(logs: Tensor, g: Tensor, scale: Tensor) -> Tensor:
        share = logs.detach().exp()
        terms = g.abs() + share * (g.sum(-1, keepdim=True).abs() + coefficient)
        if name == "cauchy_schwarz":  # g itself is a difference: 2q²/Σq² − 2pq/Σpq
            terms = terms + 2 * coefficient * share**2 / share.square().sum(-1, keepdim=True)
        return (terms.amax(-1, keepdim=True) / scale).reshape(*leading, 1)

    shape = given.shape if value.dim() == 2 else leading
    return Expected(
        value.detach().reshape(shape),
        ds.reshape(logits.shape),
        dt.reshape(logits.shape),
        gradient_floor(logq, dlogq, tau),
        gradient_floor(logp, dlogp, tau_p),
    )
