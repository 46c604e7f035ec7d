"""Instructions a column of the CUDA kernels: they are counted rightly, within their aims, and the table is today's."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import pytest

pytest.importorskip("kldiv_kernels._C", reason="the compiled part was not built")
if shutil.which("c++filt") is None:
    pytest.skip("needs c++filt", allow_module_level=True)

import cuda_instructions as instructions
import cuda_resources as resources

from kldiv_kernels.backends import cuda

# A loop in a loop, as cuobjdump shows them. The inner one reads eight columns of two rows a turn. Some turns take
# `rare` instructions more, and lanes take two of the others apart.
LOOP = """\
IMAD.MOV R1, RZ, RZ, R2
LDS.128 R8, [R59]
@P6 EXIT
LDS.128 R12, [R58+0x10]
@P0 BRA {common}
{rare}{exponentials}@P1 BRA {behind}
FADD.FTZ R1, R2, R3
FMUL.FTZ R1, R2, R3
STS.128 [R58], R8
@!P2 BRA 0x10
@!P3 BRA 0x0
EXIT
"""
COMMON = 4 + 16 + 5


def code(rare: int) -> list[instructions.Instruction]:
    places = {"common": hex(16 * (5 + rare)), "behind": hex(16 * (5 + rare + 16 + 3))}
    lines = LOOP.format(rare="NOP \n" * rare, exponentials="MUFU.EX2 R7, R6\n" * 16, **places).splitlines()
    text = [f"        /*{16 * i:04x}*/       {line} ;       /* 0x0000003239087211 */" for i, line in enumerate(lines)]
    (found,) = instructions.functions("\n".join(["\t\tFunction : _Z1kv", *text])).values()
    return found


def test_the_shortest_way_round_is_counted() -> None:
    wanted = instructions.Pass(2, 2, writes=True)
    loops = instructions.Loops(code(rare=30))
    assert list(loops.innermost) == [1]
    assert loops.per_column(wanted) == COMMON / 8
    # So short that it is taken to be of some lanes in every turn.
    assert instructions.Loops(code(rare=10)).per_column(wanted) == (COMMON + 10) / 8
    # Passes that have something more, something less, or one row.
    for other in [
        instructions.Pass(2, 2), instructions.Pass(2, 1, writes=True), instructions.Pass(2, 2, 1, writes=True),
        instructions.Pass(2, 2, writes=True, memory="LDG"), instructions.Pass(2, 2, writes=True, maxima=True),
        instructions.Pass(1, 2, writes=True),
    ]:  # fmt: skip
        assert loops.per_column(other) is None, other


def test_a_kernel_of_another_layout_is_refused() -> None:
    with pytest.raises(instructions.UnreadableError, match="one_read js bfloat16: none of its 1 innermost loops"):
        instructions.counted("one_read js bfloat16", code(rare=30))


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(instructions.TABLE.read_text())
    return content


def test_no_kernel_is_above_its_aim(table: dict[str, Any]) -> None:
    recorded = {row["kernel"]: row for row in table["kernels"]}
    assert recorded.keys() == instructions.KERNELS.keys()
    assert {kernel: row["aim"] for kernel, row in recorded.items()} == {
        kernel: aim for kernel, (aim, _) in instructions.KERNELS.items()
    }
    assert instructions.above_aims(table["kernels"]) == []
    above = [{**row, "total": row["aim"] + 1} for row in table["kernels"]]
    assert len(instructions.above_aims(above)) == len(above)


def test_the_numbers_are_those_of_the_library(table: dict[str, Any]) -> None:
    if resources.nvcc_version() is None:
        pytest.skip("needs nvcc")
    if resources.nvcc_version() != table["nvcc"]:
        pytest.skip(f"the table was made with nvcc {table['nvcc']}, here is {resources.nvcc_version()}")
    if instructions.cuobjdump() is None:
        pytest.skip("needs cuobjdump")
    if str(instructions.TARGET) not in re.findall(r"\d+", cuda.architectures()):
        pytest.skip(f"the library has no sm_{instructions.TARGET} part; make builds one under KLDIV_CUDA_ARCHS=90")
    built = instructions.rows(instructions.LIBRARY)
    assert built == table["kernels"], "run: python tests/building/cuda_instructions.py"
