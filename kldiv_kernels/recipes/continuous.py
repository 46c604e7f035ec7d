"""Divergences of what is no distribution over classes: Gaussians, scores of queries, samples, importances of factors.

Plain PyTorch, with all gradients but those that a docstring excludes. In nats, where nothing else is said.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import forward_kl
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.mixtures import gaussian_kl
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, widened

PAPERS = (
    Recipe(
        63, "TiUE", "One-Way Ticket:Time-Independent Unified Encoder for Distilling Text-to-Image Diffusion Models",
        2026, ("moment_kl",), "none", "derived",
        differs="A review confirms a KL of the predicted noise to the normal distribution; its form follows from that. "
        "Its weight was not found, and is the caller's.",
    ),
    Recipe(
        65, "DINO-R1", "DINO-R1: Incentivizing Reasoning Capability in Vision Foundation Models", 2026,
        ("grqo_loss",), "none", "code", link="github.com/Christinepan881/DINO-R1",
        differs="As in the code: no Bernoulli KL but the k3 form of sigmoid scores, and an advantage that has a "
        "gradient. The code multiplies the last 300 queries of an image by 0 (reduction='none' and a mask do); its "
        "config has the defaults here, its class 1 and 1. That the deviation is unbiased is PyTorch's default.",
    ),
    Recipe(
        76, "CDT", "Rethinking Video Tokenization: A Conditioned Diffusion-based Approach", 2026,
        ("posterior_kl",), "none", "derived", link="github.com/ali-vilab/CDT",
        differs="The bounds of the log-variance are the code's. The training code is not released: the weights of this "
        "term, of the diffusion loss and of LPIPS are not known, and the caller's.",
    ),
    Recipe(
        77, "vSAE", "Analysis of Variational Sparse Autoencoders", 2026, ("vsae_loss",), "none", "derived",
        differs="Neither text nor code was seen; the coefficient was not found and has no default. The top-k of the "
        "sampled latents and the loss of dead features are the caller's.",
    ),
    Recipe(
        86, "CS-IB", "Cauchy-Schwarz Divergence Information Bottleneck for Regression", 2024,
        ("conditional_cs_divergence", "cs_mutual_information", "cs_bottleneck_loss"), "none", "code",
        link="github.com/SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck",
        differs="As in the code, whose denominators are Σ_j K_ij², where the estimate of a density has (Σ_j K_ij)². "
        "For distributions over classes there is kk.cauchy_schwarz, in nats.",
    ),
    Recipe(
        90, "Factor consistency",
        "Primary and Secondary Factor Consistency as Domain Knowledge to Guide Happiness Computing in Online "
        "Assessment",
        2024, ("factor_consistency_loss",), "R0", "derived",
        differs="Neither text nor code was seen. The coefficient is the caller's.",
    ),
)  # fmt: skip


def moment_kl(x: Tensor) -> Tensor:
    r"""½(μ² + σ² − 1 − log σ²) of each sample's elements, KL(N(μ, σ²)‖N(0, 1)); [B, …] -> [B]; paper 63 (TiUE).

    Derived. For predicted noise, which is standard normal where it is right. σ² is the mean square of the elements less
    their mean; a constant sample has an infinite KL.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.moment_kl(torch.tensor([[1.0, -1.0], [3.0, 1.0]]))
    tensor([0., 2.])
    """
    if x.dim() < 2:
        raise ValueError(f"moment_kl: x has shape {list(x.shape)}; expected [B, …], samples of several elements")
    elements = widened(x).flatten(1)
    mean = elements.mean(-1, keepdim=True)
    return gaussian_kl(mean, (elements - mean).square().mean(-1, keepdim=True).log())


def posterior_kl(mean: Tensor, log_variance: Tensor, *, bounds: tuple[float, float] = (-30.0, 20.0)) -> Tensor:
    r"""Σ ½(μ² + σ² − 1 − log σ²) over a sample's latents, KL(N(μ, σ²)‖N(0, 1)); [B, …] -> [B]; paper 76 (CDT).

    Args: mean, log_variance: [B, …]. bounds: of log σ²; beyond them it has no gradient.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.posterior_kl(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.5000])
    """
    of_tokens_checked(mean, log_variance=log_variance)
    return gaussian_kl(widened(mean).flatten(1), widened(log_variance).clamp(*bounds).flatten(1))


def vsae_loss(
    x: Tensor, reconstruction: Tensor, mean: Tensor, log_variance: Tensor | None = None, *, kl_coef: float
) -> Tensor:
    r"""mean over the batch of ‖x − x̂‖² + β·KL(N(μ, σ²)‖N(0, 1)); paper 77 (vSAE), derived.

    Args:
        x, reconstruction: [B, D]; x has no gradient. mean, log_variance: [B, L], of the latents before they are
            sampled and the largest chosen. log_variance: None is a variance of 1, and the KL ½‖μ‖².
        kl_coef: β.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.vsae_loss(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[2.0]]), kl_coef=0.5).item()
    3.0
    """
    of_tokens_checked(x, reconstruction=reconstruction)
    of_tokens_checked(mean, log_variance=log_variance)
    variance = torch.zeros_like(mean) if log_variance is None else log_variance
    error = (widened(reconstruction) - x.detach()).square().flatten(1).sum(-1)
    return batch_mean(error + kl_coef * gaussian_kl(widened(mean), widened(variance)))


def grqo_loss(
    alignment: Tensor,
    scores: Tensor,
    reference_scores: Tensor,
    *,
    alpha: float = 1e-2,
    beta: float = 0.04,
    eps: float = 2e-9,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""−α·Â + β(x − log x − 1), x = σ(t)/σ(s): queries of a detector as a group; paper 65 (DINO-R1), its GRQO.

    Â is a query's alignment less the mean of its image's queries, over their standard deviation; it has a gradient. The
    second term is k3 of two objectness scores, with gradient β(1 − x)(1 − σ(s)), and no Bernoulli KL.

    Args:
        alignment: [B, Q], how well each query fits, with gradient. scores, reference_scores: [B, Q], s and t, logits of
            objectness under the model and a frozen copy. eps: added to the sigmoids and the deviation.
        reduction: "mean" over queries and images, or "none" -> [B, Q], for a mask. The paper sums decoder layers.

    Raises ValueError for shapes that differ and for fewer than two queries.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> kk.recipes.grqo_loss(torch.tensor([[1.0, 0.0]]), s, t, reduction="none")
    tensor([[-0.0071,  0.0104]])
    """
    of_tokens_checked(alignment, scores=scores, reference_scores=reference_scores)
    if alignment.dim() != 2 or alignment.shape[1] < 2:
        raise ValueError(
            f"grqo_loss: alignment has shape {list(alignment.shape)}; expected [B, Q] of two queries or more"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"grqo_loss: reduction is {reduction!r}; expected mean or none")
    # float64: of equal alignments a rounding of their mean would be divided by eps.
    fit = alignment.double()
    advantages = (fit - fit.mean(-1, keepdim=True)) / (fit.std(-1, keepdim=True) + eps)
    own, other = ((widened(x).sigmoid() + eps).log() for x in (scores, reference_scores.detach()))
    apart = other - own
    # Not e^x − 1 − x, which has no digits left where the scores are close.
    loss = -alpha * advantages.to(widened(alignment).dtype) + beta * (torch.expm1(apart) - apart)
    return batch_mean(loss) if reduction == "mean" else loss


def conditional_cs_divergence(x: Tensor, y: Tensor, prediction: Tensor, *, sigma: float = 1.0) -> Tensor:
    r"""Cauchy–Schwarz divergence of p(y|x) and q(ŷ|x) by kernel densities, in bits, a scalar; paper 86 (CS-IB).

    −2·log₂ S(G(ŷ, y)) + log₂ S(G(y, y)) + log₂ S(G(ŷ, ŷ)), S(M) = Σ_i (Σ_j K_ij M_ij)/(Σ_j K_ij²), K = G(x, x) and
    G(a, b)_ij = exp(−‖a_i − b_j‖²/(2σ²)), matrices of [B, B]. It is 0 where ŷ = y, but not least there: rows weigh
    differently, which leaves a small gradient unless all x are alike.

    Args: x: [B, …], the inputs. y: [B, …], the targets. prediction: ŷ, like y, with gradient. sigma: of the kernels.

    >>> import torch, kldiv_kernels as kk
    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    >>> kk.recipes.conditional_cs_divergence(x, y, y + torch.tensor([[0.0], [1.0]]))
    tensor(0.6003)
    """
    of_tokens_checked(y, prediction=prediction)
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"conditional_cs_divergence: x has {x.shape[0]} samples; expected {y.shape[0]} like y")
    given, targets = x.detach(), y.detach()
    inputs = _log_gram(given, given, sigma, "conditional_cs_divergence")

    def log_sum(first: Tensor, second: Tensor) -> Tensor:
        log_gram = _log_gram(first, second, sigma, "conditional_cs_divergence")
        return ((inputs + log_gram).logsumexp(-1) - (2 * inputs).logsumexp(-1)).logsumexp(-1)

    nats = -2 * log_sum(prediction, targets) + log_sum(targets, targets) + log_sum(prediction, prediction)
    return (nats / math.log(2)).to(widened(prediction).dtype)


def cs_mutual_information(x: Tensor, code: Tensor, *, sigma: float = 1.0, normalize: bool = True) -> Tensor:
    r"""Cauchy–Schwarz mutual information of samples by kernel densities, in bits, a scalar; paper 86 (CS-IB).

    log₂ tr(K_x K_t)/N² + log₂ (ΣK_x·ΣK_t)/N⁴ − 2·log₂ (1ᵀK_x K_t 1)/N³, with K = G(x, x) of x and of the code t.

    Args:
        x: [B, …]. code: [B, …], with gradient. sigma: of both kernels.
        normalize: divided by √(I(x, x)·I(t, t)), as in training: 0 to 1. Where all samples are equal it is NaN.

    >>> import torch, kldiv_kernels as kk
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> kk.recipes.cs_mutual_information(x, 2 * x, normalize=False)
    tensor(0.9220)
    """
    if x.shape[0] != code.shape[0]:
        raise ValueError(f"cs_mutual_information: code has {code.shape[0]} samples; expected {x.shape[0]} like x")
    first, second = (_log_gram(z, z, sigma, "cs_mutual_information").expm1() for z in (x.detach(), code))
    shared = _information(first, second)
    if normalize:
        shared = shared / (_information(first, first) * _information(second, second)).sqrt()
    return shared.to(widened(code).dtype)


def cs_bottleneck_loss(
    x: Tensor, y: Tensor, prediction: Tensor, code: Tensor, *, beta: float = 0.01, sigma: float = 1.0
) -> Tensor:
    r"""`conditional_cs_divergence` of (x, y, ŷ) + β·`cs_mutual_information` of (x, t), a scalar; paper 86 (CS-IB).

    Args: x, y, prediction, code: [B, …], see those two. beta: β, 0 to 1 in the paper.

    >>> import torch, kldiv_kernels as kk
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> kk.recipes.cs_bottleneck_loss(x, x, x, x)
    tensor(0.0100)
    """
    return conditional_cs_divergence(x, y, prediction, sigma=sigma) + beta * cs_mutual_information(x, code, sigma=sigma)


def factor_consistency_loss(importance: Tensor, prior: Tensor, *, backend: Backend = "auto") -> Tensor:
    r"""mean KL(p‖q), p and q the absolute importances over their sums; paper 90 (happiness factors), derived.

    Args: importance: [*, F], a model's attribution to each factor, with gradient. prior: [*, F], what experts give the
    factors. Signs do not count. A factor with the prior 0 may have any importance; one with a prior must have some.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.factor_consistency_loss(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]]))
    tensor(0.1308)
    """
    if prior.shape != importance.shape:
        raise ValueError(
            f"factor_consistency_loss: prior has shape {list(prior.shape)}; expected {list(importance.shape)} like "
            "importance"
        )
    return forward_kl(_log_size(importance), _log_size(prior.detach()), backend=backend)


def _log_size(x: Tensor) -> Tensor:
    """log |x|; −inf, without a gradient of NaN, at 0."""
    nothing = x == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, 1.0, widened(x)).abs().log())


def _log_gram(first: Tensor, second: Tensor, sigma: float, where: str) -> Tensor:
    """log G, [B, B], in float64: what is made of G are differences of sums that are nearly equal."""
    if not sigma > 0:
        raise ValueError(f"{where}: sigma is {sigma}; expected a number above 0")
    if first.shape[0] != second.shape[0] or first.shape[0] == 0 or first.dim() < 2:
        raise ValueError(
            f"{where}: samples have shapes {list(first.shape)} and {list(second.shape)}; expected [B, …], one B above 0"
        )
    a, b = (widened(z).flatten(1) for z in (first, second))
    return (a[:, None] - b[None]).square().sum(-1, dtype=torch.float64) / (-2 * sigma**2)


def _information(first: Tensor, second: Tensor) -> Tensor:
    """In bits, of K − 1, whose digits K would not have where samples are close."""
    rows, columns = first.mean(-1), second.mean(-1)
    joint = (first + second + first * second).mean().log1p()
    apart = first.mean().log1p() + second.mean().log1p()
    return (joint + apart - 2 * (rows + columns + rows * columns).mean().log1p()) / math.log(2)
