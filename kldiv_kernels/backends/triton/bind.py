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

from kldiv_kernels.backends.triton import divergences, kernels, math, powers, rows, slices, state
from kldiv_kernels.backends.triton.table import TritonStatistic, user_arguments
from kldiv_kernels.registry import Statistic

_ARGUMENTS = "p, q, lp, lq, u, alpha, beta"


@dataclass(frozen=True, eq=False)
class Bound:
    """The kernels of a set of statistics, and what the launcher must know of it."""

    sweep_kernel: Any
    sums_kernel: Any
    finish_kernel: Any
    gradient_kernel: Any
    loss_kernel: Any
    first: int
    sums: int
    state_rows: int
    label_s: bool
    label_t: bool


@functools.cache
def bind(statistics: tuple[Statistic, ...], functions: tuple[TritonStatistic, ...], nvidia: bool) -> Bound:
    """The kernels for these statistics, in this order."""
    hooks = _Hooks(statistics, functions)
    namespace: dict[str, Any] = {"__name__": f"{__name__}.bound", "triton": triton, "tl": tl}
    for module in (math, rows, state, divergences, powers, slices, kernels):
        namespace.update({name: value for name, value in vars(module).items() if _is_triton(value)})
    namespace["NVIDIA"] = tl.constexpr(nvidia)
    namespace["INFINITY"] = tl.constexpr(_Infinity("inf"))
    if not isinstance(kernels.sweep_kernel, triton.JITFunction):  # the interpreter wants plain numbers
        namespace = {k: v.value if isinstance(v, tl.constexpr) else v for k, v in namespace.items()}
    for name, function in hooks.used().items():
        namespace[name] = function
    # All functions share the namespace: those of math.py see NVIDIA, and the kernels see the hooks.
    for name, function in list(namespace.items()):
        if _is_jit(function) and function.fn.__module__.startswith(__package__ or ""):
            namespace[name] = _jit_in(function.fn, namespace)
    namespace.update(_compile(hooks.source(), namespace))
    kernel = {name: namespace[name] for name in Bound.__dataclass_fields__ if name.endswith("_kernel")}
    return Bound(
        **kernel,
        first=functools.reduce(int.__or__, (f.takes for f in functions), 0),
        sums=hooks.sums,
        state_rows=4 + hooks.saved,
        label_s="logprob" in hooks.names,
        label_t="reference_logprob" in hooks.names,
    )


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


class _Hooks:
    """The text of the hooks. Statistic i of the set has names that start with its own."""

    def __init__(self, statistics: tuple[Statistic, ...], functions: tuple[TritonStatistic, ...]) -> None:
        self.names = [s.name for s in statistics]
        self.of = dict(zip(self.names, functions, strict=True))
        self.statistics = {s.name: s for s in statistics}
        # Divergences have an entry in `finished`: value, two gradient sums, constants.
        self.divergences = [n for n in self.names if self.of[n].finish is not None or self.of[n].user is not None]
        self.normalised = [n for n in self.divergences if self.of[n].first is None]
        self.sums = sum(self._sums(n) for n in self.normalised)
        self.saved = sum(2 + self.of[n].constants for n in self.divergences)

    def _sums(self, name: str) -> int:
        return self.of[name].sums + 2 * (self.of[name].log_weight is not None)

    def used(self) -> dict[str, Any]:
        """The functions that the text calls, by the names that it gives them; a user's are copied under such a name."""
        out = {}
        for name in self.divergences:
            one = self.of[name]
            for role in ("finish", "terms", "log_weight", "grad_logq", "grad_logp"):
                function = getattr(one, role)
                if function is not None:
                    assert function.fn.__name__ == f"{name}_{role}"
            for role, function in zip(("value", "grad_logq", "grad_logp"), one.user or (), strict=False):
                out[f"{name}_{role}"] = renamed(function, f"{name}_{role}")
        return out

    def source(self) -> str:
        parts = [
            self._zero_sums(), self._add_terms(), self._merge_sums(), self._finish(), self._write_values(),
            self._label_rows(), self._load_and_save(), self._weights(),
            self._gradient("gradient_logq", "grad_logq", "q"), self._gradient("gradient_logp", "grad_logp", "p"),
        ]  # fmt: skip
        return "\n\n".join(parts)

    def _calls(self, name: str, role: str, of_user: int) -> str:
        """The call of a function elementwise."""
        one = self.of[name]
        if one.user is None:
            return f"{name}_{role}({_ARGUMENTS})"
        extra = "".join(f", {a}={a}" for a in user_arguments(one.user[of_user]))
        return f"{name}_{('value', 'grad_logq', 'grad_logp')[of_user]}(lp, lq{extra})"

    def _zero_sums(self) -> str:
        zeros = []
        for name in self.normalised:
            zeros += ["tl.zeros([R], tl.float32)"] * self.of[name].sums
            if self.of[name].log_weight is not None:
                zeros += ["tl.full([R], -1e38, tl.float32)", "tl.zeros([R], tl.float32)"]
        return f"def zero_sums(R: tl.constexpr):\n    return {_tuple(zeros)}\n"

    def _add_terms(self) -> str:
        lines, results, at = [], [], 0
        for name in self.normalised:
            one = self.of[name]
            terms = [f"{name}_{i}" for i in range(one.sums)]
            if one.user is None:
                lines.append(f"{', '.join(terms)}, = {self._calls(name, 'terms', 0)}")
            else:
                lines += [f"{term} = {self._calls(name, '', i)}" for i, term in enumerate(terms)]
            results += [f"sums[{at + i}] + tl.sum({term}, axis=1)" for i, term in enumerate(terms)]
            at += one.sums
            if one.log_weight is not None:
                top, total = f"{name}_top", f"{name}_total"
                lines += [
                    f"{name}_w = {self._calls(name, 'log_weight', 0)}",
                    f"{top} = tl.maximum(sums[{at}], tl.max({name}_w, axis=1))",
                    f"{total} = sums[{at + 1}] * tl.exp2((sums[{at}] - {top}) * LOG2E)",
                    f"{total} += tl.sum(tl.exp2(({name}_w - {top}[:, None]) * LOG2E), axis=1)",
                ]
                results += [top, total]
                at += 2
        return _function(f"add_terms(sums, {_ARGUMENTS})", [*lines, f"return {_tuple(results)}"])

    def _merge_sums(self) -> str:
        lines, results, at = [], [], 0
        for name in self.normalised:
            results += [f"tl.sum(sums[{at + i}], axis=0)" for i in range(self.of[name].sums)]
            at += self.of[name].sums
            if self.of[name].log_weight is not None:
                lines += [
                    f"{name}_top = tl.max(sums[{at}], axis=0)",
                    f"{name}_total = tl.sum(sums[{at + 1}] * tl.exp2((sums[{at}] - {name}_top) * LOG2E), axis=0)",
                ]
                results += [f"{name}_top", f"{name}_total"]
                at += 2
        return _function("merge_sums(sums)", [*lines, f"return {_tuple(results)}"])

    def _entry(self, name: str) -> list[str]:
        """Names of a statistic's numbers in `finished`."""
        return [f"{name}_{i}" for i in range(3 + self.of[name].constants)]

    def _at(self, name: str) -> int:
        """Where they start."""
        before = self.divergences[: self.divergences.index(name)]
        return sum(3 + self.of[other].constants for other in before)

    def _finish(self) -> str:
        lines, at = [], 0
        for name in self.divergences:
            one, entry = self.of[name], self._entry(name)
            if one.user is not None:
                lines.append(f"{', '.join(entry)} = sums[{at}], sums[{at + 1}], sums[{at + 2}]")
                at += 3
            else:
                if one.first is not None:
                    inputs = [f"first[{one.first}]"]
                else:
                    inputs = [f"sums[{at + i}]" for i in range(one.sums)]
                    at += one.sums
                    if one.log_weight is not None:
                        inputs.append(f"sums[{at}] + tl.log(sums[{at + 1}])")
                        at += 2
                call = f"{name}_finish({', '.join(inputs)}, q_is_zero, p_is_zero, alpha, beta)"
                lines.append(f"{', '.join(entry)} = {call}")
            statistic = self.statistics[name]
            bad = " | ".join(["bad_s"] * statistic.student + ["bad_t"] * statistic.reference)
            lines += [f'{x} = tl.where({bad}, float("nan"), {x})' for x in entry[:3]]
        everything = [x for name in self.divergences for x in self._entry(name)]
        head = "finish(first, sums, q_is_zero, p_is_zero, bad_s, bad_t, alpha, beta)"
        return _function(head, [*lines, f"return {_tuple(everything)}"])

    def _value_row(self, name: str) -> str:
        """Its first row in the table of values: labelled statistics have one for each label."""
        before = self.names[: self.names.index(name)]
        labelled = sum(self.statistics[other].needs_labels for other in before)
        return f"{len(before) - labelled} + {labelled} * label_count"

    def _write_values(self) -> str:
        lines = []
        for name in self.names:
            row = self._value_row(name)
            if self.statistics[name].needs_labels:
                row_of = "s_side, ms, log_zs" if name == "logprob" else "t_side, mt, log_zt"
                bad = "log_zs != log_zs" if name == "logprob" else "log_zt != log_zt"
                lines += [
                    "for k in range(label_count):",
                    "    label = tl.load(labels + k).to(tl.int32)",
                    f"    value = log_softmax_at({row_of}, {bad}, label, exclude, vocab)",
                    f"    tl.store(out + ({row} + k) * n, value)",
                ]
                continue
            value = {"logsumexp": "lse", "max_logprob": "max_logprob", "argmax": "argmax"}.get(name)
            if value is None:
                value = f"finished[{self._at(name)}]"
            lines.append(f"tl.store(out + ({row}) * n, {value})")
        head = (
            "write_values(finished, out, n, lse, max_logprob, argmax, s_side, ms, log_zs, t_side, mt, log_zt, "
            "exclude, vocab, labels, label_count)"
        )
        return _function(head, lines)

    def _label_rows(self) -> str:
        rows_of = {
            name: self._value_row(name) if name in self.names else "0" for name in ("logprob", "reference_logprob")
        }
        return "\n\n".join(_function(f"{name}_at(label_count)", [f"return {row}"]) for name, row in rows_of.items())

    def _load_and_save(self) -> str:
        loaded, saved, at, entry_at = [], [], 0, 0
        for name in self.divergences:
            count = 2 + self.of[name].constants
            loaded += ["0.0"] + [f"tl.load(state + {at + i} * n)" for i in range(count)]
            saved += [f"tl.store(state + {at + i} * n, finished[{entry_at + 1 + i}])" for i in range(count)]
            at += count
            entry_at += count + 1
        load = _function("load_finished(state, n)", [f"return {_tuple(loaded)}"])
        return load + "\n\n" + _function("save_finished(finished, state, n)", saved or ["pass"])

    def _weights(self) -> str:
        lines = ["share_q = 0.0", "share_p = 0.0", "taking_part = 0"]
        for name in self.names:
            statistic = self.statistics[name]
            if not statistic.differentiable:
                continue
            row = self._value_row(name)
            if statistic.needs_labels:
                share = "share_q" if statistic.student else "share_p"
                lines += [
                    "for k in range(label_count):",
                    f"    x = tl.load(coefficients + ({row} + k) * n)",
                    "    x = tl.where(tl.load(labels + k) < 0, 0.0, x)",
                    f"    {share} -= x",
                    "    taking_part += (x != 0.0).to(tl.int32)",
                ]
                continue
            lines += [
                f"{name}_c = tl.load(coefficients + ({row}) * n)",
                f"taking_part += ({name}_c != 0.0).to(tl.int32)",
            ]
            if name == "logsumexp":
                lines.append(f"share_q += {name}_c")
                continue
            # 0 * inf: a coefficient of 0 takes no part.
            for share, offset in (("share_q", 1), ("share_p", 2)):
                lines.append(
                    f"{share} -= tl.where({name}_c == 0.0, 0.0, {name}_c * finished[{self._at(name) + offset}])"
                )
        coefficients = _tuple([f"{name}_c" for name in self.divergences])
        return _function(
            "weights(finished, coefficients, labels, n, label_count)",
            [*lines, f"return share_q, share_p, taking_part > 0, {coefficients}"],
        )

    def _gradient(self, hook: str, role: str, softmax: str) -> str:
        lines = [f"g = 0.0 * {softmax}"]
        for i, name in enumerate(self.divergences):
            one = self.of[name]
            if one.user is None and getattr(one, role) is None:
                continue
            call = self._calls(name, role, 1 if role == "grad_logq" else 2)
            if one.constants:
                constants = "".join(f", finished[{self._at(name) + 3 + j}]" for j in range(one.constants))
                call = call[:-1] + constants + ")"
            lines += [f"if c[{i}] != 0.0:", f"    g += c[{i}] * {call}"]
        return _function(f"{hook}(c, finished, {_ARGUMENTS})", [*lines, "return g"])


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)},)" if items else "()"


def _function(head: str, lines: list[str]) -> str:
    return f"def {head}:\n" + textwrap.indent("\n".join(lines), "    ") + "\n"


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
