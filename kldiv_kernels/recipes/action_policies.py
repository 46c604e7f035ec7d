"""PPO's surrogate where the policy is no language model.

Gaussian steps of a diffusion or flow model, whose log-probability ℓ is given: the mean over dimensions of the step's
log-density. And small sets of candidates, each with an advantage of its own. In nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.policy import PolicyLoss, surrogate
from kldiv_kernels.recipes.checks import like_checked, of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, masked, policy_result, widened
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
    loss = _clipped(widened(logprobs) - old_logprobs.detach(), clipped, clip)
    if kl_coef != 0:
        if means is None or reference_means is None:
            missing = "means" if means is None else "reference_means"
            raise ValueError(f"gaussian_grpo_loss: {missing} is None; kl_coef = {kl_coef} needs both")
        apart = _square_apart(logprobs, means, reference_means=reference_means)
        loss = loss + kl_coef * (apart if sigma is None else apart / (2 * _given("sigma", sigma, logprobs) ** 2))
    return batch_mean(loss)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    r"""½·[mean max(0, 1 − D(real)) + mean max(0, 1 + D(fake))]: the reward's discriminator; paper 64 (Adv-GRPO).

    The paper's loss is this of an image's score plus 0.3 times this of its 64 patches' scores.

    Args: real, fake: scores, of any shapes, with gradient.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.hinge_discriminator_loss(torch.tensor([0.5]), torch.tensor([-2.0, 0.0])).item()
    0.5
    """
    return 0.5 * (batch_mean((1 - widened(real)).clamp_min(0)) + batch_mean((1 + widened(fake)).clamp_min(0)))


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
    scale = _given("scale", scale, logprobs)
    shift = _square_apart(logprobs, means, old_means=old_means) / (2 * scale**2)
    return (widened(logprobs) - old_logprobs.detach() + shift) * scale


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
    step_size, sigma = _given("step_size", step_size, logprobs), _given("sigma", sigma, logprobs)
    log_ratio = centred_log_ratio(logprobs, old_logprobs, means, old_means, step_size**0.5 * sigma)
    return batch_mean(_clipped(log_ratio, advantages.detach(), clip) / step_size)


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
    rows, old_rows = (torch.where(valid & ~(x <= _NOTHING), x, -torch.inf) for x in (logits, old_logits.detach()))
    stats = token_stats(
        rows, old_rows, classes, stats=("logprob", "reference_logprob"), temperature=temperature, mask=valid.any(-1),
        backend=backend,
    )  # fmt: skip
    logprob = stats.logprob.detach()
    # 0, with the gradient of a log-ratio.
    own = stats.logprob - logprob
    log_ratio = masked(_log_ratio(rows.detach(), old_rows, logprob, stats.reference_logprob, temperature), valid)
    log_ratio = log_ratio + masked(own, own == 0)
    given = masked(advantages.detach().to(log_ratio.dtype), valid)
    term = surrogate(log_ratio, given, clip_low=clip, clip_high=clip, dual_clip=dual_clip)
    metrics = {f"clip_fraction_{name}": where for name, where in term.clipped.items()}
    return policy_result(term.per_token, stats.logprob, valid, metrics=metrics)


def _log_ratio(rows: Tensor, old_rows: Tensor, logprob: Tensor, old_logprob: Tensor, temperature: float) -> Tensor:
    """logprob − old_logprob of every class, by the logits: a log-probability near −1e8 is a multiple of 8.

    The difference of the softmaxes' sums is told by each row's likeliest class, where both have all digits.
    """
    top, old_top = rows.argmax(-1, keepdim=True), old_rows.argmax(-1, keepdim=True)
    best, old_best = rows.gather(-1, top).double(), old_rows.gather(-1, old_top).double()
    apart = ((rows.double() - old_rows.double()) - (best - old_best)) / temperature
    return (apart + logprob.gather(-1, top) - old_logprob.gather(-1, old_top)).to(logprob.dtype)


def _given(name: str, x: float | Tensor, steps: Tensor) -> float | Tensor:
    """A number, or one of each step, without gradient."""
    if not isinstance(x, Tensor):
        return x
    if x.dim() > 0:
        like_checked("logprobs", steps, **{name: x})
    return widened(x.detach())


def _square_apart(steps: Tensor, means: Tensor, **others: Tensor) -> Tensor:
    """The mean square of the difference of two means, over what follows the steps' own dimensions."""
    if means.dim() <= steps.dim() or means.shape[: steps.dim()] != steps.shape:
        raise ValueError(
            f"means has shape {list(means.shape)}; expected {list(steps.shape)}, like logprobs, and a step's dimensions"
        )
    like_checked("means", means, **others)
    (other,) = others.values()
    return (widened(means) - other.detach()).square().flatten(steps.dim()).mean(-1)


def _clipped(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's surrogate; in float64, as a float32 ratio has too few digits for a clip of 1e-6."""
    term = surrogate(log_ratio.double(), advantages.double(), clip_low=clip, clip_high=clip)
    return term.per_token.to(log_ratio.dtype)
