"""Other divergences from the policy before training than the usual KL, beside a policy loss or added to one.

ℓ, ℓ_old, ℓ_ref: log-probabilities of the sampled token under the policy, the policy that sampled and the reference;
ρ = exp(ℓ − ℓ_old); A the advantage; q and p the policy's and the reference's softmax; D_f(q‖p) = E_p[f(q/p)]. Nats.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Aggregation, Backend
from kldiv_kernels.policy import PolicyLoss, importance, kl_estimate, policy_loss
from kldiv_kernels.recipes.checks import of_sequences_checked, of_tokens_checked
from kldiv_kernels.recipes.composed import apart, clipped_term, composed_loss, given, options_checked, sampled_tokens
from kldiv_kernels.recipes.f_divergences import f_value
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, policy_result, valid_rows, widened
from kldiv_kernels.stats import token_stats

PAPERS = (
    Recipe(
        22, "DPH-RL",
        "The Choice of Divergence: A Neglected Key to Mitigating Diversity Collapse in Reinforcement Learning with "
        "Verifiable Reward",
        2025, ("dph_loss",), "R1", "code", link="github.com/seamoke/DPH-RL",
        differs="As released, but of the ratio's logarithm: the code's js and α are NaN where a ratio underflows. Its "
        "JS by definition, over two streams of samples, is left out; so is reverse KL, the k3 of kk.policy_loss. "
        "Answers of exploration have a loss of their own, kk.policy_loss(clip_high=0.28, dual_clip=3).",
    ),
    Recipe(
        31, "RAPO", "Unlocking Reasoning Capabilities in LLMs via Reinforcement Learning Exploration", 2025,
        ("rapo_loss",), "R0", "restated", link="arXiv 2510.03865",
        differs="Formulas as others quote them; whether the KL is one of tokens was not certain. The printed "
        "estimator has not the gradient of the KL whose value it estimates (kl='f3'); times the ratio it has "
        "('f3_is'). "
        "Both coefficients and the powers were not found.",
    ),
    Recipe(
        42, "χ² ORPO", "Correlated Proxies: A New Definition and Improved Mitigation for Reward Hacking", 2024,
        ("chi2_penalty", "chi2_estimate", "sqrt_chi2_penalty", "occupancy_reward_penalty"), "R1", "code",
        link="github.com/cassidylaidlaw/orpo",
        differs="The code's root of action distributions is that of each state (root='token'), its root of sequences, "
        "and that of the text, the batch's. Where χ² is infinite the code takes the KL; here it stays infinite. The "
        "gradient of the sampled estimate is ½∇χ² + ∇KL(p‖q) in the mean, not ∇χ².",
    ),
)  # fmt: skip


def dph_loss(
    logits: Tensor,
    token_ids: Tensor,
    reference_logprobs: Tensor,
    *,
    coef: float,
    generator: Literal["forward_kl", "js", "alpha"] = "forward_kl",
    alpha: float | None = None,
    log_ratio_clamp: float | None = None,
    clamp: float | None = None,
    mask: Tensor | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""η·f(q/p) of tokens that the reference sampled: the loss of DPH-RL's stored answers; paper 22, its code.

    Its mean, and that of its gradient, is η times the divergence of the reference and the policy, so that the policy
    keeps what the reference can do; no reference model is needed. "forward_kl": KL(p‖q); "js": twice `js`, as in the
    paper; "alpha": 4(1 − Σ√(q p)) at α = ½.

    Args:
        logits: [B, T, V]. token_ids, reference_logprobs: [B, T], answers of the reference and its ℓ, stored.
        coef: η; 0.01 to 0.05 in the paper, 0.05 to 0.2 for js.
        alpha: of "alpha", and of no other; 0.2. log_ratio_clamp, clamp: bounds of |ℓ − ℓ_ref| and of f, beyond which
            there is no gradient; 20 and 10 for forward_kl, none for the others.
        mask, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`; its metric divergence is the mean of f.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[-0.6755]])
    >>> round(kk.recipes.dph_loss(s, torch.tensor([[1]]), t, coef=1.0).loss.item(), 4)
    0.4782
    """
    if generator not in ("forward_kl", "js", "alpha"):
        raise ValueError(f"dph_loss: generator is {generator!r}; expected forward_kl, js or alpha")
    if alpha is not None and generator != "alpha":
        raise ValueError(f"dph_loss: alpha is {alpha}; generator {generator!r} has none, expected None")
    of_tokens_checked(token_ids, reference_logprobs=reference_logprobs)
    options_checked("dph_loss", logits, aggregation=aggregation)
    if generator == "forward_kl":
        log_ratio_clamp, clamp = 20.0 if log_ratio_clamp is None else log_ratio_clamp, 10.0 if clamp is None else clamp
    stats, valid = sampled_tokens(
        logits, token_ids, mask, ignore_index, temperature=temperature, vocab_size=vocab_size, backend=backend
    )
    log_ratio = apart(stats.logprob, reference_logprobs, valid)
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    value = f_value(generator, log_ratio, 0.2 if alpha is None else alpha) * (2.0 if generator == "js" else 1.0)
    value = value if clamp is None else value.clamp(max=clamp)
    return policy_result(
        coef * value, stats.logprob, valid, aggregation=aggregation, normalizer=normalizer, entropy=stats.entropy,
        metrics={"divergence": value},
    )  # fmt: skip


def rapo_loss(
    logits: Tensor,
    reference_logits: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    power: Tensor,
    *,
    old_logprobs: Tensor,
    kl_coef: float,
    entropy_coef: float,
    kl: Literal["full", "f3", "f3_is"] = "full",
    clip: float = 0.2,
    mask: Tensor | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> PolicyLoss:
    r"""GRPO + α·KL(p^φ/Z‖q) − β·H, φ by the answer's reward; paper 31 (RAPO), as others quote it.

    A small φ flattens the reference where the reward is low; φ = 1 leaves it.

    Args:
        logits, reference_logits: [B, T, V]. token_ids, old_logprobs: [B, T]. advantages: [B] or [B, T].
        power: [B], φ, 0 to 1, increasing with the reward; below 1e-6 it counts as 1e-6, all but uniform.
        kl_coef, entropy_coef: α and β.
        kl: "full": over the vocabulary, in the read of the loss. "f3": e^x·x − e^x + 1 of the sampled token, as
            printed, x = log(p^φ/Z) − ℓ. "f3_is": ρ·f3 with both gradients, whose mean is that of the full one.
        clip: of the ratio, on both sides. mask, …, backend: see `kk.policy_loss`.

    Returns: `kk.PolicyLoss`. Two reads of the logits for the sampled forms.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[[2.0, 0.5, -1.0, 0.0]]]), torch.tensor([[[1.0, 1.5, -0.5, 0.0]]])
    >>> out = kk.recipes.rapo_loss(
    ...     s, t, torch.tensor([[1]]), torch.tensor([0.0]), torch.tensor([0.5]), old_logprobs=torch.tensor([[-1.0]]),
    ...     kl_coef=1.0, entropy_coef=0.0)
    >>> round(out.loss.item(), 4)
    0.3843
    """
    if kl not in ("full", "f3", "f3_is"):
        raise ValueError(f"rapo_loss: kl is {kl!r}; expected full, f3 or f3_is")
    of_sequences_checked(token_ids, power=power)
    shared: dict[str, Any] = {"vocab_size": vocab_size, "backend": backend}
    tempered = (temperature / widened(power.detach()).clamp_min(1e-6))[:, None].expand(token_ids.shape).contiguous()
    if kl == "full":
        return policy_loss(
            logits, token_ids, advantages, loss_type="grpo", old_logprobs=old_logprobs, clip_low=clip, clip_high=clip,
            reference_logits=reference_logits, reference_temperature=tempered, kl_estimator="forward_kl",
            kl_coef=kl_coef, entropy_coef=entropy_coef, mask=mask, aggregation=aggregation, normalizer=normalizer,
            temperature=temperature, ignore_index=ignore_index, **shared,
        )  # fmt: skip
    options_checked(
        "rapo_loss", logits, clip_low=clip, clip_high=clip, aggregation=aggregation, entropy_coef=entropy_coef
    )
    of_tokens_checked(token_ids, old_logprobs=old_logprobs)
    stats, valid = sampled_tokens(logits, token_ids, mask, ignore_index, temperature=temperature, **shared)
    target = token_stats(
        reference_logits.detach(), labels=torch.where(valid, token_ids, 0), stats=("logprob",), temperature=tempered,
        mask=valid, **shared,
    ).logprob  # fmt: skip
    estimate = kl_estimate(stats.logprob, target, "f3")
    if kl == "f3_is":
        estimate = importance(estimate, stats.logprob, given(old_logprobs, stats.logprob, valid))
    log_ratio = apart(stats.logprob, old_logprobs, valid)
    term = clipped_term(log_ratio, advantages, valid, clip_low=clip, clip_high=clip)
    per_token = term.per_token + kl_coef * estimate - entropy_coef * stats.entropy
    metrics = {"kl": estimate, "entropy": stats.entropy}
    return composed_loss(per_token, stats, valid, term, metrics, aggregation, normalizer)


def chi2_penalty(
    logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor | None = None,
    *,
    coef: float,
    root: Literal["batch", "token", "none"] = "batch",
    floor: float | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""w·√max(mean χ², floor), χ²(q‖p) = Σ q²/p − 1 of each token: a scalar to add to a policy loss; paper 42.

    Args:
        logits, reference_logits: [*, V]. labels: [*], only for `ignore_index`. coef: w; in the paper 1 to 0.01 times
            the standard deviation of the rewards under the reference.
        root: "batch": of the mean over the call's tokens, "token": of each token's χ², then the mean, "none".
        floor: under a root, where there is no gradient below it; 1e-4. None with root="none".
        mask, …, backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.chi2_penalty(s, t, coef=1.0).item(), 4)
    0.8845
    """
    if root not in ("batch", "token", "none"):
        raise ValueError(f"chi2_penalty: root is {root!r}; expected batch, token or none")
    if root == "none" and floor is not None:
        raise ValueError(f"chi2_penalty: floor is {floor}; it is one of a root, and root is 'none'")
    lowest = 1e-4 if floor is None else floor
    # 0 times a divergence that is infinite would be NaN.
    valid = valid_rows(logits, labels, mask, ignore_index) & (coef != 0)
    chi2 = token_stats(
        logits, reference_logits.detach(), stats=("reverse_chi2",), mask=valid, temperature=temperature,
        vocab_size=vocab_size, backend=backend,
    ).reverse_chi2  # fmt: skip
    if root == "token":
        chi2 = chi2.clamp_min(lowest).sqrt()
    mean = batch_mean(chi2, valid)
    return coef * (_root(mean, lowest, valid.any()) if root == "batch" else mean)


def chi2_estimate(log_ratio: Tensor, *, bound: float = 10.0) -> tuple[Tensor, Tensor]:
    r"""(L + e^−L − 1, e^L + e^−L − 2): estimates of KL(q‖p) and of χ²(q‖p) ≥ 0 from samples of q; paper 42, its code.

    Args: log_ratio: [*], L = log q − log p of a sample, such as an answer's Σ ℓ − ℓ_ref; the gradient is by it.
        bound: beyond it e^L, and beyond −bound e^−L, goes on as its tangent.

    Returns: two like log_ratio; their means are the estimates.

    >>> import torch, kldiv_kernels as kk
    >>> kl, chi2 = kk.recipes.chi2_estimate(torch.tensor([0.0, 1.0]))
    >>> kl, chi2
    (tensor([0.0000, 0.3679]), tensor([0.0000, 1.0862]))
    """

    def beyond_one(x: Tensor) -> Tensor:
        return torch.expm1(x.clamp_max(bound)) + math.exp(bound) * (x - bound).relu()

    log_ratio = widened(log_ratio)
    inverse = beyond_one(-log_ratio)
    return log_ratio + inverse, beyond_one(log_ratio) + inverse


def sqrt_chi2_penalty(
    log_ratio: Tensor, mask: Tensor | None = None, *, coef: float, floor: float = 1e-4, bound: float = 10.0
) -> Tensor:
    r"""w·√max(mean χ², floor) of whole answers, a scalar; paper 42, its code for language models.

    Args: log_ratio: [B], Σ_t ℓ − ℓ_ref of answers that the policy sampled, with gradient. mask: [B] bool, which count.
        coef: w, see `chi2_penalty`. bound: see `chi2_estimate`.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.sqrt_chi2_penalty(torch.tensor([1.0]), coef=1.0).item(), 4)
    1.0422
    """
    of_tokens_checked(log_ratio, mask=mask)
    counted = torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask != 0
    _, chi2 = chi2_estimate(torch.where(counted, log_ratio, 0.0), bound=bound)
    return coef * _root(batch_mean(chi2, counted), floor, counted.any())


@torch.no_grad()
def occupancy_reward_penalty(
    scores: Tensor, *, coef: float, kind: Literal["sqrt_chi2", "chi2", "kl"] = "sqrt_chi2"
) -> Tensor:
    r"""What rewards lose to a discriminator of the two policies' states, [*]: w·(e^d − 1)/√m; paper 42, its code.

    m: the mean of e^d − 1 without the lowest and the highest hundredth of them; where it is not above 0 nothing is
    divided, as for "chi2". "kl": w·d.

    Args: scores: [*], d ≈ log(policy's/reference's frequency) of states that the policy visited; trained by
        softplus(−d) there and softplus(d) on the reference's. coef: w.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.occupancy_reward_penalty(torch.tensor([0.0, 1.0]), coef=1.0)
    tensor([0.0000, 1.8538])
    """
    if kind not in ("sqrt_chi2", "chi2", "kl"):
        raise ValueError(f"occupancy_reward_penalty: kind is {kind!r}; expected sqrt_chi2, chi2 or kl")
    if kind == "kl":
        return coef * widened(scores)
    excess = torch.expm1(scores.double())
    if kind == "chi2" or scores.numel() == 0:
        return (coef * excess).to(widened(scores).dtype)
    left_out = scores.numel() // 100
    mean = excess.flatten().sort().values[left_out : scores.numel() - left_out].mean()
    return (coef * excess / torch.where(mean > 0, mean, 1.0).sqrt()).to(widened(scores).dtype)


def _root(mean: Tensor, floor: float, some: Tensor) -> Tensor:
    """√max(mean, floor), and 0 of nothing."""
    return torch.where(some, mean.clamp_min(floor).sqrt(), 0.0)
