"""Temperatures, alpha and beta: a number each, or a tensor of one a token."""

from __future__ import annotations

import torch
from torch import Tensor

from kldiv_kernels import autograd, registry
from kldiv_kernels.divergences import Bound, Statistic
from kldiv_kernels.inputs.tensors import looks_at, per_token_checked

Parameter = float | Tensor
_POSITIVE = Bound("above 0 and finite", lambda x: (x > 0) & (x * 0 == 0))


def parameters_checked(
    where: str,
    logits: Tensor,
    leading: torch.Size,
    stats: tuple[Statistic, ...],
    temperature: Parameter,
    reference_temperature: Parameter | None,
    alpha: Parameter,
    beta: Parameter,
) -> tuple[tuple[float, float, float, float], Tensor | None]:
    """The four parameters as floats, and as [4, N] when one of them is given per token."""
    given: dict[str, Parameter] = {
        "temperature": temperature,
        "reference_temperature": temperature if reference_temperature is None else reference_temperature,
        "alpha": alpha,
        "beta": beta,
    }
    for name, value in given.items():
        _parameter_type(where, name, value, logits, leading)
    for name in ("temperature", "reference_temperature"):
        _bounded(where, name, given[name], _POSITIVE, "")
    for statistic in stats:
        _of_statistic(where, statistic, alpha, beta)
    floats = [1.0 if isinstance(value, Tensor) else float(value) for value in given.values()]
    if not any(isinstance(value, Tensor) for value in given.values()):
        return (floats[0], floats[1], floats[2], floats[3]), None
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.numel() // logits.shape[-1]
    table = torch.stack(
        [
            value.to(dtype).reshape(-1)
            if isinstance(value, Tensor)
            else torch.full((rows,), float(value), dtype=dtype, device=logits.device)
            for value in given.values()
        ]
    )
    return (floats[0], floats[1], floats[2], floats[3]), table


def of_a_kind(
    where: str, statistic: Statistic, alpha: Parameter | None, beta: Parameter | None
) -> tuple[Parameter, Parameter]:
    """alpha and beta of a loss, 0.5 where None; raises where one is given that its divergence has no use for."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and getattr(statistic, name) is None:
            given = "given" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{where}: {name} is {given}, which kind {statistic.name!r} has no use for; it is for "
                f"{', '.join(registry.kinds_with(name))}"
            )
    return 0.5 if alpha is None else alpha, 0.5 if beta is None else beta


def alpha_and_beta_checked(where: str, statistic: Statistic, alpha: Parameter, beta: Parameter, logits: Tensor) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        _parameter_type(where, name, value, logits, logits.shape[:-1])
    _of_statistic(where, statistic, alpha, beta)


def _of_statistic(where: str, statistic: Statistic, alpha: Parameter, beta: Parameter) -> None:
    for name, value, bound in (("alpha", alpha, statistic.alpha), ("beta", beta, statistic.beta)):
        if bound is not None:
            _bounded(where, name, value, bound, f" for {statistic.name}")
    if statistic.name == "alpha_beta":
        _bounded_sum(where, alpha, beta)


def _parameter_type(where: str, name: str, value: Parameter, logits: Tensor, leading: torch.Size) -> None:
    if isinstance(value, Tensor):
        per_token_checked(where, name, value, logits)
        if value.requires_grad:
            raise ValueError(f"{where}: {name} requires grad; gradients flow to the logits only, pass {name}.detach()")
        autograd.no_tangent(where, name, value)
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; expected a float or a tensor {list(leading)}")


def _bounded(where: str, name: str, value: Parameter, bound: Bound, purpose: str) -> None:
    if isinstance(value, Tensor):
        if not looks_at(value):
            return
        outside = value[~torch.as_tensor(bound.allows(value))].reshape(-1)
        wrong = outside[0].item() if outside.numel() else None
    else:
        wrong = None if bound.allows(value) else value
    if wrong is not None:
        raise ValueError(f"{where}: {name} is {wrong}; expected {bound.text}{purpose}")


def _bounded_sum(where: str, alpha: Parameter, beta: Parameter) -> None:
    _bounded(where, "alpha + beta", alpha + beta, Bound("not 0 (a pole)", lambda x: x != 0), " for alpha_beta")
