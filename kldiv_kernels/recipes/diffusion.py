"""Divergences between the paths and the scores of diffusion and flow models, in plain PyTorch: there are no logits.

x: a batch of samples [B, …]. Drifts, velocities and scores have the shape of x, with a dimension of steps after the
batch's where they belong to a path. In nats.
"""

from __future__ import annotations

import math

from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.recipes.f_divergences import GENERATORS, f_curvature
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, widened
from kldiv_kernels.stats import selective_log_softmax

PAPERS = (
    Recipe(
        4, "CTRL", "Adding Conditional Control to Diffusion Models with Reinforcement Learning", 2024,
        ("path_kl", "controlled_diffusion_loss"), "R1", "code", link="github.com/zhaoyl18/CTRL",
        differs="The code weighs a step by g³·step·s, and its gradient goes through the last 5 of 50 steps. The "
        "objective of two general SDEs, with dt/(2σ²), is derived. The weights are the caller's.",
    ),
    Recipe(
        17, "f-distill", "One-step Diffusion Models with f-Divergence Distribution Matching", 2025,
        ("f_distill_loss",), "none", "code", link="github.com/NVlabs/FastGen",
        differs="The code's weights of js, hellinger and reverse_chi2 (there neyman) are 2, 4 and ½ times those here, "
        "which normalize=False alone shows. Its clamp of log r to ±10 lies outside of "
        "ratio_clamp. Its normalisation by a running histogram, which is off, and its GAN term are left out.",
    ),
    Recipe(
        24, "IPRO", "Identity-Preserving Image-to-Video Generation via Reward-Guided Optimization", 2025,
        ("identity_reward_loss",), "none", "restated",
        differs="Seen in a note. The steps' weights were not seen: step_weights has no default.",
    ),
    Recipe(
        78, "Diff-Instruct*", "Diff-Instruct*: Towards Human-Preferred One-step Text-to-image Generative Models", 2024,
        ("score_divergence_loss",), "none", "derived",
        differs="The text was not read. The sign, and that the gradient goes through x_t in every term, are those with "
        "which the gradient is that of the divergence. The constant c was not found.",
    ),
)  # fmt: skip


def path_kl(drift_difference: Tensor, *, weights: Tensor) -> Tensor:
    r"""mean over the batch of Σ_k w_k·‖Δ_k‖²: the KL of two SDEs with one noise; paper 4 (CTRL).

    With w_k = dt/(2σ_k²) it is KL(path of the model ‖ path of the other), in nats, for paths of the model; for a
    Gaussian step, w = 1/(2σ²) is that of two means.

    Args: drift_difference: [B, S, …], Δ, with gradient. weights: [S], of the steps.

    Returns: a scalar. Raises ValueError for weights of another shape.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.path_kl(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), weights=torch.tensor([0.5, 1.0])).item()
    16.5
    """
    if drift_difference.dim() < 2 or weights.shape != drift_difference.shape[1:2]:
        raise ValueError(
            f"path_kl: weights has shape {list(weights.shape)} with drifts {list(drift_difference.shape)}; "
            "expected [S] with [B, S, …]"
        )
    squares = widened(drift_difference).square().unsqueeze(-1).flatten(2).sum(-1)
    return batch_mean((squares * weights.detach()).sum(-1))


def controlled_diffusion_loss(
    class_logits: Tensor,
    labels: Tensor,
    drift_difference: Tensor,
    *,
    weights: Tensor,
    guidance: float = 5.0,
    kl_coef: float = 5e-6,
    backend: Backend = "auto",
) -> Tensor:
    r"""−γ·mean log p(y|x₀) + kl_coef·`path_kl`: condition a diffusion model on a classifier; paper 4 (CTRL).

    The gradient goes back through the sampled x₀ into the model, and through Δ.

    Args:
        class_logits: [B, C], the classifier's at the samples, which is where its own weights must be frozen.
        labels: [B], the wanted class. drift_difference: [B, S, …], of the model less the model before training.
        weights: [S], see `path_kl`. guidance: γ. kl_coef: the function default of the code.
        backend: see `kk.token_stats`.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.controlled_diffusion_loss(
    ...     torch.zeros(1, 2), torch.tensor([0]), torch.zeros(1, 3, 4), weights=torch.ones(3), guidance=1.0)
    tensor(0.6931)
    """
    if class_logits.dim() != 2 or class_logits.shape[0] != drift_difference.shape[0]:
        raise ValueError(
            f"controlled_diffusion_loss: class_logits has shape {list(class_logits.shape)} with drifts "
            f"{list(drift_difference.shape)}; expected [B, C] with [B, S, …]"
        )
    reward = batch_mean(selective_log_softmax(class_logits, labels, backend=backend))
    return -guidance * reward + kl_coef * path_kl(drift_difference, weights=weights)


def f_distill_loss(
    x: Tensor,
    teacher_score: Tensor,
    fake_score: Tensor,
    log_ratio: Tensor,
    *,
    divergence: str = "js",
    alpha: float | None = None,
    normalize: bool = True,
    ratio_clamp: tuple[float, float] = (0.1, 20.0),
    weight: float | Tensor = 1.0,
) -> Tensor:
    r"""½·mean (x − sg[x − w·h(r)·(fake − teacher)])²: one-step distillation by an f-divergence; paper 17 (f-distill).

    The gradient by x is w·h·(fake − teacher) over the number of elements. h(r) = r²f''(r) of the density ratio r = p/q:
    `f_divergences.f_curvature` at −log r. reverse_kl 1, which is plain distribution matching; forward_kl r; jeffreys
    1 + r; js ½r/(1 + r); hellinger ¼√r; reverse_chi2 2/r; softened_reverse_kl 1/(1 + r).

    Args:
        x: [B, …], what the student made, with gradient. teacher_score, fake_score: like x, ∇ log p of the teacher and
            ∇ log q of the student's own samples, or denoised images in their places.
        log_ratio: [B], log p − log q by a discriminator (its mean logit).
        divergence: one of the above, or another of `f_divergences` that has a curvature. alpha: of "alpha", 0.5.
        normalize: h is divided by its mean over the batch. ratio_clamp: the bounds of r.
        weight: w, a number or [B]; the paper's is 1/mean|x − the teacher's image| of the sample.

    Returns: a scalar. Raises ValueError for shapes that do not fit and for unknown divergences.

    >>> import torch, kldiv_kernels as kk
    >>> x = torch.zeros(2, 2, requires_grad=True)
    >>> kk.recipes.f_distill_loss(x, torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([0.0, 9.0])).backward()
    >>> x.grad
    tensor([[0.1721, 0.1721],
            [0.3279, 0.3279]])
    """
    if teacher_score.shape != x.shape or fake_score.shape != x.shape or log_ratio.shape != x.shape[:1]:
        raise ValueError(
            f"f_distill_loss: x has shape {list(x.shape)}, teacher_score {list(teacher_score.shape)}, fake_score "
            f"{list(fake_score.shape)} and log_ratio {list(log_ratio.shape)}; expected [B, …] three times, and [B]"
        )
    low, high = ratio_clamp
    if not 0 < low < high < math.inf:
        raise ValueError(f"f_distill_loss: ratio_clamp is {ratio_clamp}; expected two numbers above 0, the lower first")
    log_r = widened(log_ratio.detach()).clamp(math.log(low), math.log(high))
    h = _curvature(divergence, -log_r, alpha)
    h = h / batch_mean(h) if normalize else h
    w = _of_samples("f_distill_loss", weight, x)
    step = (w * h).reshape(-1, *[1] * (x.dim() - 1)) * (fake_score - teacher_score).detach()
    here = widened(x)
    return 0.5 * batch_mean((here - (here - step).detach()).square())


def identity_reward_loss(
    reward: Tensor,
    velocity: Tensor,
    reference_velocity: Tensor,
    *,
    step_weights: Tensor,
    reward_coef: float = 0.1,
    kl_coef: float = 1.0,
) -> Tensor:
    r"""−λ₁·mean r + λ₂·Σ_k ω_k·‖v − v_ref‖² over the last K steps; paper 24 (IPRO), seen in a note.

    Args:
        reward: [B], with gradient through the sample (the paper's is a cosine to a pool of faces).
        velocity, reference_velocity: [B, K, …], of the steps that have a gradient; the paper's K is 4.
        step_weights: [K], ω; with 1/(2σ²) times the step's scale squared the sum is a KL in nats. Not seen.
        reward_coef, kl_coef: λ₁ and λ₂.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> v = torch.ones(1, 4, 2)
    >>> kk.recipes.identity_reward_loss(torch.tensor([1.0]), v, torch.zeros(1, 4, 2), step_weights=torch.ones(4))
    tensor(7.9000)
    """
    if reference_velocity.shape != velocity.shape or reward.shape != velocity.shape[:1]:
        raise ValueError(
            f"identity_reward_loss: reward has shape {list(reward.shape)}, velocity {list(velocity.shape)} and "
            f"reference_velocity {list(reference_velocity.shape)}; expected [B] and twice [B, K, …]"
        )
    apart = velocity - reference_velocity.detach()
    return -reward_coef * batch_mean(reward) + kl_coef * path_kl(apart, weights=step_weights)


def score_divergence_loss(
    score: Tensor, reference_score: Tensor, target_score: Tensor, *, c: float, weight: float | Tensor = 1.0
) -> Tensor:
    r"""−mean w·d'(s − s_ref)ᵀ(s − ∇log p(x_t|x₀)): the divergence E d(s − s_ref) as a loss; paper 78 (Diff-Instruct*).

    d(y) = √(‖y‖² + c²) − c, the pseudo-Huber distance, so that d'(y) = y/√(‖y‖² + c²). A reward of x₀ is the caller's
    to subtract. The value says nothing: its mean is 0, since s is the mean of the target given x_t. The gradient by the
    generator is that of E d where x_t stays fixed, if all three go through x_t = αx₀ + σε to it: evaluate both
    networks at x_t **with** gradient, their own weights frozen. Derived; the paper's text was not read.

    Args:
        score, reference_score: [B, …], s and s_ref at x_t. target_score: [B, …], ∇ log p(x_t|x₀) = −(x_t − αx₀)/σ².
        c: above 0; d is ‖y‖²/(2c) where it is large. weight: w(t), a number or [B].

    Returns: a scalar. Raises ValueError for shapes that do not fit.

    >>> import torch, kldiv_kernels as kk
    >>> s, ref, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 5.0]])
    >>> kk.recipes.score_divergence_loss(s, ref, target, c=4.0)
    tensor(-1.2000)
    """
    if reference_score.shape != score.shape or target_score.shape != score.shape:
        raise ValueError(
            f"score_divergence_loss: score has shape {list(score.shape)}, reference_score "
            f"{list(reference_score.shape)} and target_score {list(target_score.shape)}; expected the same"
        )
    if not c > 0:
        raise ValueError(f"score_divergence_loss: c is {c}; expected a number above 0")
    apart, error = ((widened(score) - x).flatten(1) for x in (reference_score, target_score))
    slope = apart / (apart.square().sum(-1, keepdim=True) + c**2).sqrt()
    w = _of_samples("score_divergence_loss", weight, score)
    return -batch_mean(w * (slope * error).sum(-1))


def _curvature(divergence: str, log_u: Tensor, alpha: float | None) -> Tensor:
    if alpha is not None and divergence != "alpha":
        raise ValueError(f"f_distill_loss: alpha is {alpha} with divergence {divergence!r}; expected it with 'alpha'")
    if divergence == "softened_reverse_kl":
        return log_u.sigmoid()
    if divergence not in GENERATORS or divergence == "tvd":
        expected = ", ".join(name for name in GENERATORS if name != "tvd")
        raise ValueError(f"f_distill_loss: divergence is {divergence!r}; expected softened_reverse_kl, {expected}")
    return f_curvature(divergence, log_u, 0.5 if alpha is None else alpha)


def _of_samples(where: str, weight: float | Tensor, x: Tensor) -> float | Tensor:
    """A weight of each sample, without gradient."""
    if not isinstance(weight, Tensor):
        return weight
    if weight.shape != x.shape[:1]:
        raise ValueError(f"{where}: weight has shape {list(weight.shape)}; expected a number or {list(x.shape[:1])}")
    return weight.detach()
