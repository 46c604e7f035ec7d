"""Every Triton kernel, compiled for GPUs that are not here: it spills nothing, and counts rows in 64 bits."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
from checks import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

import triton
import triton.language as tl
import triton_aot as aot
from torch import Tensor
from triton_launches import DTYPES, SETS, launches, shard_launches, source_of
from triton_processors import PROCESSORS, programs_resident

import kldiv_kernels as kk
from kldiv_kernels.backends.triton import bind
from kldiv_kernels.registry import STATISTICS

# Arguments of 32 bits: no more than a row is long, or the processes that have its columns are many.
OF_ONE_ROW = {"vocab", "slices", "parts", "first_column", "label_count", "value_rows"}


TOP_K = ("logprob", "tail_logprob")


def _fast_jobs() -> list[aot.Job]:
    """All kernels for one target; for others the loss kernel, which holds the code of all but those for labels."""
    jobs = [*aot.jobs(["sm_90"], ["bf16"])]
    others = [
        *aot.jobs(["sm_80"], ["fp32"]),
        *aot.jobs(["sm_120"], ["bf16"], everything=True),
        *aot.jobs(["gfx942"], ["bf16"]),
    ]
    return jobs + [job for job in others if job.kernel == "loss_kernel" or job.stats in (TOP_K, TOP_K[1:])]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _check(kernels: list[aot.Compiled]) -> None:
    over = [
        f"{one.job}: {one.registers} registers, {one.spilled} bytes spilled, {one.programs} programs"
        for one in kernels
        if not one.within_budget
    ]
    assert not over, "\n".join(over)
    for one in kernels:
        assert not narrow(one.ttir), one.job
        # Triton 3.6 takes a constant below the smallest normal float32 for a float64, and all that it meets.
        assert "f64" not in one.ttir, one.job


def test_kernels_fit_and_are_of_the_right_widths() -> None:
    _check(list(aot.compile_all(_fast_jobs())))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("everything", [False, True])
def test_kernels_of_vocabulary_shards_fit(everything: bool, target: str) -> None:
    """What is not launched for whole rows as well."""
    processor = PROCESSORS[target]
    for stats in ((*TOP_K, "untempered_logprob", "entropy"), ("forward_kl", "js", "renyi", "argmax")):
        noted = shard_launches(stats, "bf16", everything, processor.target.backend == "cuda")
        names = {"merge_states_kernel", "finish_kernel", *(["merge_sums_kernel"] if "js" in stats else [])}
        for name in names:
            kernel, arguments, warps = noted[name]
            binary, log = aot.compile_for(processor.target, source_of(kernel, arguments), warps)
            ttir = aot.without_places(binary.asm["ttir"])
            assert not narrow(ttir), name
            assert "f64" not in ttir, name
            if processor.target.backend == "cuda":
                assert " 0 bytes spill stores" in log, (name, log)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "stats", [("logprob",), TOP_K, (*TOP_K, "entropy"), ("forward_kl", "untempered_logprob")], ids="+".join
)
def test_loops_over_columns_are_pipelined(stats: tuple[str, ...], target: str) -> None:
    """The logits come through shared memory, blocks ahead, with one label a row or many."""
    processor = PROCESSORS[target]
    for name in ("sweep_kernel", "gradient_kernel"):
        kernel, arguments, warps = launches(stats, "bf16", False, True)[name]
        binary, _ = aot.compile_for(processor.target, source_of(kernel, arguments), warps)
        loops = re.findall(r"\n( *)[^\n]*scf\.for(.*?)\n\1}", binary.asm["ttgir"], re.DOTALL)
        pipelined = [body for _, body in loops if "async_copy_global_to_local" in body]
        assert len(pipelined) == 1, name
        # Nothing is loaded in it directly: a load that the compiler cannot pipeline is waited for in every block.
        assert "tt.load" not in pipelined[0], name


@pytest.mark.slow
def test_every_kernel_dtype_and_target() -> None:
    _check(list(aot.compile_all(aot.all_jobs())))


def _not_called(logp: Tensor, logq: Tensor) -> Tensor:
    raise AssertionError


@triton.jit
def _squared(logp, logq, alpha):
    return alpha * (tl.exp(logp) - tl.exp(logq)) * (tl.exp(logp) - tl.exp(logq))


@triton.jit
def _squared_grad_logq(logp, logq, alpha):
    return 2 * alpha * (tl.exp(logq) - tl.exp(logp)) * tl.exp(logq)


@triton.jit
def _squared_grad_logp(logp, logq, alpha):
    return 2 * alpha * (tl.exp(logp) - tl.exp(logq)) * tl.exp(logp)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_statistic_of_a_user(target: str) -> None:
    functions = (_squared, _squared_grad_logq, _squared_grad_logp)
    kk.register_statistic(
        "squared_aot", value=_not_called, grad_logq=_not_called, grad_logp=_not_called, triton=functions
    )
    try:
        _check([aot.compiled(aot.Job(("squared_aot", "logprob"), "loss_kernel", "bf16", target, everything=True))])
    finally:
        kk.unregister_statistic("squared_aot")


@pytest.mark.parametrize(("target", "options"), [("sm_90", {"maxnreg": 32}), ("gfx942", {"waves_per_eu": 8})])
def test_spills_are_seen(target: str, options: dict[str, int]) -> None:
    one = aot.compiled(aot.Job(("js",), "loss_kernel", "bf16", target), **options)
    assert one.spilled > aot.MOST_SPILLED
    assert not one.within_budget


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "target", "programs"),
    [
        (128, 0, 4, "sm_90", 4),
        (129, 0, 4, "sm_90", 3),
        (255, 0, 4, "sm_80", 2),
        (32, 8192, 4, "sm_120", 11),
        (32, 0, 1, "sm_90", 32),
        (128, 0, 4, "gfx942", 4),
        (129, 0, 4, "gfx942", 3),
        (24, 32768, 4, "gfx942", 2),
        (24, 0, 1, "gfx942", 32),
    ],
)
def test_programs_resident(registers: int, shared: int, warps: int, target: str, programs: int) -> None:
    assert programs_resident(registers, shared, warps, PROCESSORS[target]) == programs


def test_the_table_has_every_kernel_and_keeps_the_budget() -> None:
    """Not that its numbers are those of the Triton here: it is a record."""
    table = json.loads(aot.TABLE.read_text())
    recorded = {
        (statistics, row["kernel"], column, target)
        for row in table["kernels"]
        for statistics in row["statistics"]
        for column in row.keys() - {"kernel", "statistics"}
        for target in row[column]
    }
    expected = {
        ("+".join(stats), kernel, dtype, target)
        for stats in SETS
        for kernel in launches(stats, "bf16", False, False)
        for dtype in DTYPES
        for target in PROCESSORS
    }
    assert {name for name, statistic in STATISTICS.items() if statistic.builtin} <= {names for names, *_ in recorded}
    assert expected <= recorded, "run: python tests/backends/triton_aot.py"
    assert all(spilled <= aot.MOST_SPILLED and programs >= 2 for _, _, spilled, programs in aot.cells(table))


def narrow(ttir: str) -> list[str]:
    """Where numbers that grow with the number of rows have 32 bits.

    Only program ids, arguments and loaded values come into a kernel, and operations have operands of one width: it is
    enough that these are wide or bounded by a row, and that nothing else is made narrow.
    """
    found = []
    defined: dict[str, tuple[str, list[str]]] = {}
    pointers: set[str] = set()
    addresses = 0
    for line in ttir.splitlines():
        if "tt.func" in line:
            arguments = dict(re.findall(r"%(\w+): (!tt\.ptr|i\d+)", line))
            pointers = {name for name, kind in arguments.items() if kind == "!tt.ptr"}
            found += [f"{name}: i32" for name, kind in arguments.items() if kind == "i32" and name not in OF_ONE_ROW]
        operation = re.match(r"\s*(?:%(\w+)(?::\d+)? = )?\"?([a-z]+\.[\w.]+)", line)
        if not operation:
            continue
        result, name = operation.groups()
        operands = re.findall(r"%(\w+)", line[operation.end() :])
        kind = line.rsplit(" : ")[-1]
        if name == "tt.addptr" and operands[0] in pointers:
            addresses += 1
            if "i64" not in kind.rsplit(",", 1)[1]:
                found.append(line.strip())
        if name != "arith.extsi" and any(defined.get(one, ("",))[0] == "tt.get_program_id" for one in operands):
            found.append(line.strip())
        if name == "arith.trunci" and not _bounded_by_a_row(operands[0], defined):
            found.append(line.strip())
        if result:
            defined[result] = name, operands
            pointers.discard(result)
            if name in ("tt.splat", "tt.broadcast") and operands[0] in pointers:
                pointers.add(result)
    assert addresses, "no address in this kernel"
    return found


def _bounded_by_a_row(value: str, defined: dict[str, tuple[str, list[str]]]) -> bool:
    name, operands = defined.get(value, ("argument", []))
    if name == "arith.remsi":
        _, divisor = defined.get(operands[1], ("argument", [operands[1]]))
        return set(divisor) <= OF_ONE_ROW
    return name == "tt.load" or value in ("s_width", "t_width")


NARROWED = {
    "program id": (r"\.to\(tl\.int64\)", ""),
    "arguments": (r"(\w+): tl\.int64", r"\1"),
    "row": (r"index = (program // slices|tl\.program_id\(0\)\.to\(tl\.int64\))", r"index = (\1).to(tl.int32)"),
}


@pytest.mark.parametrize("what", NARROWED)
def test_narrow_row_numbers_are_seen(what: str) -> None:
    for name, (kernel, arguments, warps) in launches(("js",), "bf16", False, True).items():
        text = textwrap.dedent(inspect.getsource(kernel.fn))
        text = text[text.index("def ") :]
        narrowed = re.sub(*NARROWED[what], text)
        if what == "row" and name == "scale_kernel":
            continue
        assert narrowed != text
        source = source_of(bind._compile(narrowed, kernel.fn.__globals__)[name], arguments)
        binary, _ = aot.compile_for(PROCESSORS["sm_90"].target, source, warps)
        assert narrow(aot.without_places(binary.asm["ttir"])), name
