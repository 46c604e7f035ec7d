"""Papers 63, 65, 76, 77, 86, 90: PyTorch's own Gaussians, and definitions pair by pair."""

from __future__ import annotations

import torch
from recipe_case import Case
from torch import Tensor
from torch.distributions import Normal, kl_divergence

SAMPLES, QUERIES, LATENTS = 4, 6, 5


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    out = {name: randn(SAMPLES, QUERIES) for name in ("alignment", "scores", "reference_scores")}
    out |= {"x": randn(SAMPLES, 3), "y": randn(SAMPLES, 2), "code": randn(SAMPLES, LATENTS)}
    out |= {"prediction": out["y"] + 0.5 * randn(SAMPLES, 2), "reconstruction": out["x"] + randn(SAMPLES, 3)}
    out |= {"mean": randn(SAMPLES, LATENTS), "log_variance": randn(SAMPLES, LATENTS)}
    out |= {"noise": 1 + 2 * randn(SAMPLES, 2, 3), "importance": randn(SAMPLES, 7), "prior": randn(SAMPLES, 7)}
    out["prior"][1, 2] = 0
    # A factor that neither has.
    out["prior"][2, 3] = out["importance"][2, 3] = 0
    return out


ALL = tensors()


def pick(*names: str) -> dict[str, Tensor]:
    return {name: ALL[name] for name in names}


def to_standard(mean: Tensor, variance: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=torch.float64)
    return kl_divergence(Normal(mean, variance**0.5), Normal(zero, zero + 1))


def moments(x: Tensor) -> Tensor:
    return torch.stack([to_standard(s.mean(), s.var(correction=0)) for s in x])


def posterior(mean: Tensor, log_variance: Tensor, bounds: tuple[float, float] = (-30.0, 20.0)) -> Tensor:
    return to_standard(mean, log_variance.clamp(*bounds).exp()).flatten(1).sum(-1)


def vsae(x: Tensor, reconstruction: Tensor, mean: Tensor, log_variance: Tensor | None = None, *,
         kl_coef: float) -> Tensor:  # fmt: skip
    error = ((x - reconstruction) ** 2).sum(-1)
    kl = 0.5 * (mean**2).sum(-1) if log_variance is None else posterior(mean, log_variance)
    return (error + kl_coef * kl).mean()


def grqo(alignment: Tensor, scores: Tensor, reference_scores: Tensor, alpha: float = 1e-2, beta: float = 0.04,
         eps: float = 2e-9, reduction: str = "mean") -> Tensor:  # fmt: skip
    rows = []
    for a, s, t in zip(alignment, scores, reference_scores, strict=True):
        deviation = (((a - a.mean()) ** 2).sum() / (len(a) - 1)) ** 0.5
        x = (t.sigmoid() + eps) / (s.sigmoid() + eps)
        rows.append(-alpha * (a - a.mean()) / (deviation + eps) + beta * (x - x.log() - 1))
    out = torch.stack(rows)
    return out.mean() if reduction == "mean" else out


def kernel(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    return (-((a - b) ** 2).sum() / (2 * sigma**2)).exp()


def conditional_cs(x: Tensor, y: Tensor, prediction: Tensor, sigma: float = 1.0) -> Tensor:
    def term(first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(x)):
            weights = [kernel(x[i], x[j], sigma) for j in range(len(x))]
            above = sum(w * kernel(first[i], second[j], sigma) for j, w in enumerate(weights))
            total = total + above / sum(w**2 for w in weights)
        return total.log2()

    return -2 * term(prediction, y) + term(y, y) + term(prediction, prediction)


def cs_information(x: Tensor, code: Tensor, sigma: float = 1.0, normalize: bool = True) -> Tensor:
    def information(a: Tensor, b: Tensor) -> Tensor:
        n = len(a)
        ka, kb = (torch.stack([torch.stack([kernel(p, q, sigma) for q in z]) for p in z]) for z in (a, b))
        ones = torch.ones(n, dtype=torch.float64)
        return (
            (torch.trace(ka @ kb) / n**2).log2() + (ka.sum() * kb.sum() / n**4).log2()
            - 2 * (ones @ ka @ kb @ ones / n**3).log2()
        )  # fmt: skip

    shared = information(x, code)
    return shared / (information(x, x).sqrt() * information(code, code).sqrt()) if normalize else shared


def bottleneck(x: Tensor, y: Tensor, prediction: Tensor, code: Tensor, beta: float = 0.01,
               sigma: float = 1.0) -> Tensor:  # fmt: skip
    return conditional_cs(x, y, prediction, sigma) + beta * cs_information(x, code, sigma)


def factors(importance: Tensor, prior: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for own, given in zip(importance, prior, strict=True):
        q, p = own.abs() / own.abs().sum(), given.abs() / given.abs().sum()
        kept = p > 0
        total = total + (p[kept] * (p[kept] / q[kept]).log()).sum()
    return total / len(prior)


GROUP = pick("alignment", "scores", "reference_scores")
BOTTLENECK = pick("x", "y", "prediction", "code")
WIDE = {"mean": ALL["noise"], "log_variance": 15 * ALL["noise"].flip(0)}
CASES = [
    Case("moment_kl", {"x": ALL["noise"]}, expected=moments, trained=("x",)),
    Case("posterior_kl", pick("mean", "log_variance"), expected=posterior, trained=("mean", "log_variance")),
    Case("posterior_kl", WIDE, {"bounds": (-3.0, 2.0)}, expected=posterior, trained=("mean", "log_variance"),
         name="clamped"),
    Case("vsae_loss", pick("x", "reconstruction", "mean", "log_variance"), {"kl_coef": 0.3}, expected=vsae,
         trained=("reconstruction", "mean", "log_variance")),
    Case("vsae_loss", pick("x", "reconstruction", "mean"), {"kl_coef": 0.3}, expected=vsae,
         trained=("reconstruction", "mean"), name="unit-variance"),
    Case("grqo_loss", GROUP, {"alpha": 1.0, "beta": 1.0}, expected=grqo, trained=("alignment", "scores"),
         roles=("scores", "reference_scores")),
    Case("grqo_loss", GROUP, {"eps": 0.01, "reduction": "none"}, expected=grqo, trained=("alignment", "scores"),
         name="none"),
    Case("conditional_cs_divergence", pick("x", "y", "prediction"), expected=conditional_cs, trained=("prediction",)),
    Case("conditional_cs_divergence", pick("x", "y", "prediction"), {"sigma": 0.6}, expected=conditional_cs,
         trained=("prediction",), name="narrow"),
    Case("cs_mutual_information", pick("x", "code"), expected=cs_information, trained=("code",)),
    Case("cs_mutual_information", pick("x", "code"), {"sigma": 2.0, "normalize": False}, expected=cs_information,
         trained=("code",), name="bits"),
    Case("cs_bottleneck_loss", BOTTLENECK, {"beta": 0.5}, expected=bottleneck, trained=("prediction", "code")),
    Case("factor_consistency_loss", pick("importance", "prior"), expected=factors, trained=("importance",)),
]  # fmt: skip
