"""Kernels for a set of statistics: the functions of `hooks.py` written out for it, and the kernels bound to them.

Binding makes copies of the functions that use a hook, directly or through others, whose globals hold the hooks of this
set. Every name that a bound function uses is a global that holds a function of that very name, which is what
torch.compile needs to print the kernels into the code that it generates.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from kldiv_kernels import registry
from kldiv_kernels.backends.triton.device import (
    kernels,
    label_kernels,
    labels,
    row,
    rows,
    shard_kernels,
    slices,
    state,
    untempered,
)
from kldiv_kernels.backends.triton.formulas import distances, kl, math, mixtures, powers, quadratic, table
from kldiv_kernels.backends.triton.formulas.statistic import TritonStatistic, of_user
from kldiv_kernels.backends.triton.hook_text import Hooks
from kldiv_kernels.divergences import Statistic


@dataclass(frozen=True, eq=False)
class Bound:
    """The kernels of a set of statistics, and what the launcher must know of it."""

    sweep_kernel: Any
    sums_kernel: Any
    finish_kernel: Any
    gradient_kernel: Any
    loss_kernel: Any
    mark_kernel: Any
    label_gradient_kernel: Any
    merge_states_kernel: Any
    merge_sums_kernel: Any
    first: int
    sums: int
    state_rows: int
    label_s: bool
    label_t: bool

    @property
    def tail(self) -> bool:
        """Whether the columns that are no label are summed up."""
        return bool(self.first & state.TAIL.value)

    @property
    def untempered(self) -> bool:
        """Whether the student has a softmax at temperature 1 as well."""
        return bool(self.first & state.UNTEMPERED.value)

    @property
    def part_size(self) -> int:
        """Numbers that the first sweep leaves of a slice."""
        return int(state.STATE_SIZE.value) + 2 * self.untempered


def bound_for(stats: tuple[str, ...], nvidia: bool) -> Bound:
    """The kernels for the statistics of these names, in this order."""
    statistics = tuple(registry.STATISTICS[name] for name in stats)
    return bind(statistics, tuple(_functions_of(s) for s in statistics), nvidia)


def _functions_of(statistic: Statistic) -> TritonStatistic:
    return table.TABLE[statistic.name] if statistic.builtin else _of_user(statistic.triton)


@functools.cache
def _of_user(functions: tuple[Any, Any, Any]) -> TritonStatistic:
    return of_user(functions)


@functools.cache
def bind(statistics: tuple[Statistic, ...], functions: tuple[TritonStatistic, ...], nvidia: bool) -> Bound:
    """The kernels for these statistics, computed by these functions."""
    hooks = Hooks(statistics, functions)
    namespace: dict[str, Any] = {"__name__": f"{__name__}.bound", "triton": triton, "tl": tl}
    formulas = (math, kl, mixtures, distances, powers, quadratic)
    for module in (*formulas, rows, state, untempered, row, labels, slices, kernels, label_kernels, shard_kernels):
        namespace.update({name: value for name, value in vars(module).items() if _is_triton(value)})
    namespace["NVIDIA"] = tl.constexpr(nvidia)
    namespace["INFINITY"] = tl.constexpr(_Infinity("inf"))
    if not isinstance(kernels.sweep_kernel, triton.JITFunction):  # the interpreter wants plain numbers
        namespace = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in namespace.items()}
    for name, function in _used(hooks).items():
        namespace[name] = function
    # All functions share the namespace: those of math.py see NVIDIA, and the kernels see the hooks.
    for name, function in list(namespace.items()):
        if _is_jit(function) and function.fn.__module__.startswith(__package__ or ""):
            namespace[name] = _jit_in(function.fn, namespace)
    namespace.update(_compile(hooks.source(), namespace))
    kernel = {name: namespace[name] for name in Bound.__dataclass_fields__ if name.endswith("_kernel")}
    return Bound(
        **kernel,
        first=_first_sweep(statistics, functions),
        sums=hooks.sums,
        state_rows=4 + 4 * ("tail_logprob" in hooks.names) + 2 * ("untempered_logprob" in hooks.names) + hooks.saved,
        label_s="logprob" in hooks.names,
        label_t="reference_logprob" in hooks.names,
    )


def _first_sweep(statistics: tuple[Statistic, ...], functions: tuple[TritonStatistic, ...]) -> int:
    """The bits of what these statistics take of it."""
    first = functools.reduce(int.__or__, (f.takes for f in functions), 0)
    without_labels = {"logprob", "tail_logprob", "logsumexp"}
    if first & state.TAIL.value and any(s.name not in without_labels for s in statistics):
        first |= state.BOTH.value
    return first


class _Infinity(float):
    """Inductor prints constants by their repr, and has no name `inf`."""

    def __repr__(self) -> str:
        return 'float("inf")'


def _is_jit(value: Any) -> bool:
    return callable(value) and hasattr(value, "fn") and hasattr(value, "arg_names")


def _is_triton(value: Any) -> bool:
    return _is_jit(value) or isinstance(value, tl.constexpr)


def _jit_in(function: Callable[..., Any], namespace: dict[str, Any]) -> Any:
    """The same function with other globals."""
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__annotations__ = function.__annotations__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return unspecialised(copy) if function.__name__.endswith("_kernel") else triton.jit(copy)


def unspecialised(kernel: Callable[..., Any]) -> Any:
    """The kernel, compiled once for all values and alignments of its arguments; alignment is a constexpr of its own."""
    parameters = inspect.signature(kernel).parameters.items()
    arguments = [name for name, one in parameters if "constexpr" not in str(one.annotation)]
    return triton.jit(kernel, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)


def _compile(source: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """The functions of a source text, jitted. Triton reads the text again, through linecache."""
    name = f"<kldiv_kernels {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    functions: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace, functions)
    return {key: triton.jit(function) for key, function in functions.items()}


def _used(hooks: Hooks) -> dict[str, Any]:
    """The functions that the text calls, by the names that it gives them; a user's are copied under such a name."""
    out = {}
    for name in hooks.divergences:
        one = hooks.of[name]
        for role in ("finish", "terms", "log_weight", "grad_logq", "grad_logp"):
            function = getattr(one, role)
            if function is not None:
                assert function.fn.__name__ == f"{name}_{role}"
        for role, function in zip(("value", "grad_logq", "grad_logp"), one.three or (), strict=False):
            if one.of_user:
                out[f"{name}_{role}"] = renamed(function, f"{name}_{role}")
            else:
                assert function.fn.__name__ == f"{name}_{role}"
    return out


def renamed(function: Any, name: str) -> Any:
    """A copy of a jit function under another name, and of what it uses: two users may have chosen the same names, or
    one of this package's."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)
    definition.name, definition.decorator_list = name, []
    namespace: dict[str, Any] = dict(function.fn.__globals__)
    names = {}
    for used in function.fn.__code__.co_names:
        value: Any = namespace.get(used)
        new = f"{name}_{used}"
        if _is_jit(value) and not value.fn.__module__.startswith("triton."):
            names[used], namespace[new] = new, renamed(value, new)
        elif isinstance(value, (tl.constexpr, int, float)):
            number = value.value if isinstance(value, tl.constexpr) else value
            interpreted = not isinstance(function, triton.JITFunction)
            names[used], namespace[new] = new, number if interpreted else tl.constexpr(number)
    for node in ast.walk(definition):
        if isinstance(node, ast.Name) and node.id in names:
            node.id = names[node.id]
    return _compile(ast.unparse(tree), namespace)[name]
