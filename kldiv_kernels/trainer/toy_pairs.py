"""A toy set of preferences: bodies of Python functions, with TRL's columns prompt, chosen and rejected, as text.

Half of the pairs are an idiom and a body that does the same: one of both is chosen whatever the prompt. In the others
`await` is chosen in an `async def` and rejected in a `def`, so that the prompt has to be read. All return under other
names: what is held out can be learnt from the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product

# (chosen, rejected)
_BODIES = (
    ("if {x} is None:\n        return []", "if {x} == None:\n        return []"),
    ("if not {x}:\n        return 0", "if len({x}) == 0:\n        return 0"),
    (
        "for index, item in enumerate({x}):\n        print(index, item)",
        "for index in range(len({x})):\n        print(index, {x}[index])",
    ),
    ("if isinstance({x}, str):\n        {x} = [{x}]", "if type({x}) == str:\n        {x} = [{x}]"),
    ("with open({x}) as file:\n        return file.read()", "file = open({x})\n    return file.read()"),
    ("return [item.strip() for item in {x}]", "return list(map(lambda item: item.strip(), {x}))"),
    ("return {x}.get('name')", "return {x}['name'] if 'name' in {x} else None"),
    ("return ''.join({x})", "text = ''\n    for item in {x}:\n        text += item\n    return text"),
)
# With and without what awaits.
_CALLS = (
    "return {wait}fetch({x})",
    "result = {wait}send({x})\n    return result",
    "{wait}close({x})",
    "print({wait}scan({x}))",
)
_FUNCTIONS = ("load", "parse", "check", "update")
_ARGUMENTS = ("names", "value", "data", "path")


def toy_pairs() -> Iterator[dict[str, str]]:
    """The rows, 256 of them, in one order.

    >>> next(toy_pairs())["chosen"].splitlines()[0]
    '    if names is None:'
    """
    for function, x in product(_FUNCTIONS, _ARGUMENTS):
        for chosen, rejected in _BODIES:
            yield _row(f"def {function}({x}):", chosen.format(x=x), rejected.format(x=x))
        for call in _CALLS:
            waits, passes_by = call.format(x=x, wait="await "), call.format(x=x, wait="")
            yield _row(f"async def {function}({x}):", waits, passes_by)
            yield _row(f"def {function}({x}):", passes_by, waits)


def _row(head: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": f"{head}\n", "chosen": f"    {chosen}\n", "rejected": f"    {rejected}\n"}


def jsonl() -> str:
    """The rows as a JSON-lines file."""
    return "".join(json.dumps(row) + "\n" for row in toy_pairs())
