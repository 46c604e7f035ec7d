"""`kldiv cache-teacher` on a small teacher and a text of 18 blocks, as its tests run it."""

from __future__ import annotations

from pathlib import Path

import commands
import tiny
import torch

from kldiv_kernels.trainer.cache_command import cache_teacher

BLOCK, K = 16, 6
# Blocks of 15 rows: a shard of 50 has 3 of them, and begins and ends inside batches of 4.
SMALL = {"--k": str(K), "--block-size": str(BLOCK), "--batch-size": "4", "--shard-rows": "50"}


def save_teacher_and_text(folder: Path) -> None:
    tiny.llama(2, hidden=24).save_pretrained(folder / "teacher")
    tiny.word_tokenizer().save_pretrained(folder / "teacher")
    (folder / "text.txt").write_text(tiny.words(18 * BLOCK + 5))


def options(folder: Path, output: Path) -> dict[str, str]:
    return {
        "--teacher": str(folder / "teacher"), "--data": str(folder / "text.txt"), "--output": str(output), **SMALL
    }  # fmt: skip


def run(given: dict[str, str], *flags: str) -> tuple[int, str]:
    return commands.run(cache_teacher, given, *flags)


def cached_in(output: Path, folder: Path) -> Path:
    """By one process."""
    torch.set_num_threads(1)
    code, printed = run(options(folder, output))
    assert code == 0, printed
    return output
