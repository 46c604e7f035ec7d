"""The command `kldiv recipes`: which methods there are, and what one of them is."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kldiv_kernels.recipes import Recipe

READS = {
    "R0": "one, value and gradient together",
    "R0+f": "one without gradient, then one for value and gradient",
    "f": "one, without gradient",
    "R1": "two, the second for the gradient",
    "torch": "tensors of the logits' size in PyTorch",
    "none": "it has no logits",
}
SEEN = {
    "code": "in the authors' code",
    "paper": "in the paper's text",
    "restated": "in other people's words or code",
    "derived": "nowhere: it follows from the abstract and what is known",
}


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A method, one of its functions, or a paper's number.", show_default=False)
    ] = None,
    family: Annotated[str | None, typer.Option(help="Only the methods of one family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the registry has, as JSON.")] = False,
) -> None:
    """Methods of papers that are functions of kldiv_kernels.recipes, and what one of them is.

    [bold]Examples[/bold]

      $ kldiv recipes

      $ kldiv recipes vopd

      $ kldiv recipes --family token_credit

      $ kldiv recipes 46 --json
    """
    import kldiv_kernels as kk

    if name is not None and family is not None:
        raise typer.BadParameter("NAME is given beside it; pass one of them", param_hint="--family")
    try:
        found = [kk.recipes.find(name)] if name is not None else kk.recipes.listing(family)
    except ValueError as error:
        where = "NAME" if name is not None else "--family"
        raise typer.BadParameter(str(error).split(": ", 1)[1], param_hint=where) from None
    if as_json:
        records = [dataclasses.asdict(recipe) for recipe in found]
        print(json.dumps(records if name is None else records[0], indent=2, ensure_ascii=False))
    elif name is None:
        _print_table(found)
    else:
        _print_one(found[0])


def _print_table(found: list[Recipe]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("paper")
    table.add_column("method", overflow="fold")
    # Names to copy: whole, in a terminal of 80 columns too.
    table.add_column("functions", no_wrap=True)
    table.add_column("reads")
    table.add_column("seen in")
    family = ""
    for recipe in sorted(found, key=lambda recipe: recipe.family):
        if recipe.family != family:
            family = recipe.family
            table.add_section()
            table.add_row("", "", f"[bold]{family}[/bold]")
        names = "\n".join(recipe.functions) or f"see kldiv recipes {recipe.paper}"
        table.add_row(str(recipe.paper), escape(recipe.method), escape(names), recipe.logit_part, recipe.confidence)
    console = Console()
    console.print(table)
    console.print("How often the logits are read:")
    for key, text in READS.items():
        console.print(f"{key:>5}: {text}", highlight=False)
    console.print("Where the formula was seen:")
    for key, text in SEEN.items():
        console.print(f"{key:>9}: {text}", highlight=False)
    console.print("kldiv recipes NAME prints formula, defaults, differences and an example.", highlight=False)


def _print_one(recipe: Recipe) -> None:
    from rich.console import Console
    from rich.markup import escape

    import kldiv_kernels as kk

    console = Console(highlight=False)
    console.print(f"[bold]{escape(recipe.method)}[/bold] · paper {recipe.paper} · {recipe.family}")
    console.print(escape(f"{recipe.title} ({recipe.year}){', ' + recipe.link if recipe.link else ''}"))
    console.print(f"Reads of the logits ({recipe.logit_part}): {READS[recipe.logit_part]}.")
    console.print(f"The formula was seen {SEEN[recipe.confidence]}.")
    if recipe.differs:
        console.print(escape(recipe.differs))
    for name in recipe.functions:
        function = getattr(kk.recipes, name)
        console.print()
        console.print(f"[bold]kk.recipes.{name}[/bold]" + escape(signature(function)), soft_wrap=True)
        console.print(escape(inspect.getdoc(function) or ""), soft_wrap=True)


def signature(function: Any) -> str:
    """Names and defaults, without types."""
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters]
    return str(inspect.Signature(plain))
