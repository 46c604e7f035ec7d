"""The hooks of a set of statistics, written out: the text of the functions that `hooks.py` declares."""

from __future__ import annotations

import textwrap

from kldiv_kernels.backends.triton.formulas.statistic import TritonStatistic, user_arguments
from kldiv_kernels.divergences import Statistic

_THREE = ("value", "grad_logq", "grad_logp")
_ARGUMENTS = "p, q, lp, lq, u, alpha, beta"
# What statistics that are no divergences are called in `write_values`.
_VALUES = {name: name for name in ("max_logprob", "argmax", "tail_logprob")} | {"logsumexp": "lse"}
# Where those of labels find their softmax there, and what its share of the gradient is called in `weights`.
_SOFTMAXES = {
    "logprob": ("s_side, ms, log_zs", "share_q"),
    "reference_logprob": ("t_side, mt, log_zt", "share_p"),
    "untempered_logprob": ("untempered_side(s_side), untempered[0], tl.log(untempered[1])", "share_untempered"),
}


class Hooks:
    """The text of the hooks. Statistic i of the set has names that start with its own."""

    def __init__(self, statistics: tuple[Statistic, ...], functions: tuple[TritonStatistic, ...]) -> None:
        self.names = [s.name for s in statistics]
        self.of = dict(zip(self.names, functions, strict=True))
        self.statistics = {s.name: s for s in statistics}
        # Divergences have an entry in `finished`: value, two gradient sums, constants.
        self.divergences = [n for n in self.names if self.of[n].finish is not None or self.of[n].three is not None]
        self.normalised = [n for n in self.divergences if self.of[n].first is None]
        self.sums = sum(self._sums(n) for n in self.normalised)
        self.saved = sum(2 + self.of[n].constants for n in self.divergences)

    def _sums(self, name: str) -> int:
        return self.of[name].sums + 2 * (self.of[name].log_weight is not None)

    def source(self) -> str:
        parts = [
            self._zero_sums(), self._add_terms(), self._merge_sums(), self._finish(), self._write_values(),
            self._label_rows(), self._load_and_save(), self._weights(),
            self._gradient("gradient_logq", "grad_logq", "q"), self._gradient("gradient_logp", "grad_logp", "p"),
        ]  # fmt: skip
        return "\n\n".join(parts)

    def _calls(self, name: str, role: str) -> str:
        """The call of a function elementwise."""
        one = self.of[name]
        if one.three is None or not one.of_user:
            return f"{name}_{role}({_ARGUMENTS})"
        extra = "".join(f", {a}={a}" for a in user_arguments(one.three[_THREE.index(role)]))
        return f"{name}_{role}(lp, lq{extra})"

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
            if one.three is None:
                lines.append(f"{', '.join(terms)}, = {self._calls(name, 'terms')}")
            else:
                lines += [f"{term} = {self._calls(name, role)}" for term, role in zip(terms, _THREE, strict=True)]
            results += [f"sums[{at + i}] + tl.sum({term}, axis=1)" for i, term in enumerate(terms)]
            at += one.sums
            if one.log_weight is not None:
                top, total = f"{name}_top", f"{name}_total"
                lines += [
                    f"{name}_w = {self._calls(name, 'log_weight')}",
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
            if one.three is not None:
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
        labelled = sum(self.statistics[other].per_label for other in before)
        return f"{len(before) - labelled} + {labelled} * label_count"

    def _write_values(self) -> str:
        lines = []
        for name in self.names:
            row = self._value_row(name)
            if self.statistics[name].per_label:
                row_of, _ = _SOFTMAXES[name]
                picked = "picked + numbers" if self.statistics[name].student else "picked + n * label_count + numbers"
                lines += [
                    "for first in range(0, label_count, LABELS):",
                    "    numbers = first + tl.arange(0, LABELS)",
                    "    label = tl.load(labels + numbers, mask=numbers < label_count, other=-1).to(tl.int32)",
                    f"    value = log_softmax_at({row_of}, label, {picked}, exclude, vocab, SHARED)",
                    f"    tl.store(out + ({row} + numbers) * n, value, mask=numbers < label_count)",
                ]
                continue
            value = f"finished[{self._at(name)}]" if name in self.divergences else _VALUES[name]
            lines.append(f"tl.store(out + ({row}) * n, {value})")
        head = (
            "write_values(finished, out, n, lse, max_logprob, argmax, tail_logprob, s_side, ms, log_zs, "
            "untempered, t_side, mt, log_zt, exclude, vocab, labels, label_count, picked, SHARED: tl.constexpr)"
        )
        return _function(head, lines)

    def _label_rows(self) -> str:
        rows_of = {name: self._value_row(name) if name in self.names else "0" for name in _SOFTMAXES}
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
        shares = [share for _, share in _SOFTMAXES.values()]
        lines = [*(f"{share} = 0.0" for share in shares), "taking_part = 0", "tail_logprob_c = 0.0"]
        for name in self.names:
            statistic = self.statistics[name]
            if not statistic.differentiable:
                continue
            row = self._value_row(name)
            if statistic.per_label:
                _, share = _SOFTMAXES[name]
                lines += [
                    f"x, count = label_weight(coefficients + ({row}) * n, labels, n, label_count, MANY)",
                    f"{share} -= x",
                    "taking_part += count",
                ]
                continue
            lines += [
                f"{name}_c = tl.load(coefficients + ({row}) * n)",
                f"taking_part += ({name}_c != 0.0).to(tl.int32)",
            ]
            if name == "logsumexp":
                lines.append(f"share_q += {name}_c")
            if name not in self.divergences:
                continue
            # 0 * inf: a coefficient of 0 takes no part.
            for share, offset in (("share_q", 1), ("share_p", 2)):
                lines.append(
                    f"{share} -= tl.where({name}_c == 0.0, 0.0, {name}_c * finished[{self._at(name) + offset}])"
                )
        coefficients = _tuple([f"{name}_c" for name in self.divergences])
        return _function(
            "weights(finished, coefficients, labels, n, label_count, MANY: tl.constexpr)",
            [*lines, f"return {', '.join(shares)}, taking_part > 0, {coefficients}, tail_logprob_c"],
        )

    def _gradient(self, hook: str, role: str, softmax: str) -> str:
        lines = [f"g = 0.0 * {softmax}"]
        for i, name in enumerate(self.divergences):
            one = self.of[name]
            if one.three is None and getattr(one, role) is None:
                continue
            call = self._calls(name, role)
            if one.constants:
                constants = "".join(f", finished[{self._at(name) + 3 + j}]" for j in range(one.constants))
                call = call[:-1] + constants + ")"
            lines += [f"if c[{i}] != 0.0:", f"    g += c[{i}] * {call}"]
        return _function(f"{hook}(c, finished, {_ARGUMENTS})", [*lines, "return g"])


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)},)" if items else "()"


def _function(head: str, lines: list[str]) -> str:
    return f"def {head}:\n" + textwrap.indent("\n".join(lines), "    ") + "\n"
