"""Top-k divergences by their formulas in float64, on the k tokens and the rest; and what they are tried on."""

from __future__ import annotations

import oracle
import torch
from torch import Tensor

TAILS = ["bucket", "renormalize", "renormalize_teacher", "none"]
N, V, K = 6, 70, 5


def problem(dtype: torch.dtype = torch.float32, columns: int = V, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, the teacher's k tokens in no order, and their log-probabilities."""
    logits = (2 * torch.randn(N, columns)).to(dtype)
    teacher = (logits.float() + torch.randn(N, columns)).log_softmax(-1)
    ids = teacher.topk(k, dim=-1).indices
    ids = ids.gather(1, torch.rand(ids.shape).argsort(1))
    return logits, ids, teacher.gather(1, ids)


def log_outcomes(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: str, tau: float) -> tuple[Tensor, Tensor]:
    """log q and log p over the outcomes, float64."""
    logq = (logits / tau).log_softmax(-1)
    student, teacher = logq.gather(1, ids), logprobs.double()
    if tail in ("renormalize", "none"):
        return (student, teacher) if tail == "none" else (student.log_softmax(-1), teacher.log_softmax(-1))
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, ids, False)
    rest = torch.where(others, logq, -torch.inf).logsumexp(-1, keepdim=True)
    left = torch.log1p(-teacher.exp().sum(-1, keepdim=True))
    if tail == "renormalize_teacher":
        # A limit: next to nothing is nothing.
        teacher, left = teacher.log_softmax(-1), torch.full_like(left, -700.0)
    return torch.cat([student, rest], -1), torch.cat([teacher, left], -1)


def divergence(kind: str, logq: Tensor, logp: Tensor, tail: str, alpha: float, beta: float) -> Tensor:
    if tail == "none":
        forward, reverse = (logp.exp() * (logp - logq)).sum(-1), (logq.exp() * (logq - logp)).sum(-1)
        return {
            "forward_kl": forward, "reverse_kl": reverse, "jeffreys": forward + reverse,
            "cross_entropy": -(logp.exp() * logq).sum(-1),
        }[kind]  # fmt: skip
    parameters = [torch.full((len(logq), 1), x, dtype=torch.float64) for x in (alpha, beta)]
    none = torch.zeros(len(logq), 1, dtype=torch.int64)
    return oracle.FORMULAS[kind](oracle.Rows(logq, logp, logq, *parameters, none))


def check(got: Tensor, logits: Tensor, expected: Tensor, leaf: Tensor) -> None:
    """Values [N], and the gradients of their sum weighted by row."""
    assert torch.allclose(got.double(), expected, rtol=2e-5, atol=2e-6)
    weights = torch.rand(N) + 0.5
    (mine,) = torch.autograd.grad((weights * got).sum(), logits)
    (wanted,) = torch.autograd.grad((weights.double() * expected).sum(), leaf)
    largest = wanted.abs().amax(-1, keepdim=True)
    # Skewed all the way a divergence is that of a distribution from itself.
    assert (largest > 0).all() or not expected.any()
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    assert ((mine.double() - wanted).abs() <= 3e-5 * largest + 1e-6 + rounding * wanted.abs()).all()
