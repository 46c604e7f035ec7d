"""Losses of a classifier that couple the rows of a batch: transport, worst cases, frequencies of the classes.

q_i is the softmax of row i. What is summed over rows, such as the mean of all softmaxes, is the batch's, or that of the
rows given: a larger set of rows is a better estimate, and one process's rows are not those of all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.mixtures import batch_marginal
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import batch_mean, masked, valid_labels, valid_rows, widened
from kldiv_kernels.stats import entropy, selective_log_softmax, token_stats

PAPERS = (
    Recipe(
        15, "SinKD", "Sinkhorn Distance Minimization for Knowledge Distillation", 2024, ("sinkd_loss",), "R1", "code",
        link="github.com/2018cx/SinKD",
        differs="The code's script adds this term only where another one is listed too; its soft cross-entropy beside "
        "it is not multiplied by T². weight is 0.0008 for GPT-Neo and T0.",
    ),
    Recipe(
        57, "DR-AT", "Doubly Robust Instance-Reweighted Adversarial Training", 2023, ("dro_loss",), "none", "derived",
        differs="The loss is the known closed form of what a review says of it; the temperature was not seen. The "
        "attack inside, and its barrier, are the caller's.",
    ),
    Recipe(
        60, "DEPICT", "Deep Clustering via Joint Convolutional Autoencoder Embedding and Relative Entropy Minimization",
        2017, ("frequency_sharpened_targets", "soft_cross_entropy"), "R0", "code", link="github.com/herandy/DEPICT",
        differs="The paper's targets have the powers 1 and ½, the code's 2 and 1. Targets are made in PyTorch, once a "
        "round. The reconstruction losses of the autoencoder are the caller's.",
    ),
    Recipe(
        62, "RePRI", "Few-Shot Segmentation Without Meta-Learning: A Good Transductive Inference Is All You Need?",
        2020, ("repri_loss", "marginal_kl"), "torch", "code",
        link="github.com/mboudiaf/RePRI-for-Few-Shot-Segmentation",
        differs="The code adds 1e-10 inside its logarithms; here they are exact. Its binary classifier is two columns, "
        "0 and the foreground's logit.",
    ),
)  # fmt: skip

# A logarithm of 0 that leaves no NaN where two of them are subtracted.
_BLANK = -1e30


def sinkd_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    weight: float = 1e-3,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""weight·Σ_ij P_ij W_ij: transport between the student's and the teacher's rows; paper 15 (SinKD) and its code.

    W_ij = Σ_c |q_i − p_j| at temperature T. P begins at exp(−W/ε) and is normalised by rows, then by columns, as often
    as `iterations` says; the gradient goes through all of it, and to the teacher if its logits require one. A sum over
    the batch, not a mean. With one row it is twice the total variation. The paper's loss on SST-2 is 0.1 of the labels'
    cross-entropy + 0.9 of the soft one at T + 0.8 of this.

    Args:
        logits, teacher_logits: [B, C]. temperature: T. epsilon: ε, of the entropy of the plan. weight: 0.001 in the
            code. mask: [B]; rows of the student and of the teacher that are left out.
        vocab_size, backend: see `kk.token_stats`. Its gradient makes a tensor of [B, B, C].

    >>> import torch, kldiv_kernels as kk
    >>> s, b = [2.0, 0.5, -1.0, 0.0], [0.5, 0.0, 0.0, -0.5]
    >>> t, back = [1.0, 1.5, -0.5, 0.0], [0.0, -0.5, 1.5, 1.0]
    >>> round(kk.recipes.sinkd_loss(torch.tensor([s, b]), torch.tensor([t, back]), weight=1.0).item(), 4)
    0.911
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(
            f"sinkd_loss: epsilon is {epsilon}, iterations {iterations}; expected a number above 0, 1 or more"
        )
    if logits.dim() != 2:
        raise ValueError(f"sinkd_loss: logits has shape {list(logits.shape)}; expected [batch, classes]")
    of_tokens_checked(logits, teacher_logits=teacher_logits)
    valid = valid_rows(logits, None, mask)
    pairs = valid[:, None] & valid
    # Every pair of rows, without a copy of them.
    shape = (*pairs.shape, logits.shape[-1])
    cost = 2 * token_stats(
        logits[:, None].expand(shape), teacher_logits.expand(shape), stats=("tvd",), temperature=temperature,
        mask=pairs, vocab_size=vocab_size, backend=backend,
    ).tvd  # fmt: skip
    log_plan = torch.where(pairs, -cost / epsilon, _BLANK)
    for _ in range(iterations):
        for along in (1, 0):
            log_plan = torch.where(pairs, log_plan - log_plan.logsumexp(along, keepdim=True), _BLANK)
    return weight * masked(log_plan.exp() * cost, pairs).sum()


def dro_loss(losses: Tensor, *, temperature: float, mask: Tensor | None = None) -> Tensor:
    r"""r·log mean e^{ℓ/r}, the worst case over weights of the rows that are near uniform; paper 57 (DR-AT), derived.

    max over w of Σ w_i ℓ_i − r·KL(w ‖ uniform); its gradient weighs row i by softmax(ℓ/r)_i. r → ∞ is the mean, r → 0
    the maximum.

    Args: losses: [*], such as −`kk.selective_log_softmax` of the attacked inputs. temperature: r > 0, which was not
    seen. mask: [*].

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.dro_loss(torch.tensor([0.0, 1.0]), temperature=1.0).item(), 4)
    0.6201
    """
    if not temperature > 0:
        raise ValueError(f"dro_loss: temperature is {temperature}; expected a number above 0")
    of_tokens_checked(losses, mask=mask)
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask != 0
    # float64: a large r multiplies what log mean e^{ℓ/r} is rounded by.
    scaled = torch.where(valid, losses.double() / temperature, _BLANK).flatten()
    # One more, since no row at all has no maximum.
    total = (
        torch.cat([scaled, scaled.new_full((1,), _BLANK)]).logsumexp(0)
        - valid.sum().clamp_min(1).to(scaled.dtype).log()
    )
    return (temperature * torch.where(valid.any(), total, 0.0)).to(widened(losses).dtype)


@torch.no_grad()
def frequency_sharpened_targets(
    logits: Tensor,
    *,
    power: float = 1.0,
    frequency_power: float = 0.5,
    frequencies: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    r"""log Q with Q_k in proportion to P_k^a / f_k^b, P the softmax and f its sum over the rows; paper 60 (DEPICT).

    Rows of Q sum to 1. A cluster that has many rows already attracts fewer. For `soft_cross_entropy`.

    Args:
        logits: [*, K], of the clean path. power, frequency_power: a and b; 1 and ½ in the paper, 2 and 1 in its code.
        frequencies: [K], of the whole data set, up to a factor. Default: those of the rows given, which then are to be
            the whole data set. mask: [*]; the other rows do not count in f, and have log Q = 0.

    >>> import torch, kldiv_kernels as kk
    >>> rows = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    >>> kk.recipes.frequency_sharpened_targets(rows).exp()
    tensor([[0.7237, 0.2763],
            [0.4955, 0.5045]])
    """
    valid = valid_rows(logits, None, mask)
    logp = masked(widened(logits), valid[..., None]).log_softmax(-1)
    if frequencies is None:
        # Not the log of a sum, which is −∞ for a class that all rows have next to never.
        log_frequencies = torch.where(valid[..., None], logp, -torch.inf).flatten(end_dim=-2).logsumexp(0)
    elif frequencies.shape == logits.shape[-1:]:
        log_frequencies = frequencies.log()
    else:
        raise ValueError(
            f"frequency_sharpened_targets: frequencies has shape {list(frequencies.shape)}; expected "
            f"[{logits.shape[-1]}], one a class"
        )
    # A class without probability stays without, whatever its frequency.
    sharpened = torch.where(logp == -torch.inf, -torch.inf, power * logp - frequency_power * log_frequencies)
    return masked(sharpened.log_softmax(-1), valid[..., None])


def soft_cross_entropy(logits: Tensor, target_logprobs: Tensor, **options: Any) -> Tensor:
    r"""−Σ_k Q_k log q_k, the mean over the rows, value and gradient in one read; paper 60 (DEPICT), its clustering.

    Args: logits: [*, K], of the noisy path. target_logprobs: [*, K], log Q, as of `frequency_sharpened_targets`;
    normalised again, without gradient. options: of `kk.divergence_loss`; `temperature` is the logits' alone.

    >>> import torch, kldiv_kernels as kk
    >>> round(kk.recipes.soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.8, 0.2]]).log()).item(), 4)
    0.6931
    """
    return divergence_loss(
        logits, target_logprobs.detach(), "cross_entropy", **{"reference_temperature": 1.0, **options}
    )


def marginal_kl(logits: Tensor, log_prior: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    r"""KL(m ‖ π) of the mean m of all rows' softmaxes, with its gradient; paper 62 (RePRI) and its code.

    Args: logits: [*, C]. log_prior: [C], log π, without gradient. temperature: of the softmaxes. mask: [*].

    Returns: a scalar; 0 without a row. Makes tensors of [N, C] in PyTorch.

    >>> import torch, kldiv_kernels as kk
    >>> rows, prior = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(kk.recipes.marginal_kl(rows, prior).item(), 4)
    0.0823
    """
    if log_prior.shape != logits.shape[-1:]:
        raise ValueError(
            f"marginal_kl: log_prior has shape {list(log_prior.shape)}; expected [{logits.shape[-1]}], one a class"
        )
    marginal = batch_marginal(logits, valid_rows(logits, None, mask), temperature)
    some = marginal > 0
    apart = torch.where(some, torch.where(some, marginal, 1.0).log() - log_prior.detach(), 0.0)
    return (marginal * apart).sum()


def repri_loss(
    support_logits: Tensor,
    support_labels: Tensor,
    query_logits: Tensor,
    log_prior: Tensor,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    query_mask: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    r"""w₁·mean of −log q_c (support) + w₂·`marginal_kl` (query) + w₃·mean H(q) (query); paper 62 (RePRI) and its code.

    Args:
        support_logits: [*, C], of labelled pixels. support_labels: [*]; ignored ones are left out. query_logits:
            [*, C], of the pixels of the image to be segmented. query_mask: like their rows.
        log_prior: [C], log π, the classes' shares of the query's pixels: the model's own at first, without gradient,
            and once more after some steps (10 in the code, which then adds 1 to w₂).
        weights: w₁, w₂, w₃; the code has 1 and twice 1 over the number of support images. backend: see
            `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, q = torch.zeros(3, 2), torch.zeros(5, 2)
    >>> loss = kk.recipes.repri_loss(s, torch.tensor([0, 1, 1]), q, torch.tensor([0.5, 0.5]).log())
    >>> round(loss.item(), 4)
    1.3863
    """
    labels, labelled = valid_labels(support_labels, None, ignore_index, support_logits.shape[-1])
    valid = valid_rows(query_logits, None, query_mask)
    logprob = selective_log_softmax(support_logits, labels, mask=labelled, ignore_index=-1, backend=backend)
    uncertainty = entropy(query_logits, mask=valid, backend=backend)
    first, second, third = weights
    loss = third * batch_mean(uncertainty, valid) - first * batch_mean(logprob, labelled)
    # It is infinite where the prior has no mass.
    return loss if second == 0 else loss + second * marginal_kl(query_logits, log_prior, mask=valid)
