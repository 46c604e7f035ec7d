"""Checks and normalises the arguments of the public functions, once, above the backends.

Everything here costs O(tokens): the logits themselves are neither read nor copied. Values on the device (labels,
excluded columns, parameters per token) are checked too, which waits for the device; not where `may_look_at` says no.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from kldiv_kernels import autograd, registry
from kldiv_kernels.backends import Call
from kldiv_kernels.backends import select as backend_of
from kldiv_kernels.divergences import Bound, Statistic

Parameter = float | Tensor
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_POSITIVE = Bound("above 0 and finite", lambda x: (x > 0) & (x * 0 == 0))


def prepare(
    where: str,
    logits: Tensor,
    reference_logits: Tensor | None,
    labels: Tensor | None,
    *,
    stats: Iterable[Statistic],
    temperature: Parameter,
    reference_temperature: Parameter | None,
    alpha: Parameter,
    beta: Parameter,
    mask: Tensor | None,
    ignore_index: int,
    vocab_size: int | None,
    exclude: Tensor | None,
) -> Call:
    """The backend call for these arguments; raises TypeError, ValueError or IndexError naming the argument."""
    stats = tuple(stats)
    logits_checked(where, logits, "logits")
    if reference_logits is None and any(s.reference for s in stats):
        names = ", ".join(s.name for s in stats if s.reference)
        raise ValueError(f"{where}: reference_logits is None; {names} compares two rows and needs them")
    if labels is None and any(s.needs_labels for s in stats):
        names = ", ".join(s.name for s in stats if s.needs_labels)
        raise ValueError(f"{where}: labels is None; {names} needs one label a token, shape {_shape(logits)[:-1]}")
    if not any(s.reference for s in stats):
        reference_logits = None
    columns = shared_columns(where, logits, reference_logits, vocab_size)
    leading = logits.shape[:-1]
    parameters, token_parameters = _parameters(
        where, logits, leading, stats, temperature, reference_temperature, alpha, beta
    )
    return Call(
        logits,
        reference_logits,
        _labels(where, labels, logits, leading, columns, ignore_index) if any(s.needs_labels for s in stats) else None,
        mask_checked(where, mask, logits, leading),
        _exclude(where, exclude, logits, leading, columns),
        token_parameters,
        parameters,
        tuple(s.name for s in stats),
        columns,
    )


def operator_arguments(call: Call, backend: str) -> tuple[object, ...]:
    """The leading arguments of the operators in `ops.py`."""
    return (
        call.logits, call.reference, call.labels, call.mask, call.exclude, call.token_parameters,
        list(call.parameters), list(call.stats), call.vocab_size, backend,
    )  # fmt: skip


def logits_checked(where: str, logits: Tensor, name: str) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{where}: {name} is {type(logits).__name__}; expected a torch.Tensor")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{where}: {name} has dtype {logits.dtype}; expected float32, bfloat16, float16 or float64")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{where}: {name} has shape {_shape(logits)}; expected [*, vocabulary] with vocabulary >= 1")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(
            f"{where}: {name} has stride {logits.stride(-1)} in the vocabulary dimension; expected 1 "
            f"(a transposed view needs .contiguous())"
        )
    autograd.no_tangent(where, name, logits)


def mask_checked(where: str, mask: Tensor | None, logits: Tensor, leading: torch.Size) -> Tensor | None:
    if mask is None:
        return None
    _per_token(where, "mask", mask, logits, leading)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{where}: mask has dtype {mask.dtype}; expected bool or integers (0 leaves a token out)")
    return (mask != 0).reshape(-1)


def valid_tokens(call_mask: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The mask of a loss: labels equal to `ignore_index` leave their tokens out too."""
    if labels is None:
        return call_mask
    kept = (labels != ignore_index).reshape(-1)
    return kept if call_mask is None else kept & call_mask


def label_mask_checked(where: str, labels: Tensor | None, logits: Tensor) -> None:
    if labels is not None:
        _integers(where, "labels", labels)
        _per_token(where, "labels", labels, logits, logits.shape[:-1])


def weight_checked(where: str, weight: Tensor | None, logits: Tensor) -> None:
    if weight is not None:
        _per_token(where, "weight", weight, logits, logits.shape[:-1])


def normalizer_checked(where: str, normalizer: float | Tensor | None) -> None:
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"{where}: normalizer has shape {list(normalizer.shape)}; expected a number or one element"
            )
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"{where}: normalizer is {normalizer}; expected a number above 0")


def per_token_checked(where: str, name: str, tensor: Tensor | None, logits: Tensor, *, integers: bool = False) -> None:
    """One number a token under any name."""
    if tensor is not None:
        if integers:
            _integers(where, name, tensor)
        _per_token(where, name, tensor, logits, logits.shape[:-1])


def statistics(names: Iterable[str], where: str) -> list[Statistic]:
    if isinstance(names, str):
        raise TypeError(f"{where}: stats is the string {names!r}; expected a sequence of names, such as [{names!r}]")
    found = [registry.get(name, f"{where}: stats") for name in names]
    if not found:
        raise ValueError(f"{where}: stats is empty; expected at least one of {', '.join(registry.STATISTICS)}")
    if len({s.name for s in found}) < len(found):
        raise ValueError(f"{where}: stats names a statistic twice: {[s.name for s in found]}")
    return found


def select(call: Call, backend: str, where: str) -> str:
    return backend_of(call, backend, where)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def shared_columns(where: str, logits: Tensor, reference: Tensor | None, vocab_size: int | None) -> int:
    """The number of columns that are no padding, in both."""
    columns = logits.shape[-1] if vocab_size is None else vocab_size
    if not isinstance(columns, (int, torch.SymInt)) or not 1 <= columns <= logits.shape[-1]:
        raise ValueError(f"{where}: vocab_size is {vocab_size}; expected 1 to {logits.shape[-1]}, the width of logits")
    if reference is None:
        return columns
    logits_checked(where, reference, "reference_logits")
    _same_device(where, "reference_logits", reference, logits)
    expected = [*logits.shape[:-1], logits.shape[-1]]
    if reference.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"{where}: reference_logits has shape {_shape(reference)}; expected {expected} like logits")
    if vocab_size is None and reference.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"{where}: reference_logits has shape {_shape(reference)}; expected {expected} like logits "
            f"(pass vocab_size= to ignore padding columns)"
        )
    if columns > reference.shape[-1]:
        raise ValueError(
            f"{where}: vocab_size is {columns}; expected at most {reference.shape[-1]}, the width of reference_logits"
        )
    return columns


def _same_device(where: str, name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{where}: {name} is on {tensor.device}; expected {logits.device} like logits")


def _per_token(where: str, name: str, tensor: Tensor, logits: Tensor, leading: torch.Size) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    _same_device(where, name, tensor, logits)
    if tensor.shape != leading:
        raise ValueError(f"{where}: {name} has shape {_shape(tensor)}; expected {list(leading)}, one value a token")


def _integers(where: str, name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is {type(tensor).__name__}; expected a torch.Tensor")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{where}: {name} has dtype {tensor.dtype}; expected int64 or int32")


def _labels(
    where: str, labels: Tensor | None, logits: Tensor, leading: torch.Size, columns: int, ignore_index: int
) -> Tensor | None:
    """[N, K] int64 with -1 where the label is ignored."""
    if labels is None:
        return None
    _integers(where, "labels", labels)
    _same_device(where, "labels", labels, logits)
    if labels.shape != leading and labels.shape[:-1] != leading:
        raise ValueError(
            f"{where}: labels has shape {_shape(labels)}; expected {list(leading)}, or {[*leading, 'K']} for K a token"
        )
    per_row = 1 if labels.shape == leading else labels.shape[-1]
    if per_row > columns:
        raise ValueError(f"{where}: labels has K = {per_row} a token; expected at most {columns}, the vocabulary size")
    table = labels.reshape(-1, per_row).to(torch.int64)
    ignored = table == ignore_index
    _in_range(where, "labels", table, ignored, 0, columns, labels.shape, f"or ignore_index = {ignore_index}")
    return torch.where(ignored, -1, table).contiguous()


def _exclude(where: str, exclude: Tensor | None, logits: Tensor, leading: torch.Size, columns: int) -> Tensor | None:
    if exclude is None:
        return None
    _integers(where, "exclude", exclude)
    _per_token(where, "exclude", exclude, logits, leading)
    table = exclude.reshape(-1).to(torch.int64)
    _in_range(where, "exclude", table, table == -1, 0, columns, exclude.shape, "or -1 for none")
    return table


def may_look_at(tensor: Tensor) -> bool:
    """Whether values may decide what happens: not where a call is traced, transformed by torch.func or captured in a
    CUDA graph, and of no tensor that has none."""
    if torch.compiler.is_compiling() or autograd.transformed():
        return False
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta" or get_proxy_mode() is not None:
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _in_range(
    where: str, name: str, table: Tensor, allowed: Tensor, low: int, high: int, shape: torch.Size, also: str
) -> None:
    if not may_look_at(table):
        return
    wrong = ~allowed & ((table < low) | (table >= high))
    if bool(wrong.any()):
        first = int(wrong.reshape(-1).nonzero()[0, 0])
        position = [int(i) for i in torch.unravel_index(torch.tensor(first), shape)] if shape else []
        raise IndexError(
            f"{where}: {name}{position} is {int(table.reshape(-1)[first])}; expected {low} to {high - 1} {also}"
        )


def _parameters(
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
        _per_token(where, name, value, logits, leading)
        if value.requires_grad:
            raise ValueError(f"{where}: {name} requires grad; gradients flow to the logits only, pass {name}.detach()")
        autograd.no_tangent(where, name, value)
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{where}: {name} is {type(value).__name__}; expected a float or a tensor {list(leading)}")


def _bounded(where: str, name: str, value: Parameter, bound: Bound, purpose: str) -> None:
    if isinstance(value, Tensor):
        if not may_look_at(value):
            return
        outside = value[~torch.as_tensor(bound.allows(value))].reshape(-1)
        wrong = outside[0].item() if outside.numel() else None
    else:
        wrong = None if bound.allows(value) else value
    if wrong is not None:
        raise ValueError(f"{where}: {name} is {wrong}; expected {bound.text}{purpose}")


def _bounded_sum(where: str, alpha: Parameter, beta: Parameter) -> None:
    _bounded(where, "alpha + beta", alpha + beta, Bound("not 0 (a pole)", lambda x: x != 0), " for alpha_beta")
