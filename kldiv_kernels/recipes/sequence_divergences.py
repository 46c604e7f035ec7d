"""f-divergences of whole texts, towards a target that is known up to a factor.

π(x) is the policy's probability of a text x, π₀ the reference's, P(x) a score that is not normalised, Z its sum over
all texts, p = P/Z the target, w(x) the probability of x under what sampled it. Log-probabilities of texts are sums over
their tokens: `reductions.sequence_sum` of `kk.selective_log_softmax`, one read of the logits and one for the gradient.
Ratios of texts are beyond float32; the weights are made in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.f_divergences import f_slope
from kldiv_kernels.recipes.mixtures import mix_logits
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import masked, over_rows, widened

PAPERS = (
    Recipe(
        8, "GUARD", "Guaranteed Generation from Large Language Models", 2024, ("running_log_z", "acceptance_kl"),
        "none", "code", link="github.com/naver/guard",
        differs="Its loss is f_dpg_loss with divergence='forward_kl': P is the model's probability where the "
        "constraint holds, 0 elsewhere.",
    ),
    Recipe(
        11, "f-DPG", "Aligning Language Models with Preferences through f-divergence Minimization", 2023,
        ("f_dpg_loss", "f_dpg_rewards"), "none", "code", link="github.com/naver/disco",
        differs="js is the code's default and, as there, twice the package's statistic. The code's baseline is the "
        "mean reward of the last 1024 samples; here it is the caller's number, and 0 without one.",
    ),
    Recipe(
        25, "KL-RL as inference", "RL with KL penalties is better viewed as Bayesian inference", 2022,
        ("posterior_logits",), "none", "derived",
        differs="Derived from the abstract and the known result. The loss is reverse_kl to these logits.",
    ),
    Recipe(
        32, "Implicit reward", "Implicit Reward as the Bridge: A Unified View of SFT and DPO Connections", 2025,
        ("implicit_reward_loss",), "none", "derived",
        differs="Seen in an abstract and reviews only: the functions of the ratio are derived, not the paper's table. "
        "Where they end, `floor` has no default. The paper's own advice is a smaller learning rate.",
    ),
)  # fmt: skip

Divergence = Literal[
    "js", "forward_kl", "reverse_kl", "tvd", "forward_chi2", "reverse_chi2", "alpha", "hellinger", "jeffreys"
]
ImplicitReward = Literal["total_variation", "hellinger", "chi2", "iq_chi2"]
# f' of the code where it is not the table's: a factor, and a constant that has no mean gradient.
_SCALE = {"js": 2.0}
_CONSTANT = {"reverse_kl": 1.0, "forward_chi2": 1.0}


@torch.no_grad()
def f_dpg_rewards(
    sequence_logprobs: Tensor,
    target_scores: Tensor,
    log_z: float | Tensor,
    *,
    divergence: Divergence = "js",
    alpha: float = 0.5,
    log_t_clamp: float = math.inf,
) -> Tensor:
    r"""−f'(t), t = π/(P/Z): what a sampled text is worth, [B] float64; paper 11 (f-DPG) and its code.

    log t of π and p: js softplus(−log t) − log 2; forward_kl (p first) 1/t; reverse_kl −log t − 1; tvd −½ sign(log t);
    forward_chi2 t^−2 − 1; reverse_chi2 −2(t − 1); alpha, hellinger, jeffreys: see `f_divergences.f_slope`.

    Args: as of `f_dpg_loss`, whose baseline is a mean of these.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.f_dpg_rewards(torch.tensor([-2.0]), torch.tensor([-0.5]), 0.0, divergence="reverse_kl")
    tensor([0.5000], dtype=torch.float64)
    """
    of_tokens_checked(sequence_logprobs, target_scores=target_scores)
    log_t = _log_t(sequence_logprobs, target_scores, log_z, log_t_clamp)
    slope = _SCALE.get(divergence, 1.0) * f_slope(divergence, log_t, alpha)
    return -(slope + _CONSTANT.get(divergence, 0.0))


def f_dpg_loss(
    sequence_logprobs: Tensor,
    target_scores: Tensor,
    log_z: float | Tensor,
    proposal_logprobs: Tensor,
    *,
    divergence: Divergence = "js",
    alpha: float = 0.5,
    baseline: float | Tensor = 0.0,
    log_t_clamp: float = math.inf,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""−mean (π/w)·(r − b)·log π, with r = `f_dpg_rewards` and the factors without gradient; paper 11 (f-DPG).

    Its mean gradient over samples of w is that of D_f(π‖p). divergence="forward_kl", KL(p‖π), is paper 8 (GUARD) and
    DPG, whose factor is P/(Z·w); "reverse_kl" is REINFORCE with a KL penalty. The value means nothing.

    Args:
        sequence_logprobs: [B], log π of the samples. target_scores: [B], log P, −inf where P is 0. log_z: log Z, see
            `running_log_z`. proposal_logprobs: [B], log w; the policy's own where it samples.
        divergence: "js" in the code. alpha: of divergence "alpha". baseline: b, such as a moving mean of the rewards.
        log_t_clamp: bounds |log t|. mask: [B]; samples that are left out. normalizer: default: their number.

    >>> import torch, kldiv_kernels as kk
    >>> logprobs = torch.tensor([-2.0, -1.0], requires_grad=True)
    >>> loss = kk.recipes.f_dpg_loss(
    ...     logprobs, torch.tensor([-1.0, -3.0]), 0.0, logprobs.detach(), divergence="forward_kl")
    >>> loss.backward()
    >>> logprobs.grad
    tensor([-1.3591, -0.0677])
    """
    of_tokens_checked(
        sequence_logprobs, target_scores=target_scores, proposal_logprobs=proposal_logprobs, mask=mask
    )  # fmt: skip
    valid = _valid(sequence_logprobs, mask)
    own, target, proposal = (masked(x, valid) for x in (sequence_logprobs, target_scores, proposal_logprobs))
    with torch.no_grad():
        rewards = f_dpg_rewards(own, target, log_z, divergence=divergence, alpha=alpha, log_t_clamp=log_t_clamp)
        log_ratio = own.double() - proposal.double()
        ratio = log_ratio.exp()
        if divergence == "forward_kl":
            # In one exponent, since P/w is a number where π is 0.
            weighted = (log_ratio - _log_t(own, target, log_z, log_t_clamp)).exp()
        else:
            weighted = torch.where(ratio == 0, 0.0, ratio * rewards)
        factor = (weighted - ratio * baseline).to(widened(own).dtype)
    return over_rows("f_dpg_loss", torch.where(factor == 0, 0.0, -factor * own), valid, "mean", normalizer)


@torch.no_grad()
def running_log_z(
    target_scores: Tensor,
    proposal_logprobs: Tensor,
    *,
    log_z: float | Tensor = 0.0,
    count: float | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    r"""(log Z, how many samples), Z the mean of P/w over these samples and the `count` before; papers 8 and 11.

    Args: target_scores, proposal_logprobs: [B], log P and log w of samples of w. log_z, count: what it returned before;
    with count 0 log_z is not looked at.

    >>> import torch, kldiv_kernels as kk
    >>> first = kk.recipes.running_log_z(torch.tensor([-1.0, -torch.inf]), torch.tensor([-1.0, -2.0]))
    >>> log_z, count = kk.recipes.running_log_z(
    ...     torch.tensor([-1.0]), torch.tensor([-1.0]), log_z=first[0], count=first[1])
    >>> round(log_z.exp().item(), 4), count.item()
    (0.6667, 3.0)
    """
    of_tokens_checked(target_scores, proposal_logprobs=proposal_logprobs)
    score = target_scores.double() - proposal_logprobs.double()
    before, so_far = (torch.as_tensor(x, dtype=torch.float64, device=score.device) for x in (log_z, count))
    total = so_far + score.numel()
    earlier = torch.where(so_far > 0, before + so_far.log(), -torch.inf)
    summed = torch.cat([score.flatten(), earlier.reshape(1)]).logsumexp(0)
    return summed - total.clamp_min(1).log(), total


def acceptance_kl(rate: float | Tensor) -> Tensor:
    r"""KL(g'‖a') = −log AR of rejection sampling: g' is a' where the constraint holds, AR how often; paper 8 (GUARD).

    Args: rate: AR, the share of a's samples that are accepted; inf for 0.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.acceptance_kl(0.5).item(), 4)
    0.6931
    """
    rate = torch.as_tensor(rate)
    return -widened(rate).log()


def posterior_logits(reference_logits: Tensor, rewards: Tensor, *, beta: float) -> Tensor:
    r"""t + r/β, whose softmax is in proportion to π₀·e^{r/β}, in float32, without gradient; paper 25, derived.

    The best policy of E[r] − β·KL(π‖π₀) over one choice of V; −β times the gradient of `kk.reverse_kl` to it is that
    objective's.

    Args: reference_logits, rewards: [*, V], t and r. A reward of −inf forbids a choice. beta: β > 0.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.posterior_logits(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), beta=0.5).tolist()
    [[2.0, 0.0]]
    """
    if not beta > 0:
        raise ValueError(f"posterior_logits: beta is {beta}; expected a number above 0")
    of_tokens_checked(reference_logits, rewards=rewards)
    return mix_logits((1.0, reference_logits), (1 / beta, rewards))


def implicit_reward_loss(
    log_ratio: Tensor,
    *,
    beta: float = 1.0,
    kind: ImplicitReward = "total_variation",
    floor: float | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""−mean φ(u), u = β(log π − log π₀) of texts to imitate, or of their tokens; paper 32 (implicit reward), derived.

    φ is the inverse of an f-divergence's conjugate: total_variation u, which is fine-tuning on labels times β;
    hellinger u/(1 + u); chi2 2(√(1 + u) − 1); iq_chi2 u − u²/4. At the reference they all have the slope 1.

    Args:
        log_ratio: [*], with gradient. beta: β. floor: above −1, up to 0, for hellinger and chi2, which end at u = −1:
            below it φ goes on straight, with its slope there. mask: [*]. normalizer: default: the number of rows.

    Raises ValueError for another kind, for hellinger and chi2 without a floor, and for the others with one.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.implicit_reward_loss(torch.tensor([1.0]), kind="hellinger", floor=-0.5).item(), 4)
    -0.5
    """
    if kind not in ("total_variation", "hellinger", "chi2", "iq_chi2"):
        raise ValueError(
            f"implicit_reward_loss: kind is {kind!r}; expected total_variation, hellinger, chi2 or iq_chi2"
        )
    ends = kind in ("hellinger", "chi2")
    if ends and (floor is None or not -1 < floor <= 0):
        raise ValueError(f"implicit_reward_loss: floor is {floor}; {kind} needs one above −1 and up to 0")
    if not ends and floor is not None:
        raise ValueError(f"implicit_reward_loss: floor is {floor}; {kind} has no end, expected None")
    of_tokens_checked(log_ratio, mask=mask)
    valid = _valid(log_ratio, mask)
    u = beta * masked(widened(log_ratio), valid)
    if floor is not None:
        inside, below = torch.where(u > floor, u, floor), torch.where(u > floor, 0.0, u - floor)
        value = inside / (1 + inside) if kind == "hellinger" else 2 * ((1 + inside).sqrt() - 1)
        slope = (1 + floor) ** (-2.0 if kind == "hellinger" else -0.5)
        value = value + slope * below
    else:
        value = u if kind == "total_variation" else u - u.square() / 4
    return over_rows("implicit_reward_loss", -value, valid, "mean", normalizer)


def _log_t(sequence_logprobs: Tensor, target_scores: Tensor, log_z: float | Tensor, clamp: float) -> Tensor:
    if not clamp > 0:
        raise ValueError(f"f_dpg: log_t_clamp is {clamp}; expected a number above 0, or inf for none")
    return (sequence_logprobs.double() - (target_scores.double() - log_z)).clamp(-clamp, clamp)


def _valid(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
