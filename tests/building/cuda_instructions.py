"""How many instructions the CUDA kernels' main loops issue a column, read from the machine code for sm_90.

`python tests/building/cuda_instructions.py` reads the library that stands here, or `--library FILE` (a .so, an object
or a cubin), and writes benchmarks/cuda_instructions.json. Every loop is counted along its shortest way round: what
masks, labels and moving references take beside it is skipped. tests/building/test_cuda_instructions.py says when the
file is stale.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_resources as resources

TABLE = resources.ROOT / "benchmarks" / "cuda_instructions.json"
LIBRARY = resources.ROOT / "kldiv_kernels" / "libkldiv_kernels.so"
TARGET = 90
# Of 16 bytes, as a thread reads them.
COLUMNS = 8
# Lanes take both sides of a branch inside of a column, so one that skips no more than this is counted as not taken.
SHORT_BRANCH = 24


@dataclass(frozen=True)
class Pass:
    """What tells a pass's loops from others: rows that it reads, and how many of these it has a column."""

    rows: int
    exponentials: int = 0
    logarithms: int = 0
    writes: bool = False
    memory: str = "LDS"
    # Of logits, two at a time.
    maxima: bool = False


LOOK_ONE, LOOK = Pass(1, maxima=True), Pass(2, maxima=True)
SWEEP_ONE, SWEEP = Pass(1, 1), Pass(2, 2)
# kernel → aim, and its passes.
KERNELS: dict[str, tuple[float, dict[str, Pass]]] = {
    "one_read forward_kl bfloat16": (33, {"look": LOOK, "sweep": SWEEP, "gradient": Pass(2, 2, writes=True)}),
    "one_read reverse_kl bfloat16": (33, {"look": LOOK, "sweep": SWEEP, "gradient": Pass(2, 1, writes=True)}),
    "one_read hellinger bfloat16": (33, {"look": LOOK, "sweep": SWEEP, "gradient": Pass(2, 2, writes=True)}),
    "one_read js bfloat16": (
        52, {"look": LOOK, "sweep": SWEEP, "sums": Pass(2, 2, 1, writes=True), "gradient": Pass(2, 1, writes=True)}
    ),
    # Policy losses too.
    "one_read entropy bfloat16": (21, {"look": LOOK_ONE, "sweep": SWEEP_ONE, "gradient": Pass(1, 1, writes=True)}),
    "one_read_topk bfloat16": (14, {"look": LOOK_ONE, "sweep": SWEEP_ONE, "gradient": Pass(1, 1, writes=True)}),
    # Values alone; of two rows of bfloat16.
    "sweep forward_kl": (25, {"sweep": Pass(2, 2, memory="LDG")}),
}  # fmt: skip


class UnreadableError(Exception):
    """The machine code is not laid out as this file expects."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guarded: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def may_fall_through(self) -> bool:
        name = self.name.split(".")[0]
        if name == "BRA":
            # `BRA P1, 0x80` and `BRA.DIV UR4, 0x80` have a condition among their operands.
            return self.guarded or "." in self.name or "," in self.operands
        return self.guarded or name not in ("EXIT", "RET", "BRX")


def functions(text: str) -> dict[str, list[Instruction]]:
    """Mangled name → what cuobjdump -sass says of it."""
    found = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, body = part.split("\n", 1)
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([\w.]+)\s*(.*?)\s*;", body, re.MULTILINE)
        found[name.strip()] = [Instruction(int(a, 16), bool(guard), op, rest) for a, guard, op, rest in lines]
    return found


class Loops:
    """The innermost loops of a function."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        place = {one.address: i for i, one in enumerate(code)}
        self.after: list[list[int]] = [[] for _ in code]
        before: list[list[int]] = [[] for _ in code]
        for i, one in enumerate(code):
            if one.target is not None:
                self.after[i].append(place[one.target])
            if one.may_fall_through and i + 1 < len(code):
                self.after[i].append(i + 1)
            for j in self.after[i]:
                before[j].append(i)
        bodies = {}
        for head in {j for i, nexts in enumerate(self.after) for j in nexts if j <= i}:
            body, waiting = {head}, [i for i in before[head] if i >= head]
            while waiting:
                i = waiting.pop()
                if i not in body:
                    body.add(i)
                    waiting += before[i]
            bodies[head] = body
        heads = sorted(bodies)
        self.innermost = {
            head: bodies[head] for head in heads if not any(h in bodies[head] for h in heads if h != head)
        }

    def ways(self, head: int, memory: str) -> dict[tuple[int, ...], int]:
        """(exponentials, logarithms, reads, writes) → instructions of the shortest way round with so many of them."""
        body = self.innermost[head]
        best: dict[int, dict[tuple[int, ...], int]] = {head: {(0, 0, 0, 0): 0}}
        around: dict[tuple[int, ...], int] = {}
        # In the order of addresses all ways into an instruction are known before it, those of a loop's own end apart.
        for i in sorted(body):
            for counts, length in best.get(i, {}).items():
                kinds = tuple(have + more for have, more in zip(counts, _kinds(self.code[i].name, memory), strict=True))
                for j in self._nexts(i):
                    to = around if j == head else best.setdefault(j, {})
                    if j == head or j in body:
                        to[kinds] = min(length + 1, to.get(kinds, length + 1))
        return around

    def _nexts(self, i: int) -> list[int]:
        short = [j for j in self.after[i] if i + 1 < j <= i + SHORT_BRANCH]
        return [j for j in self.after[i] if j not in short] if self.code[i].may_fall_through else self.after[i]

    def per_column(self, wanted: Pass) -> float | None:
        """Instructions a column of the loop with the fewest that does what the pass does; None where there is none."""
        found = []
        for head, body in self.innermost.items():
            names = {self.code[i].name.split(".")[0] for i in body}
            # Of two 16-bit floats at a time, HMNMX2 or, of three words, VHMNMX.
            if wanted.memory not in names or (wanted.maxima and not any("HMNMX" in name for name in names)):
                continue
            for (exponentials, logarithms, reads, writes), length in self.ways(head, wanted.memory).items():
                columns = COLUMNS * reads / wanted.rows
                expected = (columns * wanted.exponentials, columns * wanted.logarithms, columns * wanted.writes)
                if columns and (exponentials, logarithms, COLUMNS * writes) == expected:
                    found.append(length / columns)
        return min(found, default=None)


def _kinds(name: str, memory: str) -> tuple[int, ...]:
    base, wide = name.split(".")[0], ".128" in name
    return (name == "MUFU.EX2", name == "MUFU.LG2", wide and base == memory, wide and base == "STS")


@functools.cache
def cuobjdump() -> str | None:
    """In the CUDA toolkit, or in the package of Triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside) if beside.exists() else None


def _said(*arguments: str | Path) -> str:
    tool = cuobjdump()
    if tool is None:
        raise UnreadableError("cuobjdump was found neither in PATH nor in Triton's package")
    return subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def machine_code(library: Path) -> dict[str, list[Instruction]]:
    """Readable name → instructions, of the kernels of KERNELS that the library has for sm_90."""
    arch = [] if library.suffix == ".cubin" else ["--gpu-architecture", f"sm_{TARGET}"]
    mangled = re.findall(r"^\s*Function (\w+):", _said(*arch, "--dump-resource-usage", library), re.MULTILINE)
    names = {name: plain for name, plain in resources.readable(mangled).items() if plain in KERNELS}
    if not names:
        return {}
    said = _said(*arch, "--dump-sass", "--function", ",".join(names), library)
    return {names[name]: code for name, code in functions(said).items() if name in names}


def counted(kernel: str, code: list[Instruction]) -> dict[str, float]:
    loops, counts = Loops(code), {}
    for name, wanted in KERNELS[kernel][1].items():
        count = loops.per_column(wanted)
        if count is None:
            raise UnreadableError(
                f"{kernel}: none of its {len(loops.innermost)} innermost loops is its {name}, {wanted}"
            )
        counts[name] = round(count, 2)
    return {**counts, "total": round(sum(counts.values()), 2)}


def rows(library: Path) -> list[dict[str, Any]]:
    found = machine_code(library)
    missing = KERNELS.keys() - found.keys()
    if missing:
        raise UnreadableError(f"{library} has no sm_{TARGET} code of {', '.join(sorted(missing))}")
    return [{"kernel": kernel, "aim": KERNELS[kernel][0], **counted(kernel, found[kernel])} for kernel in KERNELS]


def above_aims(table: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['kernel']}: {row['total']} instructions a column, the aim is {row['aim']}"
        for row in table
        if row["total"] > row["aim"]
    ]


def text_of(table: list[dict[str, Any]], nvcc: str | None) -> str:
    """JSON, a kernel a line."""
    head = {"nvcc": nvcc, "target": f"sm_{TARGET}", "unit": "instructions a column, of a thread"}
    lines = ",\n".join("    " + json.dumps(row) for row in table)
    return json.dumps(head, indent=2)[:-2] + f',\n  "kernels": [\n{lines}\n  ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TABLE, help="default: benchmarks/cuda_instructions.json")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: the library that stands here")
    options = parser.parse_args()
    table = rows(options.library)
    options.output.write_text(text_of(table, resources.nvcc_version()))
    missed = above_aims(table)
    print(f"{len(table)} kernels, {len(missed)} above their aims", *missed, sep="\n")
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
