"""What a call is made of: its statistics, its `Call`, and the backend that serves it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from kldiv_kernels import registry
from kldiv_kernels.backends import Call
from kldiv_kernels.backends import select as backend_of
from kldiv_kernels.divergences import Statistic
from kldiv_kernels.inputs.parameters import Parameter, parameters_checked
from kldiv_kernels.inputs.tensors import exclude_checked, labels_checked, logits_checked, mask_checked, shared_columns


def statistics(names: Iterable[str], where: str) -> list[Statistic]:
    if isinstance(names, str):
        raise TypeError(f"{where}: stats is the string {names!r}; expected a sequence of names, such as [{names!r}]")
    found = [registry.get(name, f"{where}: stats") for name in names]
    if not found:
        raise ValueError(f"{where}: stats is empty; expected at least one of {', '.join(registry.STATISTICS)}")
    if len({s.name for s in found}) < len(found):
        raise ValueError(f"{where}: stats names a statistic twice: {[s.name for s in found]}")
    return found


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
    needs_labels = any(s.needs_labels for s in stats)
    if labels is None and needs_labels:
        names = ", ".join(s.name for s in stats if s.needs_labels)
        raise ValueError(f"{where}: labels is None; {names} needs one label a token, shape {list(logits.shape[:-1])}")
    if not any(s.reference for s in stats):
        reference_logits = None
    columns = shared_columns(where, logits, reference_logits, vocab_size)
    leading = logits.shape[:-1]
    parameters, token_parameters = parameters_checked(
        where, logits, leading, stats, temperature, reference_temperature, alpha, beta
    )
    return Call(
        logits,
        reference_logits,
        labels_checked(where, labels, logits, leading, columns, ignore_index) if needs_labels else None,
        mask_checked(where, mask, logits, leading),
        exclude_checked(where, exclude, logits, leading, columns),
        token_parameters,
        parameters,
        tuple(s.name for s in stats),
        columns,
    )


def select(call: Call, backend: str, where: str) -> str:
    return backend_of(call, backend, where)


def operator_arguments(call: Call, backend: str) -> tuple[object, ...]:
    """The leading arguments of the operators in `ops.py`."""
    return (
        call.logits, call.reference, call.labels, call.mask, call.exclude, call.token_parameters,
        list(call.parameters), list(call.stats), call.vocab_size, backend,
    )  # fmt: skip
