"""Tokens a second into and out of a teacher cache, on one core: `python benchmarks/teacher_cache_speed.py`.

Bytes a token at K = 64: 64 · (4 + 4) float32, 64 · (4 + 2) float16, and 8 for its id and position. Written: every
check of the rows, the checksum, the file and the wait until the disk has it. Read: the files out of the page cache
first where the system allows it; the checksum, and a sum over every id and log-prob. Random: sequences in random
order, once more, from memory.

Wall time is what a user waits; on a machine that others use too, CPU time says what one core of one's own would do,
but for the wait for the disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter

K, VOCAB, TOKENS, BATCH = 64, 151_936, 512, 8


def write(folder: Path, info: CacheInfo, sequences: int) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=generator)
    logits = torch.randn(BATCH, TOKENS, 4096, generator=generator) * 3
    logprobs, ids = logits.log_softmax(-1).topk(K)
    spread = ids * (VOCAB // 4096)

    def append() -> None:
        with TeacherCacheWriter(folder, info) as writer:
            for _ in range(0, sequences, BATCH):
                writer.append(token_ids, spread, logprobs)

    report(f"{info.dtype} written", sequences, append)


def read(cache: TeacherCache, order: Iterable[int]) -> None:
    for number in order:
        sequence = cache[number]
        sequence.topk_logprobs.sum(dtype=torch.float32)
        sequence.topk_ids.sum()


def report(what: str, sequences: int, call: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sequences * TOKENS
    print(f"{what:16} {tokens / wall:12,.0f} tokens/s of wall time {tokens / cpu:12,.0f} of CPU time")


def drop_from_memory(folder: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        for path in folder.glob("shard-*"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=4096, help=f"of {TOKENS} tokens; a multiple of {BATCH}")
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            write(folder, CacheInfo("benchmark", VOCAB, K, dtype=dtype), options.sequences)
            drop_from_memory(folder)
            cache = TeacherCache(folder)
            order = torch.randperm(len(cache)).tolist()
            report(f"{dtype} read", len(cache), lambda c=cache: read(c, range(len(c))))
            report(f"{dtype} random", len(cache), lambda c=cache, o=order: read(c, o))
            print(f"{cache.bytes / cache.totals.tokens:.0f} bytes a token")


if __name__ == "__main__":
    main()
