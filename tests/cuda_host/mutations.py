"""Mutants of the kernels: their headers with one call left out, all of them in one program (`mutant_test.cpp`).

Every call of a function of ``ptx.cuh`` that acts on the machine is found in the source and guarded by a number. The
program is compiled once and told which number to leave out, so that a mutant costs no compilation.
``python -m cuda_host.mutations SEEDS`` prints how many of the orders of threads saw each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_host.build import FOLDER, HERE, JOBS, ROOT, build

CUDA = ROOT / "csrc" / "cuda"
NONE = -1
# Without the variables that choose the machine and the plan: the program sets its own.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("KLDIV_HOST_", "KLDIV_CUDA_"))}


@dataclass(frozen=True)
class Mutation:
    number: int
    where: str  # header:line
    call: str
    function: str

    @property
    def name(self) -> str:
        return f"{self.where} {self.call}"


def functions() -> dict[str, bool]:
    """The functions that act on the machine, and whether the host's model shows where one is left out.

    They are those of ``ptx.cuh`` that return nothing, behind the section on arithmetic. What the model cannot show is
    said in the comment above the function.
    """
    text = (CUDA / "machine" / "ptx.cuh").read_text()
    acting = text[text.index("// --- warps and blocks") :]
    declared = re.findall(r"((?:^//[^\n]*\n)*)^KLDIV_DEVICE void (\w+)\(", acting, re.M)
    assert len(declared) > 10, "ptx.cuh is not laid out as it was"
    comments = {name: " ".join(comment.replace("//", " ").split()) for comment, name in declared}
    return {name: not re.search(r"The host model [^.]* cannot show", said) for name, said in comments.items()}


def _call_at(text: str, start: int) -> str:
    depth = 0
    for at in range(text.index("(", start), len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return re.sub(r"\s+", " ", text[start : at + 1])
    raise AssertionError(f"unbalanced parentheses behind {text[start : start + 40]!r}")


def _rewritten() -> tuple[list[Mutation], dict[str, str]]:
    """The mutations, and the headers with their guards."""
    mutations: list[Mutation] = []
    headers = {}
    pattern = re.compile(rf"(?<![\w:.`])({'|'.join(functions())})\(")
    for path in sorted(CUDA.rglob("*.cuh")):
        if path.name in ("ptx.cuh", "runtime.cuh"):
            continue
        text = path.read_text()

        def guarded(found: re.Match[str], text: str = text, header: str = path.name) -> str:
            before = text[text.rfind("\n", 0, found.start()) + 1 : found.start()]
            if "//" in before:
                return found.group()
            where = f"{header}:{text.count(chr(10), 0, found.start()) + 1}"
            number = len(mutations)
            mutations.append(Mutation(number, where, _call_at(text, found.start()), found.group(1)))
            # Every call is a statement of its own, so that what stands before it is before all of it.
            return f"host::left_out({number}) ? void() : {found.group()}"

        headers[path.name] = pattern.sub(guarded, text).replace("#pragma once", '#pragma once\n#include "mutant.h"', 1)
    return mutations, headers


def all_mutations() -> list[Mutation]:
    return _rewritten()[0]


def program(*, sanitize: bool = False) -> Path:
    """The driver with the guarded kernels."""
    copy = FOLDER / "mutants"
    _, headers = _rewritten()
    for path in [
        *CUDA.parent.glob("*.h"),
        *(CUDA.parent / "divergences").glob("*.h"),
        CUDA.parent / "plan.cpp",
        *CUDA.rglob("*.*"),
    ]:
        to = copy / path.relative_to(CUDA.parent)
        text = headers[path.name] if CUDA in path.parents and path.name in headers else path.read_text()
        if to.exists() and to.read_text() == text:
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        unfinished = to.with_name(f"{to.name}.{os.getpid()}")
        unfinished.write_text(text)
        unfinished.rename(to)
    sources = [HERE / "mutant_test.cpp", *(copy / "cuda" / f"{name}.cu" for name in ("launch", "statistics"))]
    sources.append(copy / "plan.cpp")
    return build("mutant_test", sources, sanitize=sanitize, optimise="-O1", extra_includes=[copy])


def run(
    path: Path, mutation: int, seeds: range, problems: str, *, stop: bool = False, timeout: float = 300
) -> tuple[int, list[str]]:
    """How many seeds were wrong, and a line for each that says how; with `stop`, up to the first. Then what sanitizers
    said."""
    words: Sequence[object] = (mutation, seeds.start, len(seeds), problems, *(["stop"] if stop else []))
    done = subprocess.run(
        [path, *map(str, words)], capture_output=True, text=True, env=_ENVIRONMENT, timeout=timeout, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode not in (0, 1) or not lines or not re.fullmatch(r"\d+ of \d+ seeds", lines[-1]):
        raise RuntimeError(f"mutant_test {words} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return int(lines[-1].split()[0]), lines[:-1] + done.stderr.splitlines()[:40]


def _table(seeds: int) -> None:
    path, shown = program(), functions()
    mutations = [x for x in all_mutations() if shown[x.function]]
    with ThreadPoolExecutor(JOBS) as pool:
        results = pool.map(lambda x: run(path, x.number, range(1, seeds + 1), "orders"), mutations)
        for mutation, (wrong, lines) in zip(mutations, results, strict=True):
            first = lines[0] if lines else "nothing goes wrong"
            print(f"{wrong:4} of {seeds}  {mutation.name}\n{'':14}{first[:150]}", flush=True)


if __name__ == "__main__":
    _table(int(sys.argv[1]))
