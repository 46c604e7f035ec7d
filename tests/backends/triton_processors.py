"""GPUs that the Triton kernels are compiled for, and how many programs each holds at a time."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Processor:
    """What programs share: an SM (CUDA C++ Programming Guide, technical specifications by compute capability), or a
    compute unit (CDNA3: four SIMDs of 512 registers a lane and eight waves)."""

    target: GPUTarget
    most_warps: int
    most_programs: int
    shared: int


PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), 64, 32, 164 * 1024),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), 64, 32, 228 * 1024),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), 64, 32, 228 * 1024),
    "sm_120": Processor(GPUTarget("cuda", 120, 32), 48, 24, 100 * 1024),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * 1024),
}


def programs_resident(registers: int, shared: int, warps: int, processor: Processor) -> int:
    """How many programs a processor holds at a time."""
    if processor.target.backend == "hip":
        warps_held = min(processor.most_warps, 512 // _up(max(registers, 1), 8) * 4)
        of_shared = processor.shared // _up(shared, 512) if shared else processor.most_programs
    else:
        # A warp's registers come in units of 256 from one of four files of 16384; a program's shared memory in units
        # of 128 bytes, of which the driver keeps 1024.
        warps_held = min(processor.most_warps, 16384 // _up(max(registers, 1) * 32, 256) * 4)
        of_shared = processor.shared // _up(shared + 1024, 128)
    return min(processor.most_programs, warps_held // warps, of_shared)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
