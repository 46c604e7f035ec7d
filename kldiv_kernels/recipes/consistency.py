"""Classifiers that are to say the same of two views of an image.

All logits are trained, also those that another one is compared with, unless a function says otherwise. Rows are [B].
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels.choices import Backend
from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.recipes.batch_coupling import marginal_kl
from kldiv_kernels.recipes.checks import of_tokens_checked
from kldiv_kernels.recipes.recipe import Recipe
from kldiv_kernels.recipes.reductions import (
    batch_mean,
    masked,
    over_rows,
    tempered_softmax,
    valid_labels,
    valid_rows,
    widened,
)
from kldiv_kernels.stats import selective_log_softmax, token_stats

PAPERS = (
    Recipe(
        80, "Semixup",
        "Semixup: In- and Out-of-Manifold Regularization for Deep Semi-Supervised Knee Osteoarthritis Severity "
        "Grading from Plain Radiographs",
        2020, ("semixup_loss", "softmax_mse"), "torch", "code", link="github.com/Oulu-IMEDS/semixup",
        differs="The weights are those of the code's training script; its class has 2, 2, 4. The cross-entropies of "
        "labelled and of mixed images are the caller's. distance='kl' is four reads, and four for the gradient.",
    ),
    Recipe(
        87, "LegoGCD", "Solving the Catastrophic Forgetting Problem in Generalized Category Discovery", 2025,
        ("legogcd_loss", "local_entropy", "mutual_kl", "mean_entropy_maximisation"), "torch", "code",
        link="github.com/Cliffia123/LegoGCD",
        differs="The code's KL of two views takes log-softmax of probabilities (double_softmax=True); the paper's is "
        "between the softmaxes. The contrastive losses of SimGCD beside it, and the moving average of the classes' "
        "frequencies, are the caller's.",
    ),
)  # fmt: skip


def softmax_mse(
    logits: Tensor,
    other_logits: Tensor,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Σ_k (q_k − p_k)²/K of two softmaxes, the mean over the rows, with both gradients; paper 80 (Semixup), its code.

    Args: logits, other_logits: [*, K]. reduction: "mean" over the rows, or over `normalizer`; "sum"; "none": [*].
    mask: [*]. Makes tensors of [N, K] in PyTorch.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.softmax_mse(s, t).item(), 4)
    0.0713
    """
    of_tokens_checked(logits, other_logits=other_logits)
    valid = valid_rows(logits, None, mask)
    q, p = (masked(widened(x), valid[..., None]).softmax(-1) for x in (logits, other_logits))
    return over_rows("softmax_mse", (q - p).square().mean(-1), valid, reduction, normalizer)


def semixup_loss(
    original: Tensor,
    augmented: Tensor,
    mixed: Tensor,
    interpolated: Tensor,
    *,
    weights: tuple[float, float, float] = (2.0, 4.0, 2.0),
    distance: Literal["mse", "kl"] = "mse",
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""c₁D(z', z) + c₂D(z_mix, z_int) + c₃[D(z, z_mix) + D(z_mix, z')], for images without label; paper 80 (Semixup).

    z are the logits of an image, z' of another view of it, z_mix of it mixed with a second image, z_int the mixed
    logits of both. D(a, b) is `softmax_mse`, or KL(softmax b ‖ softmax a)/K. Source: the code.

    Args: original, augmented, mixed, interpolated: [B, K]. weights: c₁, c₂, c₃. mask: [B]; normalizer: what the sum is
    divided by, default the number of rows. backend: of distance "kl", see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.semixup_loss(s, t, s, s).item(), 4)
    0.2854
    """
    if distance not in ("mse", "kl"):
        raise ValueError(f"semixup_loss: distance is {distance!r}; expected mse or kl")
    of_tokens_checked(original, augmented=augmented, mixed=mixed, interpolated=interpolated)
    valid = valid_rows(original, None, mask)

    def apart(first: Tensor, second: Tensor) -> Tensor:
        if distance == "mse":
            return softmax_mse(first, second, mask=valid, normalizer=normalizer)
        kl = token_stats(first, second, stats=("forward_kl",), mask=valid, backend=backend).forward_kl
        return over_rows("semixup_loss", kl, valid, "mean", normalizer) / first.shape[-1]

    views, mixing, both = weights
    return (
        views * apart(augmented, original)
        + mixing * apart(mixed, interpolated)
        + both * (apart(original, mixed) + apart(mixed, augmented))
    )


def mutual_kl(
    logits: Tensor,
    other_logits: Tensor,
    *,
    temperature: float = 0.1,
    double_softmax: bool = False,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""KL(q₁‖q₂) of two views at temperature τ, the mean over the rows, with both gradients; paper 87 (LegoGCD).

    Args: logits, other_logits: [*, C]. temperature: τ. double_softmax: True: Σ q₁(log-softmax(q₁) − log-softmax(q₂)),
    as in the code, in PyTorch. mask, normalizer: see `softmax_mse`. backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, t = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> round(kk.recipes.mutual_kl(s, t, temperature=1.0).item(), 4)
    0.3671
    """
    if not double_softmax:
        return divergence_loss(
            logits, other_logits, "reverse_kl", temperature=temperature, mask=mask, normalizer=normalizer,
            backend=backend,
        )  # fmt: skip
    of_tokens_checked(logits, other_logits=other_logits)
    valid = valid_rows(logits, None, mask)
    rows = (masked(widened(x), valid[..., None]) for x in (logits, other_logits))
    q, other = (tempered_softmax(x, temperature) for x in rows)
    values = (q * (q.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    return over_rows("mutual_kl", values, valid, "mean", normalizer)


def mean_entropy_maximisation(
    logits: Tensor, *, temperature: float = 0.1, coef: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    r"""coef·(log C − H(m)), m the mean of all rows' softmaxes at τ, so that all classes are used; paper 87 (LegoGCD).

    Args: logits: [*, C]. temperature: τ. mask: [*]. Makes tensors of [N, C] in PyTorch.

    >>> import torch, kldiv_kernels as kk
    >>> kk.recipes.mean_entropy_maximisation(torch.tensor([[9.0, 0.0], [0.0, 9.0]])).abs() < 1e-6
    tensor(True)
    """
    classes = logits.shape[-1]
    uniform = torch.full((classes,), -math.log(max(classes, 1)), dtype=widened(logits).dtype, device=logits.device)
    return coef * marginal_kl(logits, uniform, temperature=temperature, mask=mask)


def local_entropy(
    logits: Tensor,
    log_frequencies: Tensor,
    *,
    temperature: float = 0.05,
    margin: float = 0.4,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""−Σ_k q_k·log softmax(z/τ + c·log q̂)_k over the rows chosen, with both gradients; paper 87 (LegoGCD), its LER.

    With uniform q̂ it is the entropy of q = softmax(z/τ). The margin c·log q̂ asks more of the
    logits of rare classes.

    Args:
        logits: [*, C]. log_frequencies: [C], log q̂, the moving average (momentum 0.999) of the mean softmax(z); no
            gradient. temperature: τ. margin: c. mask: [*], the rows chosen; see `legogcd_loss`.
        normalizer: default: the number of all rows, chosen or not, as in the code. backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> s, b = torch.tensor([[2.0, 0.5, -1.0, 0.0]]), torch.tensor([0.5, 0.0, 0.0, -0.5])
    >>> round(kk.recipes.local_entropy(s, b.log_softmax(-1), temperature=0.5).item(), 4)
    0.2921
    """
    if log_frequencies.shape != logits.shape[-1:]:
        raise ValueError(
            f"local_entropy: log_frequencies has shape {list(log_frequencies.shape)}; expected [{logits.shape[-1]}], "
            "one a class"
        )
    valid = valid_rows(logits, None, mask)
    # log_softmax first: a number common to a row would round the sum.
    own = masked(widened(logits), valid[..., None]).log_softmax(-1)
    lowered = own + temperature * margin * log_frequencies.detach() if margin != 0 else own
    values = token_stats(
        lowered, own, stats=("cross_entropy",), temperature=temperature, mask=valid, backend=backend
    ).cross_entropy
    count = max(valid.numel(), 1) if normalizer is None else normalizer
    return over_rows("local_entropy", values, valid, "mean", count)


def legogcd_loss(
    logits: Tensor,
    other_logits: Tensor,
    labels: Tensor,
    log_frequencies: Tensor,
    *,
    known_classes: int,
    teacher_temperature: float,
    temperature: float = 0.1,
    supervised_weight: float = 0.35,
    entropy_coef: float = 2.0,
    local_coef: float = 2.0,
    threshold: float = 0.7,
    local_temperature: float = 0.05,
    margin: float = 0.4,
    double_softmax: bool = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    r"""(1 − w)·[cluster + `mean_entropy_maximisation` + `mutual_kl`] + w·CE + 2·`local_entropy`; paper 87 (LegoGCD).

    cluster: the mean over both directions of the cross-entropy of a view at τ to the other view at the teacher's
    temperature, without that one's gradient. CE: of the labels at τ, over both views. `local_entropy` is that of rows
    without label whose softmax at τ has its maximum, at least `threshold`, at a known class.

    Args:
        logits, other_logits: [B, C], of two views. labels: [B]; `ignore_index` where there is none. log_frequencies:
            [C], see `local_entropy`. known_classes: how many classes, the first ones, have labels.
        teacher_temperature: 0.07 to 0.04 over the first 30 epochs. temperature: τ. supervised_weight: w.
            entropy_coef: of `mean_entropy_maximisation`. threshold: 0.85 for CIFAR-100. local_coef, local_temperature,
            margin: of `local_entropy`. double_softmax: see `mutual_kl`. backend: see `kk.token_stats`.

    >>> import torch, kldiv_kernels as kk
    >>> views, labels = torch.tensor([[0.1, 0.0], [0.0, 0.1]]), torch.tensor([0, -100])
    >>> loss = kk.recipes.legogcd_loss(
    ...     views, views, labels, torch.zeros(2), known_classes=1, teacher_temperature=0.04)
    >>> round(loss.item(), 4)
    0.3626
    """
    of_tokens_checked(logits, other_logits=other_logits)
    if not 0 < known_classes <= logits.shape[-1]:
        raise ValueError(f"legogcd_loss: known_classes is {known_classes}; expected 1 to {logits.shape[-1]}")
    target, labelled = valid_labels(labels, None, ignore_index, logits.shape[-1])
    both, other = torch.cat([logits, other_logits]), torch.cat([other_logits, logits])
    target, labelled = torch.cat([target, target]), torch.cat([labelled, labelled])
    shared: dict[str, Any] = {"temperature": temperature, "backend": backend}
    cluster = divergence_loss(
        both, other.detach(), "cross_entropy", reference_temperature=teacher_temperature, **shared
    )
    spread = mean_entropy_maximisation(both, temperature=temperature, coef=entropy_coef)
    mutual = mutual_kl(logits, other_logits, double_softmax=double_softmax, **shared)
    logprob = selective_log_softmax(both, target, mask=labelled, ignore_index=-1, **shared)
    sure = token_stats(both.detach(), stats=("max_logprob", "argmax"), **shared)
    chosen = ~labelled & (sure.max_logprob.exp() >= threshold) & (sure.argmax < known_classes)
    unsupervised = cluster + spread + mutual
    supervised = -batch_mean(logprob, labelled)
    loss = (1 - supervised_weight) * unsupervised + supervised_weight * supervised
    # It is infinite where the model gives mass to a class of frequency 0.
    if local_coef == 0:
        return loss
    return loss + local_coef * local_entropy(
        both, log_frequencies, temperature=local_temperature, margin=margin, mask=chosen, backend=backend
    )
