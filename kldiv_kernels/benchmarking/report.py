"""The tables that `kldiv bench` prints. results.json holds the same numbers and more."""

from __future__ import annotations

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kldiv_kernels.backends import native
from kldiv_kernels.benchmarking import peers
from kldiv_kernels.benchmarking.measure import CaseResult, Result

_COLUMNS = (
    "time\n(ms)", "ns a\ncolumn\nand\ncore", "times\nthe\ncopy", "extra\nmemory\n(× logits)",
    "ours is\nfaster by",
)  # fmt: skip
_SENT = "sent\n(floats\na row)"
EXPLANATION = (
    "Time is that of the loss and its gradient: the median of several calls. "
    'The next column divides it by tokens and columns, and counts all threads: "ns a column and core". '
    "A loss has to read its logits and write their gradient at least. "
    '"Times the copy" is its time, divided by that of copying so many bytes on this machine. '
    "1 is the limit of the machine's memory; less means that caches helped. "
    "Extra memory is what a call needs beyond its inputs. The gradient alone is 1 × the logits."
)
SPREAD = (
    'Of the "parallel" losses two processes have half of the columns each. "Gathered logits" are put together in both, '
    "for the loss of one process. Time is that of the loss and its gradient in the slower process: the median of "
    "several calls. What is sent is what one process sends of a row, in 4-byte floats. The 1,024 bytes a call that "
    "check the arguments are not counted."
)
FROM_HIDDEN = (
    "A loss from hidden states need not have its logits in memory, and is not held against a copy. "
    '"The multiplications alone" is its time without the loss: what the same multiplications take by themselves. '
    "Its extra memory holds the gradients of hidden states and weight."
)


def times_table(results: list[CaseResult]) -> Table:
    """A section a case, a line an implementation; narrow enough for 80 columns."""
    case = results[0].case
    hidden = next((result.case.hidden for result in results if result.case.from_hidden), None)
    width = "" if hidden is None else f", hidden size {hidden:,}"
    # Of several processes neither a copy nor memory is measured.
    spread, alone = (any((result.case.ranks > 1) == several for result in results) for several in (True, False))
    columns = [*(_COLUMNS if alone else (_COLUMNS[0], _COLUMNS[-1])), *([_SENT] if spread else [])]
    cores = f", {torch.get_num_threads()} threads of {native.instruction_set()}" if native.load() is None else ""
    captions = [
        *([EXPLANATION] if alone else []), *([FROM_HIDDEN] if hidden is not None else []), *([SPREAD] if spread else [])
    ]  # fmt: skip
    table = Table(
        title=f"loss and gradient, {case.rows:,} tokens × {case.vocab:,} columns{width}{cores}",
        caption=" ".join(captions),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(f"[bold]{result.case.name}[/bold]")
        for one in result.results:
            name = f"  {peers.LABELS.get(one.name, one.name)}"
            if one.error is not None:
                table.add_row(name, "[red]failed[/red]")
            else:
                numbers = _numbers(result, one)
                table.add_row(name, *(numbers if alone else (numbers[0], *numbers[4:])))
        table.add_section()
    return table


def _numbers(result: CaseResult, one: Result) -> list[str]:
    speedup = result.speedup(one)
    times_copy = result.times_copy(one)
    extra = None if one.memory is None else one.memory.extra_bytes
    return [
        f"{one.median * 1e3:,.1f}",
        f"{result.nanoseconds(one):.2f}",
        "" if times_copy is None else f"{times_copy:.2f}",
        "?" if extra is None else f"{extra / result.case.unit_bytes:.2f}",
        "" if one.name == peers.OURS or speedup is None else f"{speedup:.1f} ×",
        *([] if one.sent_bytes_per_row is None else [f"{one.sent_bytes_per_row / 4:,.0f}"]),
    ]


def targets_table(results: list[CaseResult]) -> Table | None:
    """What the project promises and whether this run kept it; None at shapes for which it promises nothing."""
    table = Table("case", "promised", "measured", "kept", title="what this project promises at this size")
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
