"""What the modules of `nn.py` have in common: options checked at construction, and their place in signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from kldiv_kernels import inputs, registry
from kldiv_kernels.backends import names as backend_names
from kldiv_kernels.keywords import F, keywords, nearest, written_out
from kldiv_kernels.losses import reduction_checked
from kldiv_kernels.policy import OPTION_NAMES, Groups, PolicyLoss, groups_checked, resolve

_REFERENCE = ("reference_hidden", "reference_head", "reference_logits")
PER_CALL = ("weight", "labels", "mask", "normalizer", "exclude", "tail_logprob", *_REFERENCE, "reference_projection")
POLICY_PER_CALL = (
    "old_logprobs", "reference_logprobs", *_REFERENCE, "sampling_logprobs", "anchor_logprobs", "token_weights",
    "kl_weights", "mask", "normalizer", "cu_seqlens", "sequence_ids",
)  # fmt: skip


def explicit(
    of: Callable[..., Any], *, without: Iterable[str] = (), only: Iterable[str] | None = None
) -> Callable[[F], F]:
    """`**options` of a method is written out as the keywords of a function."""
    more = {name: p for name, p in keywords(of, without).items() if only is None or name in only}
    return lambda method: written_out(method, more)


def _known(where: str, options: Mapping[str, Any], function: Callable[..., Any], per_call: tuple[str, ...]) -> None:
    allowed = keywords(function, per_call)
    batch = [name for name in options if name in per_call]
    if batch:
        raise TypeError(f"{where}: {', '.join(batch)} belongs to a batch; give it to forward()")
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{where}: {name} is no option of {function.__name__}{nearest(name, allowed)} "
                f"(options: {', '.join(allowed)})"
            )


def _checked_values(where: str, statistic: Any, options: Mapping[str, Any]) -> None:
    """What the loss would say of these at its first call. A parameter per token has the shape of a batch: then."""
    alpha, beta = inputs.of_a_kind(where, statistic, options.get("alpha"), options.get("beta"))
    reduction_checked(where, options.get("reduction", "mean"))
    given: dict[str, Any] = {"alpha": alpha, "beta": beta}
    given |= {name: options[name] for name in ("temperature", "reference_temperature") if name in options}
    ordinary: dict[str, Any] = {"temperature": 1.0, "reference_temperature": None, "alpha": 0.5, "beta": 0.5}
    numbers = {**ordinary, **{name: value for name, value in given.items() if not isinstance(value, Tensor)}}
    row = torch.zeros(1, 2)
    inputs.prepare(
        where, row, row, None, stats=(statistic,), mask=None, ignore_index=-100, vocab_size=None, exclude=None,
        **numbers,
    )  # fmt: skip
    vocab_size, backend = options.get("vocab_size"), options.get("backend", "auto")
    if vocab_size is not None and (not isinstance(vocab_size, int) or vocab_size < 1):
        raise ValueError(f"{where}: vocab_size is {vocab_size!r}; expected None or 1 and more")
    if backend not in ("auto", *backend_names()):
        raise ValueError(f"{where}: backend is {backend!r}; expected auto or one of {', '.join(backend_names())}")


def _written(options: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in options.items()]


class LossOfAKind(Module):
    """A kind and options; what belongs to a batch is given to `forward`."""

    _function: Callable[..., Tensor]

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        where = type(self).__name__
        statistic = registry.get(kind, f"{where}: kind", registry.divergence_names())
        _known(where, options, type(self)._function, PER_CALL)
        _checked_values(where, statistic, options)
        self.kind = kind
        self.options = dict(options)

    def extra_repr(self) -> str:
        return ", ".join([repr(self.kind), *_written(self.options)])


class PolicyLossOfOptions(Module):
    """Options; what belongs to a batch is given to `forward`."""

    _function: Callable[..., PolicyLoss]

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        where = type(self).__name__
        _known(where, options, type(self)._function, POLICY_PER_CALL)
        resolved = resolve(where, options.get("preset"), {name: options.get(name) for name in OPTION_NAMES})
        groups_checked(where, Groups(options.get("sequence_group"), options.get("batch_group")), resolved)
        shared = ("temperature", "vocab_size", "backend")
        _checked_values(
            where, registry.STATISTICS["forward_kl"], {n: x for n, x in options.items() if n in shared}
        )  # fmt: skip
        self.options = dict(options)

    def extra_repr(self) -> str:
        return ", ".join(_written(self.options))
