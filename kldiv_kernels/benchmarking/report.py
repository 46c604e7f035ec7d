"""The tables that `kldiv bench` prints. results.json holds the same numbers and more."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.measure import CaseResult, Result


def times_table(results: list[CaseResult]) -> Table:
    """A section a case, a line an implementation; narrow enough for 80 columns."""
    table = Table(
        title="loss + dlogits",
        caption="u: one pass over one [N, V] tensor. GB/s: the 3u (2u) that the case needs / time. "
        "× copy: time / time of copying as much.",
        box=SIMPLE_HEAD,
    )
    table.add_column("", no_wrap=True)
    for column in ("ms", "GB/s", "% copy", "× copy", "extra MB", "extra u", "ours ×"):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in results:
        table.add_row(f"[bold]{result.case.name}[/bold]")
        for one in result.results:
            if one.error is not None:
                table.add_row(f"  {one.name}", "[red]failed[/red]")
            else:
                table.add_row(f"  {one.name}", *_numbers(result, one))
        table.add_section()
    return table


def _numbers(result: CaseResult, one: Result) -> list[str]:
    times_copy, speedup = result.times_copy(one), result.speedup(one)
    extra = None if one.memory is None else one.memory.extra_bytes
    return [
        f"{one.median * 1e3:.1f}",
        f"{result.case.floor_bytes / one.median / 1e9:.1f}",
        f"{100 / times_copy:.0f}",
        f"{times_copy:.2f}",
        "?" if extra is None else f"{extra / 1e6:.0f}",
        "?" if extra is None else f"{extra / result.case.unit_bytes:.2f}",
        "" if one.name == peers.OURS or speedup is None else f"{speedup:.1f}",
    ]


def targets_table(results: list[CaseResult]) -> Table | None:
    """What the project promises and whether this run kept it; None at shapes for which it promises nothing."""
    table = Table("case", "target", "measured", "met", title="targets")
    for result in results:
        for target, value in result.targets():
            if value is None:
                table.add_row(result.case.name, target.text(), "not measured", "[yellow]?[/yellow]")
                continue
            met = "[green]yes[/green]" if target.met(value) else "[red]no[/red]"
            table.add_row(result.case.name, target.text(), f"{value:.2f}", met)
    return table if table.row_count else None


def problems(results: list[CaseResult]) -> list[str]:
    """Everything that could not be measured, a line each, in rich markup."""
    lines: list[str] = []
    for result in results:
        for one in result.results:
            where = f"{result.case.name}, {one.name}"
            if one.error is not None:
                lines.append(f"[red]{where}: {escape(one.error)}[/red]")
            elif one.memory is not None and one.memory.extra_bytes is None:
                lines.append(f"[yellow]{where}, memory: {escape(one.memory.reason)}[/yellow]")
    return lines
