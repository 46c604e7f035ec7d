"""Directives that print tables from the package's own registries, so that no page goes stale.

    statistics-table      every statistic: name with a link to its page, formula, parameters, whether it is a loss
    traffic-table         passes over the logits and sweeps of the kinds named, as `kk.plan` has them
    policy-table          the loss types of `policy_loss` with their defaults
    presets-table         the options in which the presets differ, for the loss type named
    recipes-table         the methods of the family named, of `kk.recipes`: paper, functions, what was seen where
    options-table         the fields that a dataclass adds to its base, with their default and help

A statistic links to the target `statistic-NAME`, which one page of `losses/` has: a statistic without one, and a name
that the registry does not know, is a warning, and so an error of `make docs`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterable, Sequence

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import kldiv_kernels as kk
from kldiv_kernels import policy as _policy
from kldiv_kernels.divergences import Statistic
from kldiv_kernels.registry import STATISTICS

_ROWS, _VOCAB = 8192, 151_936
_MACHINES = {"CPU": "cpu", "NVIDIA sm_90 and later": "sm_90", "NVIDIA sm_80 to sm_89": "sm_80"}
_PRESETS = (None, "trl", "verl", "nemo_rl")

Cell = nodes.Node | str | Sequence[nodes.Node]


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> nodes.table:
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    head, body = nodes.thead(), nodes.tbody()
    head += _row([nodes.Text(name) for name in header])
    body += [_row(row) for row in rows]
    group += [head, body]
    out = nodes.table(classes=["colwidths-auto"])
    out += group
    return out


def _row(cells: Sequence[Cell]) -> nodes.row:
    out = nodes.row()
    for cell in cells:
        paragraph = nodes.paragraph()
        paragraph += [nodes.Text(cell)] if isinstance(cell, str) else cell
        out += nodes.entry("", paragraph)
    return out


def code(text: str) -> nodes.literal:
    return nodes.literal(text, text)


def parameters_of(statistic: Statistic) -> list[str]:
    return [name for name in ("alpha", "beta") if getattr(statistic, name) is not None]


def function_of(kind: str) -> str:
    """The public function that is `divergence_loss` with this kind, or that one itself."""
    said = f"divergence_loss(logits, reference_logits, {kind!r}, ...)"
    named = (name for name in kk.__all__ if said in (getattr(kk, name).__doc__ or ""))
    return next(named, "divergence_loss")


class _Table(SphinxDirective):
    def link(self, target: str, text: nodes.Node) -> nodes.Node:
        reference = addnodes.pending_xref(
            "", text, refdomain="std", reftype="ref", reftarget=target, refexplicit=True, refwarn=True,
            refdoc=self.env.docname,
        )  # fmt: skip
        self.set_source_info(reference)
        return reference

    def statistic(self, name: str) -> nodes.Node:
        return self.link(f"statistic-{name.replace('_', '-')}", code(name))


class StatisticsTable(_Table):
    def run(self) -> list[nodes.Node]:
        rows: list[Sequence[Cell]] = [
            (
                self.statistic(s.name),
                s.formula.replace("||", "‖"),
                ", ".join(parameters_of(s)),
                code(f"kk.{function_of(s.name)}") if s.is_divergence else "",
            )
            for s in STATISTICS.values()
        ]
        return [table(("statistic", "value", "parameters", "the loss as a function"), rows)]


class TrafficTable(_Table):
    """Argument: the kinds, separated by spaces; those of `kk.plan` that are no divergence too."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"stats": directives.flag}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        said = self._statistic if "stats" in self.options else self._loss
        names = self.arguments[0].split()
        rows = [(code(name), *(said(name, device) for device in _MACHINES.values())) for name in names]
        return [table(("", *_MACHINES), rows)]

    def _loss(self, kind: str, device: str) -> str:
        plan = kk.plan(rows=_ROWS, vocab=_VOCAB, kind=kind, device=device)
        how = "one read" if plan.kernel.startswith("one-read") else f"{plan.sweeps} sweeps"
        return f"{_passes(plan)} passes, {how}"

    def _statistic(self, name: str, device: str) -> str:
        value, both = (
            _passes(kk.plan(rows=_ROWS, vocab=_VOCAB, stats=(name,), device=device, gradient=gradient))
            for gradient in (False, True)
        )
        return f"{value}; with gradient {both}" if STATISTICS[name].differentiable else value


def _passes(plan: kk.Plan) -> str:
    return f"{plan.bytes / (_ROWS * _VOCAB * 2):g}"


class PolicyTable(_Table):
    def run(self) -> list[nodes.Node]:
        rows: list[Sequence[Cell]] = []
        for name in _policy.LOSS_TYPES:
            options = _policy.resolve("policy-table", None, {"loss_type": name})
            rows.append(
                (
                    self.link(f"policy-{name.replace('_', '-')}", code(name)),
                    code(options.importance_level),
                    code(options.aggregation),
                )
            )
        return [table(("loss_type", "importance_level", "aggregation"), rows)]


class PresetsTable(_Table):
    """Argument: the loss type."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        loss_type = self.arguments[0]
        chosen = [_policy.resolve("presets-table", preset, {"loss_type": loss_type}) for preset in _PRESETS]
        rows: list[Sequence[Cell]] = []
        for name in _policy.OPTION_NAMES:
            values = [getattr(options, name) for options in chosen]
            if any(value != values[0] for value in values):
                rows.append((code(name), *(code(_written(value)) for value in values)))
        return [table(("option", *(f'preset="{p}"' if p else "no preset" for p in _PRESETS)), rows)]


class OptionsTable(SphinxDirective):
    """Argument: a class, module.Name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        described = getattr(importlib.import_module(module), name)
        rows = [
            (code(option.name), code(repr(option.default)), str(option.metadata["help"]))
            for option in dataclasses.fields(described)
            if option.name in described.__annotations__
        ]
        return [table(("option", "default", ""), rows)]


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_written(x) for x in value)})"
    return "off" if isinstance(value, float) and math.isinf(value) else str(value)


class RecipesTable(_Table):
    """Argument: the family."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = [
            (str(r.paper), self._paper(r), self._functions(r), r.logit_part, r.confidence)
            for r in kk.recipes.listing(self.arguments[0])
        ]
        return [table(("paper", "method", "functions", "reads", "seen in"), rows)]

    def _paper(self, recipe: kk.recipes.Recipe) -> list[nodes.Node]:
        cited = f"{recipe.title} ({recipe.year}){', ' + recipe.link if recipe.link else ''}"
        return [nodes.strong("", recipe.method), nodes.Text(f": {cited}. {recipe.differs}")]

    def _functions(self, recipe: kk.recipes.Recipe) -> list[nodes.Node]:
        out: list[nodes.Node] = []
        for name in recipe.functions:
            target = addnodes.pending_xref(
                "", code(name), refdomain="py", reftype="func", reftarget=f"kldiv_kernels.recipes.{name}",
                refexplicit=True, refwarn=True, refdoc=self.env.docname,
            )  # fmt: skip
            self.set_source_info(target)
            out += [nodes.Text(", ")] if out else []
            out.append(target)
        return out


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("statistics-table", StatisticsTable)
    app.add_directive("traffic-table", TrafficTable)
    app.add_directive("policy-table", PolicyTable)
    app.add_directive("presets-table", PresetsTable)
    app.add_directive("options-table", OptionsTable)
    app.add_directive("recipes-table", RecipesTable)
    return {"parallel_read_safe": True}
