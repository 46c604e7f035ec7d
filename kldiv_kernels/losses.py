"""Reduced divergence losses: loss and dlogits from one read of each logit."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kldiv_kernels import inputs, registry
from kldiv_kernels.choices import Backend, DivergenceKind, Reduction
from kldiv_kernels.dtensors import on_dtensors
from kldiv_kernels.inputs import Parameter
from kldiv_kernels.parallel import Group, logits_or_shared, together
from kldiv_kernels.sources import Source

if TYPE_CHECKING:
    from kldiv_kernels.signatures import Divergence, DivergenceOfAlpha, DivergenceOfAlphaBeta, DivergenceOfBeta


@on_dtensors
@together
def divergence_loss(
    logits: Tensor,
    reference_logits: Tensor,
    kind: DivergenceKind | str = "forward_kl",
    *,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: Reduction = "mean",
    temperature: Parameter = 1.0,
    reference_temperature: Parameter | None = None,
    temperature_squared: bool = False,
    alpha: Parameter | None = None,
    beta: Parameter | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    vocab_size: int | None = None,
    exclude: Tensor | None = None,
    in_place: bool = False,
    group: Group | None = None,
    vocab_start: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    r"""A divergence between q = softmax(logits/τ) (student) and p = softmax(reference_logits/τ') (teacher).

    When a gradient is needed and `reduction` is "mean" or "sum", loss and gradient come out of the same pass over
    the logits; backward then costs nothing for an upstream gradient of 1, and one multiplication of the gradient
    otherwise. The gradient of float16 logits waits for backward, which reads them again: a loss scale comes in there,
    and without it most of the gradient would round to 0.

    Args:
        logits, reference_logits: [*, V]; see `token_stats`. The reference gets a gradient when it requires one.
        kind: a divergence of the registry: forward_kl, reverse_kl, jeffreys, js, skew_kl, hellinger, tvd, …
        weight: [*], multiplies each token's divergence. May require grad (then the two-pass form is used).
        labels: [*]; tokens whose label equals `ignore_index` are left out. A causal model's logits at t predict token
            t + 1: give its own labels with `shift=True`, or labels[:, 1:] with logits[:, :-1].
        mask: [*] bool or integers; tokens where it is 0 are left out.
        shift: False (default): the row at t has the labels, mask, weight and exclude that stand at t. True: those that
            stand at t + 1, the token that a causal model's logits predict there; the last row is left out. Logits are
            then [..., tokens, V] of whole sequences. They are not copied, as slices of them are not.
        normalizer: what "mean" divides by; default: the number of valid tokens. Give the number over all ranks and
            accumulation steps when training with either.
        reduction: "mean" = Σ weight·D over valid tokens / normalizer; "sum"; "none" = weight·D per token, [*].
        temperature_squared: multiply by temperature² (Hinton et al. 2015), so that gradients keep their size.
        alpha, beta: parameters of the kinds that have them, float or [*]; default 0.5. An error for other kinds.
        in_place: True: the gradient of the logits is written over them, and no memory is taken for it. Only for logits
            that nobody needs afterwards, such as a head's output: they hold their gradient then. Autograd refuses a
            backward pass of who kept them before. An error where the gradient waits for backward (reduction "none", a
            weight with gradient, float16), for a leaf or an expanded view, and under torch.compile. Default False.
        group, vocab_start: see `token_stats`. The gradient then waits for backward.
        temperature, reference_temperature, vocab_size, exclude, backend: see `token_stats`.

    Returns:
        float32 scalar ([*] for "none"), in nats; 0 with zero gradient when no token is valid.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what is allowed. RuntimeError from a double
        backward.

    >>> import torch, kldiv_kernels as kk
    >>> student = torch.tensor([[2.0, 0.5, -1.0, 0.0]], requires_grad=True)
    >>> teacher = torch.tensor([[1.0, 1.5, -0.5, 0.0]])
    >>> loss = kk.divergence_loss(student, teacher, "js", beta=0.9)
    >>> loss.backward()
    >>> round(loss.item(), 6), [round(x, 4) for x in student.grad[0].tolist()]
    (0.032876, [0.0295, -0.022, -0.0032, -0.0043])
    """
    where = "divergence_loss"
    source = logits_or_shared(
        where, logits, reference_logits, group, vocab_start, vocab_size, in_place_checked(where, in_place)
    )
    return divergence_of(
        where, source, kind,
        weight=weight, labels=labels, mask=mask, normalizer=normalizer, reduction=reduction, temperature=temperature,
        reference_temperature=reference_temperature, temperature_squared=temperature_squared, alpha=alpha, beta=beta,
        ignore_index=ignore_index, shift=shift, vocab_size=vocab_size, exclude=exclude, backend=backend,
    )  # fmt: skip


def divergence_of(
    where: str,
    source: Source,
    kind: str,
    *,
    weight: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    reduction: Reduction,
    temperature: Parameter,
    reference_temperature: Parameter | None,
    temperature_squared: bool,
    alpha: Parameter | None,
    beta: Parameter | None,
    ignore_index: int,
    shift: bool,
    vocab_size: int | None,
    exclude: Tensor | None,
    backend: str,
) -> Tensor:
    """`divergence_loss` of logits wherever they come from."""
    statistic = registry.get(kind, f"{where}: kind", registry.divergence_names())
    alpha, beta = inputs.of_a_kind(where, statistic, alpha, beta)
    reduction_checked(where, reduction)
    logits = source.logits
    inputs.logits_checked(where, logits, "logits")
    labels, mask, weight, exclude = inputs.shifted(
        where, shift, logits, labels, mask, ignore_index, weight=(weight, 0), exclude=(exclude, -1)
    )
    inputs.label_mask_checked(where, labels, logits)
    inputs.weight_checked(where, weight, logits)
    leading = logits.shape[:-1]
    mask = inputs.mask_checked(where, mask, logits, leading)
    mask = inputs.valid_tokens(mask, labels, ignore_index)
    call = inputs.prepare(
        where, logits, source.reference, None,
        stats=(statistic,), temperature=temperature, reference_temperature=reference_temperature,
        alpha=alpha, beta=beta, mask=None if mask is None else mask.reshape(leading),
        ignore_index=ignore_index, vocab_size=vocab_size, exclude=exclude,
    )  # fmt: skip
    chosen = inputs.select(call, backend, where)
    scale = token_scale(
        where, logits, weight, call.mask, normalizer, reduction, temperature if temperature_squared else None
    )  # fmt: skip
    if source.known_beforehand(where, gradient_waits(reduction, scale), call, chosen):
        return source.loss(call, chosen, scale[None])[0]
    return reduced(source.statistics(call, chosen)[0], scale, reduction, leading)


def gradient_waits(reduction: str, scale: Tensor) -> str | None:
    """Why the gradient of a loss is not known when its value is, or None."""
    if reduction == "none":
        return "reduction is 'none', whose gradient waits for what becomes of the loss"
    return "weight requires grad, which needs the logits once more" if scale.requires_grad else None


def in_place_checked(where: str, in_place: bool) -> bool:
    if not isinstance(in_place, bool):
        raise TypeError(f"{where}: in_place is {in_place!r}; expected True or False")
    return in_place


def reduction_checked(where: str, reduction: Reduction) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{where}: reduction is {reduction!r}; expected mean, sum or none")


def token_scale(
    where: str,
    logits: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    normalizer: float | Tensor | None,
    reduction: Reduction,
    temperature: Parameter | None,
) -> Tensor:
    """What each token's divergence counts in a loss, [N]; `mask` [N], a temperature where it enters squared."""
    # Not shape.numel(), which torch.export makes a constant.
    rows = logits.numel() // logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if weight is None:
        scale = torch.ones(rows, dtype=dtype, device=logits.device)
    else:
        # A copy, which autograd keeps where it would not take a weight of torch.inference_mode.
        scale = weight.reshape(-1).to(dtype, copy=True)
    if temperature is not None:
        scale = scale * (temperature.reshape(-1).to(dtype) if isinstance(temperature, Tensor) else temperature) ** 2
    if reduction == "mean":
        scale = scale / _normalizer(where, normalizer, mask, rows)
    return scale if mask is None else torch.where(mask, scale, torch.zeros_like(scale))


def reduced(values: Tensor, scale: Tensor, reduction: Reduction, leading: torch.Size) -> Tensor:
    """The loss of divergences [N]; a token that counts 0 takes no part, whatever its value is."""
    terms = torch.where(scale == 0, torch.zeros_like(scale), scale * values)
    return terms.reshape(leading) if reduction == "none" else terms.sum()


def _normalizer(where: str, normalizer: float | Tensor | None, mask: Tensor | None, rows: int) -> float | Tensor:
    if normalizer is None:
        return max(rows, 1) if mask is None else mask.sum().clamp_min(1)
    inputs.normalizer_checked(where, normalizer)
    return normalizer.reshape(()) if isinstance(normalizer, Tensor) else normalizer


def _named(kind: str, name: str) -> Any:
    """`divergence_loss` of a kind, with its signature less the kind and the parameters that the kind has no use for."""
    statistic = registry.STATISTICS[kind]
    general = inspect.signature(divergence_loss)
    without = ["kind", *(name for name in ("alpha", "beta") if getattr(statistic, name) is None)]

    def loss(logits: Tensor, reference_logits: Tensor, **options: Any) -> Tensor:
        return divergence_loss(logits, reference_logits, kind, **options)

    loss.__name__ = loss.__qualname__ = name
    loss.__signature__ = general.replace(  # type: ignore[attr-defined]
        parameters=[parameter for parameter in general.parameters.values() if parameter.name not in without]
    )
    loss.__doc__ = (
        f"{statistic.formula}: `divergence_loss(logits, reference_logits, {kind!r}, ...)`, with its keyword arguments."
        f"\n\n>>> import torch, kldiv_kernels as kk\n"
        f">>> same = torch.zeros(2, 5)\n"
        f">>> kk.{name}(same, same).abs().item() < {'2' if kind == 'cross_entropy' else '1e-6'}\nTrue\n"
    )
    return loss


forward_kl: Divergence = _named("forward_kl", "forward_kl")
reverse_kl: Divergence = _named("reverse_kl", "reverse_kl")
jeffreys: Divergence = _named("jeffreys", "jeffreys")
js_divergence: DivergenceOfBeta = _named("js", "js_divergence")
skew_kl: DivergenceOfAlpha = _named("skew_kl", "skew_kl")
skew_reverse_kl: DivergenceOfAlpha = _named("skew_reverse_kl", "skew_reverse_kl")
hellinger: Divergence = _named("hellinger", "hellinger")
tvd: Divergence = _named("tvd", "tvd")
forward_chi2: Divergence = _named("forward_chi2", "forward_chi2")
reverse_chi2: Divergence = _named("reverse_chi2", "reverse_chi2")
renyi: DivergenceOfAlpha = _named("renyi", "renyi")
alpha_divergence: DivergenceOfAlpha = _named("alpha", "alpha_divergence")
alpha_beta_divergence: DivergenceOfAlphaBeta = _named("alpha_beta", "alpha_beta_divergence")
triangular: Divergence = _named("triangular", "triangular")
cauchy_schwarz: Divergence = _named("cauchy_schwarz", "cauchy_schwarz")
soft_cross_entropy: Divergence = _named("cross_entropy", "soft_cross_entropy")
