"""PPO's surrogate where the policy is no language model.

Gaussian steps of a diffusion or flow model, whose log-probability ℓ is given: the mean over dimensions of the step's
log-density. And small sets of candidates, each with an advantage of its own. In nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.policy import PolicyLoss, surrogate
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, masked, policy_result
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        64, "Adv-GRPO",
        "The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation", 2026,
        ("gaussian_grpo_loss", "hinge_discriminator_loss"), "none", "code", link="github.com/showlab/Adv-GRPO",
        differs="The code leaves the division of the KL by 2σ² out, which Flow-GRPO has (sigma=).",
    ),
    Recipe(
        71, "GRPO-Guard",
        "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping", 2026,
        ("centred_log_ratio", "grpo_guard_loss"), "none", "restated",
        differs="From the documentation of verl-omni, where the shift b is not said to be without gradient: here it "
        "has one.",
    ),
    Recipe(
        75, "RIFT", "RIFT: Closed-Loop RL Fine-Tuning for Realistic and Controllable Traffic Simulation", 2026,
        ("categorical_ppo_loss",), "R1", "code", link="github.com/CurryChen77/RIFT",
        differs="The code gives candidates that are none a logit of −1e8; here a mask leaves them out. The KL of its "
        "GRPO baseline is left out.",
    ),
)  # fmt: skip
# At or below it a logit counts as −inf, as everywhere in this package.
_NOTHING = -1e30


def gaussian_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    means: Tensor | None = None,
    reference_means: Tensor | None = None,
    *,
    advantage_clip: float = 5.0,
    clip: float = 1e-5,
    kl_coef: float = 0.0,
    sigma: float | Tensor | None = None,
) -> Tensor:
    r"""GRPO on the steps of a diffusion or flow model: PPO's surrogate + β·mean (μ − μ_ref)²; paper 64 (Adv-GRPO).

    Args:
        logprobs, old_logprobs, advantages: [*], one a step; logprobs with gradient.
        means, reference_means: [*, D, …] of the step's Gaussian, under the model and a reference; for kl_coef ≠ 0.
        advantage_clip: A is clipped to ± this. clip: of the ratio, to 1 ± this.
        kl_coef: β, 0. sigma: standard deviation of the step, a number or [*]: divides the squares by 2σ² (Flow-GRPO),
            which makes them the KL's mean over dimensions.

    Returns: a scalar, the mean over the steps. Raises ValueError where kl_coef has no means.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.gaussian_grpo_loss(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, 9.0])).item()
    -3.0
    """
    of_tokens_checked(logprobs, old_logprobs=old_logprobs, advantages=advantages)
    clipped = advantages.detach().clamp(-advantage_clip, advantage_clip)
    loss = surrogate(logprobs - old_logprobs.detach(), clipped, clip_low=clip, clip_high=clip).per_token
    if kl_coef != 0:
        if means is None or reference_means is None:
            missing = "means" if means is None else "reference_means"
            raise ValueError(f"gaussian_grpo_loss: {missing} is None; kl_coef = {kl_coef} needs both")
        apart = _over_dimensions((means - reference_means.detach()).square(), logprobs)
        loss = loss + kl_coef * (apart if sigma is None else apart / (2 * _given(sigma) ** 2))
    return batch_mean(loss)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""½·[mean max(0, 1 − D(real)) + mean max(0, 1 + D(fake))]: the reward's discriminator; paper 64 (Adv-GRPO).

    The paper's loss is this of an image's score plus 0.3 times this of its 64 patches' scores.

    Args: real, fake: scores, of any shapes, with gradient.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.hinge_discriminator_loss(torch.tensor([0.5]), torch.tensor([-2.0, 0.0])).item()
    0.5
    """
    return 0.5 * (batch_mean((1 - real).clamp_min(0)) + batch_mean((1 + fake).clamp_min(0)))


def centred_log_ratio(
    logprobs: Tensor, old_logprobs: Tensor, means: Tensor, old_means: Tensor, scale: float | Tensor
) -> Tensor:
    r"""(ℓ − ℓ_old + b)·s with b = mean (μ − μ_old)²/(2s²) over dimensions; [*], with gradient; paper 71 (GRPO-Guard).

    Of steps that the old policy sampled ℓ − ℓ_old has mean −b: this has mean 0, and a standard deviation that is the
    same at each noise level. From the documentation of verl-omni; b has a gradient by `means`.

    Args: logprobs, old_logprobs: [*]. means, old_means: [*, D, …]. scale: s = √(−dt)·σ, a number or [*].

    >>> import torch, kldiv_kernels as kk
    >>> x = kk.recipes.centred_log_ratio(
    ...     torch.tensor([-1.0]), torch.tensor([-0.5]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), 0.5)
    >>> x.item()
    0.25
    """
    of_tokens_checked(logprobs, old_logprobs=old_logprobs)
    scale = _given(scale)
    shift = _over_dimensions((means - old_means.detach()).square(), logprobs) / (2 * scale**2)
    return (logprobs - old_logprobs.detach() + shift) * scale


def grpo_guard_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    means: Tensor,
    old_means: Tensor,
    *,
    step_size: float | Tensor,
    sigma: float | Tensor,
    clip: float = 2e-6,
) -> Tensor:
    r"""mean of PPO's surrogate of `centred_log_ratio` over the step size; paper 71 (GRPO-Guard), as restated there.

    Args:
        logprobs, old_logprobs, advantages, means, old_means: see `centred_log_ratio`; advantages [*].
        step_size: −dt, above 0, a number or [*]. sigma: of the noise, likewise; the scale is √step_size·σ.
        clip: of the ratio, to 1 ± this; 2e-6 is called typical.

    Returns: a scalar.

    >>> import torch, kldiv_kernels as kk
    >>> logprobs, means = torch.tensor([-1.0, -2.0]), torch.zeros(2, 3)
    >>> kk.recipes.grpo_guard_loss(
    ...     logprobs, logprobs, torch.tensor([1.0, 2.0]), means, means, step_size=0.5, sigma=1.0).item()
    -3.0
    """
    of_tokens_checked(logprobs, advantages=advantages)
    step_size = _given(step_size)
    log_ratio = centred_log_ratio(logprobs, old_logprobs, means, old_means, step_size**0.5 * sigma)
    return batch_mean(surrogate(log_ratio, advantages.detach(), clip_low=clip, clip_high=clip).per_token / step_size)


def categorical_ppo_loss(
    logits: Tensor,
    advantages: Tensor,
    *,
    old_logits: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    dual_clip: float = 3.0,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""PPO's surrogate with dual clip of every class g, r_g = q_g/q_old,g, and not of a sampled one; paper 75 (RIFT).

    For few classes, candidates that all were evaluated: the statistics hold a number for each class.

    Args:
        logits, old_logits: [*, G], q and q_old by softmax. advantages: [*, G]; the paper's are a row's returns less
            their mean, over their standard deviation (of the population) + 1e-5.
        mask: [*, G]; a class where it is 0 is left out of the softmaxes and of the mean, and so is one at −inf (−1e30
            or below) in both logits.
        clip: of the ratio, to 1 ± this. dual_clip: where A < 0 the loss is at most −dual_clip·A.
        temperature, backend: see `kk.token_stats`.

    Returns: `kk.PolicyLoss`, the mean over classes and rows; per_token_loss and logprob are [*, G].

    >>> import torch, kldiv_kernels as kk
    >>> out = kk.recipes.categorical_ppo_loss(
    ...     torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, -1.0]]), old_logits=torch.zeros(1, 2))
    >>> round(out.loss.item(), 4)
    -0.2
    """
    of_tokens_checked(logits, advantages=advantages, old_logits=old_logits, mask=mask)
    valid = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask != 0
    # What both leave out by its logit is no candidate either.
    valid = valid & ~((logits <= _NOTHING) & (old_logits <= _NOTHING))
    classes = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    rows, old_rows = (torch.where(valid, x, -torch.inf) for x in (logits, old_logits.detach()))
    stats = token_stats(
        rows, old_rows, classes, stats=("logprob", "reference_logprob"), temperature=temperature, mask=valid.any(-1),
        backend=backend,
    )  # fmt: skip
    log_ratio = masked(stats.logprob - stats.reference_logprob, valid)
    given = masked(advantages.detach().to(log_ratio.dtype), valid)
    term = surrogate(log_ratio, given, clip_low=clip, clip_high=clip, dual_clip=dual_clip)
    metrics = {f"clip_fraction_{name}": where for name, where in term.clipped.items()}
    return policy_result(term.per_token, stats.logprob, valid, metrics=metrics)


def _given(x: float | Tensor) -> float | Tensor:
    return x.detach() if isinstance(x, Tensor) else x


def _over_dimensions(x: Tensor, steps: Tensor) -> Tensor:
    """The mean over what follows the steps' own dimensions."""
    return x.flatten(steps.dim()).mean(-1)
