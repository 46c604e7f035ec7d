"""Preferences between two answers, from one number an answer: its log-probability, its log-ratio, its error.

Log-probabilities are sums over an answer's tokens of `kk.selective_log_softmax`; log-ratios are those less the
reference's, log π/π_ref. What has a gradient is said, and nothing else gets one. w and l: the preferred and the other
answer. Scalars, the means over B pairs, in nats.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from kldiv_kernels.policy import with_slope
from kldiv_kernels.recipes.checks import like_checked
from kldiv_kernels.recipes.f_divergences import f_curvature, f_slope
from kldiv_kernels.recipes.lists import preference_loss
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, widened

PAPERS = (
    Recipe(
        23, "f-DPO",
        "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", 2023,
        ("f_dpo_loss",), "none", "code", link="github.com/alecwangcq/f-divergence-dpo",
        differs="The best β is another for each divergence and has to be given: 0.9 for reverse_kl, 0.03 for "
        "forward_kl, 0.3 for js and alpha in the code's dialogue scripts.",
    ),
    Recipe(
        54, "GenARM", "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment", 2024,
        ("genarm_loss",), "none", "code", link="github.com/Yuancheng-Xu/GenARM",
        differs="Decoding is kk.recipes.mixtures.mix_logits((1, base), (1/β, reward_model)). The code's hinge, margin "
        "and means over tokens, all off, are left out.",
    ),
    Recipe(
        55, "XPO",
        "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF", 2024,
        ("xpo_loss",), "none", "restated",
        differs="As in TRL; the paper's text was not read. The sample ỹ is there the pair's answer that the reference "
        "wrote. TRL's α may be a list by epoch: give each its own.",
    ),
    Recipe(
        66, "VideoAlign", "Improving Video Generation with Human Feedback", 2026,
        ("diffusion_dpo_loss", "reward_weighted_loss"), "none", "restated",
        differs="Flow-DPO as in a code of others, whose β is 100 for means over dimensions; Flow-RWR recalled. In "
        "theory β falls with the time, (1 − t)²; the paper recommends a constant. Flow-NRG, which only samples, is "
        "left out.",
    ),
)  # fmt: skip


def f_dpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha: float | None = None,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    r"""−log σ(β·[f'(u_w) − f'(u_l)]), u = π/π_ref of an answer: DPO for other divergences; paper 23 (f-DPO), its code.

    With L = log u: reverse_kl L, which is DPO; forward_kl −e^−L; js log 2 − log(1 + e^−L); alpha (1 − e^−αL)/α.

    Args:
        chosen_log_ratios, rejected_log_ratios: [B], L, with gradient. beta: β, by the divergence; see `find("f-DPO")`.
        alpha: of "alpha", and of no other; 0.3, 0.5 and 0.7 in the paper.
        log_ratio_clamp: bound of |L|, beyond which there is no gradient; None is none. Very negative L make e^−L
            overflow.

    >>> import torch, kldiv_kernels as kk
    >>> pair = torch.tensor([0.3]), torch.tensor([-0.4])
    >>> [round(kk.recipes.f_dpo_loss(*pair, divergence=name, beta=0.1).item(), 4) for name in ("reverse_kl", "js")]
    [0.6588, 0.6754]
    """
    if divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
        raise ValueError(f"f_dpo_loss: divergence is {divergence!r}; expected reverse_kl, forward_kl, js or alpha")
    if (alpha is not None) != (divergence == "alpha"):
        wanted = "a number" if divergence == "alpha" else "None"
        raise ValueError(f"f_dpo_loss: alpha is {alpha} with divergence {divergence!r}; expected {wanted}")
    like_checked("chosen_log_ratios", chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)

    def link(log_ratio: Tensor) -> Tensor:
        x = widened(log_ratio)
        x = x if log_ratio_clamp is None else x.clamp(-log_ratio_clamp, log_ratio_clamp)
        at, power = x.detach(), 0.5 if alpha is None else alpha
        # js is twice that of the table, and so is its slope.
        factor = 2.0 if divergence == "js" else 1.0
        return with_slope(factor * f_slope(divergence, at, power), x, factor * f_curvature(divergence, at, power))

    return batch_mean(preference_loss(link(chosen_log_ratios) - link(rejected_log_ratios), beta=beta))


def genarm_loss(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, *, beta: float = 0.05, label_smoothing: float = 0.0
) -> Tensor:
    r"""−log σ(β·(log π_w − log π_l)): an autoregressive reward model, without a reference; paper 54 (GenARM), its code.

    Args: chosen_logprobs, rejected_logprobs: [B], with gradient. beta: 0.05 on HH, 0.1, 0.5 and 0.01 elsewhere.
        label_smoothing: of `lists.preference_loss`.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.genarm_loss(torch.tensor([-3.0]), torch.tensor([-3.0])).exp()
    tensor(2.)
    """
    like_checked("chosen_logprobs", chosen_logprobs, rejected_logprobs=rejected_logprobs)
    margins = widened(chosen_logprobs) - widened(rejected_logprobs)
    return batch_mean(preference_loss(margins, beta=beta, label_smoothing=label_smoothing))


def xpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    reference_sample_logprobs: Tensor,
    *,
    alpha: float = 1e-5,
    beta: float = 0.1,
    link: Literal["logistic", "ipo"] = "logistic",
) -> Tensor:
    r"""DPO of answers labelled online + α·mean log π(ỹ), ỹ sampled by the reference; paper 55 (XPO), as in TRL.

    The bonus pushes what the reference would say down, so that the policy explores.

    Args: chosen_log_ratios, rejected_log_ratios: [B], with gradient. reference_sample_logprobs: [*], of the policy for
        ỹ, with gradient. link: "ipo" is (L_w − L_l − 1/(2β))².

    >>> import torch, kldiv_kernels as kk
    >>> zero = torch.zeros(1)
    >>> round(kk.recipes.xpo_loss(zero, zero, torch.tensor([-10.0]), alpha=0.01).item(), 4)
    0.5931
    """
    if link not in ("logistic", "ipo"):
        raise ValueError(f"xpo_loss: link is {link!r}; expected logistic or ipo")
    like_checked("chosen_log_ratios", chosen_log_ratios, rejected_log_ratios=rejected_log_ratios)
    margins = widened(chosen_log_ratios) - widened(rejected_log_ratios)
    return batch_mean(preference_loss(margins, link=link, beta=beta)) + alpha * batch_mean(reference_sample_logprobs)


def diffusion_dpo_loss(
    chosen_errors: Tensor,
    rejected_errors: Tensor,
    reference_chosen_errors: Tensor,
    reference_rejected_errors: Tensor,
    *,
    beta: float,
) -> Tensor:
    r"""−log σ(−(β/2)·[(e_w − e_w^ref) − (e_l − e_l^ref)]), e = ‖v − v_θ‖² of a sample; paper 66 (VideoAlign, Flow-DPO).

    Args: chosen_errors, rejected_errors: [B], of the model, with gradient, for the same noise and time in a pair.
        reference_chosen_errors, reference_rejected_errors: [B]. beta: 100 in a code whose e is a mean over dimensions.

    >>> import torch, kldiv_kernels as kk
    >>> e = torch.tensor([0.5])
    >>> round(kk.recipes.diffusion_dpo_loss(e, 2 * e, e, 2 * e, beta=100.0).item(), 4)
    0.6931
    """
    like_checked(
        "chosen_errors", chosen_errors, rejected_errors=rejected_errors,
        reference_chosen_errors=reference_chosen_errors, reference_rejected_errors=reference_rejected_errors,
    )  # fmt: skip
    own = widened(chosen_errors) - widened(rejected_errors)
    reference = widened(reference_chosen_errors.detach()) - widened(reference_rejected_errors.detach())
    return batch_mean(preference_loss(reference - own, beta=beta / 2))


def reward_weighted_loss(errors: Tensor, rewards: Tensor) -> Tensor:
    r"""mean(e^r·‖v − v_θ‖²): flow matching weighted by the reward; paper 66 (VideoAlign, Flow-RWR), recalled.

    Args: errors: [B], with gradient. rewards: [B].

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.reward_weighted_loss(torch.tensor([2.0, 4.0]), torch.tensor([0.0, 0.0]))
    tensor(3.)
    """
    like_checked("errors", errors, rewards=rewards)
    return batch_mean(widened(rewards.detach()).exp() * errors)
