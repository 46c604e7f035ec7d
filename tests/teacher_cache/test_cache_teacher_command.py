"""`kldiv cache-teacher` from option to shard, on local folders, without the network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch
from cache_runs import BLOCK, K, cached_in, options, run, save_teacher_and_text
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kldiv_kernels.teacher_cache import TeacherCache, TeacherCacheWriter, shard
from kldiv_kernels.trainer import caching


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_teacher_and_text(folder)
    return folder


@pytest.fixture(scope="module")
def cached(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached_in(tmp_path_factory.mktemp("runs") / "cache", folder)


def expected(
    folder: Path, tokens: torch.Tensor, *, temperature: float = 1.0, columns: int = tiny.VOCAB
) -> torch.Tensor:
    """The teacher's log-probs [blocks, BLOCK - 1, columns], in float64 from its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    with torch.no_grad():
        logits = model(input_ids=tokens.long()).logits[:, :-1, :columns]
    return (logits.double() / temperature).log_softmax(-1)


def assert_is_top_k(cache: TeacherCache, logprobs: torch.Tensor, tolerance: float) -> None:
    values, ids = logprobs.topk(K)
    for number, sequence in enumerate(cache):
        assert sequence.positions.tolist() == list(range(BLOCK - 1))
        assert sequence.topk_ids.tolist() == ids[number].tolist()
        torch.testing.assert_close(sequence.topk_logprobs.double(), values[number], rtol=tolerance, atol=tolerance)


def tokens_of(cache: TeacherCache) -> torch.Tensor:
    return torch.stack([sequence.token_ids for sequence in cache])


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in [*output.glob("shard-*"), output / "cache.json"]}


def test_the_cache_holds_the_text_and_the_teachers_most_probable_tokens(folder: Path, cached: Path) -> None:
    cache = TeacherCache(cached, teacher=str(folder / "teacher"), vocab_size=tiny.VOCAB, k=K, temperature=1.0)
    text = AutoTokenizer.from_pretrained(cached)((folder / "text.txt").read_text())["input_ids"]
    assert tokens_of(cache).flatten().tolist() == text[: 18 * BLOCK]
    assert_is_top_k(cache, expected(folder, tokens_of(cache)), 1e-5)


def test_the_summary(folder: Path, cached: Path) -> None:
    code, printed = run(options(folder, cached), "--resume")
    assert code == 0, "a finished cache resumes to its summary"
    cache = TeacherCache(cached)
    mass = torch.stack([sequence.topk_logprobs.double().exp().sum(-1) for sequence in cache])
    assert f"tokens {18 * BLOCK}" in printed
    assert f"rows {18 * (BLOCK - 1)}" in printed
    assert f"shards {18 // 3}" in printed
    assert f"bytes {sum(path.stat().st_size for path in cached.glob('shard-*')):,} " in printed
    assert f"captured mass mean {mass.mean():.6f}, min {mass.min():.6f}" in printed
    code, printed = run(options(folder, cached))
    assert (code, "holds a run; pass --resume to continue it" in printed) == (2, True)


def test_a_full_disk_is_an_error_of_the_output_and_the_run_goes_on(
    folder: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, save = options(folder, tmp_path / "cache"), shard.save_file

    def full_from_the_third_shard(arrays: Any, path: Path, metadata: Any) -> None:
        save(arrays, path, metadata)
        if "00002" in path.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(shard, "save_file", full_from_the_third_shard)
        code, printed = run(given)
    assert (code, "for --output: No space left on device: shard-00002.safetensors, " in printed) == (2, True), printed
    assert sorted(path.name for path in (tmp_path / "cache").glob("*shard*")) == [
        f"shard-0000{number}.safetensors" for number in range(2)
    ]
    assert run(given, "--resume")[0] == 0
    assert shards(tmp_path / "cache") == shards(cached)


def test_temperature_padding_columns_and_float16(folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    tiny.llama(2, hidden=24, vocab=tiny.VOCAB + 8).save_pretrained(wide / "teacher")
    tiny.word_tokenizer().save_pretrained(wide / "teacher")
    given = options(folder, tmp_path / "cache") | {"--teacher": str(wide / "teacher")}
    code, printed = run(given | {"--temperature": "2", "--vocab-size": str(tiny.VOCAB), "--dtype": "fp16"})
    assert code == 0, printed
    cache = TeacherCache(tmp_path / "cache", temperature=2.0, vocab_size=tiny.VOCAB)
    assert cache[0].topk_logprobs.dtype == torch.float16
    assert_is_top_k(cache, expected(wide, tokens_of(cache), temperature=2.0, columns=tiny.VOCAB), 2**-11)


def test_a_teacher_in_bfloat16(folder: Path, cached: Path, tmp_path: Path) -> None:
    code, printed = run(options(folder, tmp_path / "cache"), "--bf16")
    assert code == 0, printed
    rounded, exact = (torch.stack([s.topk_logprobs for s in TeacherCache(p)]) for p in (tmp_path / "cache", cached))
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.2)
    assert not torch.equal(rounded, exact)


# Of the six blocks that the killed run has appended, the first three are in a shard.
KILLED = """
import os, signal, sys
from kldiv_kernels.teacher_cache import parallel
write = parallel.write_shard
def killed(folder, info, number, sequences):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(folder, info, number, sequences)
parallel.write_shard = killed
sys.argv[0] = "kldiv"
from kldiv_kernels.cli import main
main()
"""


def test_killed_and_resumed_gives_the_same_bytes(
    folder: Path, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cache"
    given = options(folder, output)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "cache-teacher", *(word for pair in given.items() for word in pair)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in output.glob("shard-*")] == ["shard-00000.safetensors"]
    shutil.copytree(output, tmp_path / "other data")
    shutil.copytree(output, tmp_path / "other teacher")
    shutil.copytree(output, tmp_path / "damaged")

    with TeacherCacheWriter(tmp_path / "busy", TeacherCache(output, partial=True).info):
        shutil.copy(output / "options.json", tmp_path / "busy")
        code, printed = run(given | {"--output": str(tmp_path / "busy")}, "--resume")
    assert (code, "for --output: another writer has the cache in" in printed) == (2, True), printed

    batches = []
    top_rows = caching.top_rows
    monkeypatch.setattr(caching, "top_rows", lambda model, ids, **o: batches.append(ids) or top_rows(model, ids, **o))
    code, printed = run(given, "--resume")
    assert code == 0, printed
    assert shards(output) == shards(cached)
    # The same batches as from the start, so that a teacher whose rows depend on their batch gives the same.
    assert [len(ids) for ids in batches] == [4, 4, 4, 4, 2]
    assert torch.equal(torch.cat(batches), tokens_of(TeacherCache(cached)))

    code, printed = run(given | {"--k": "7"}, "--resume")
    assert (code, "--resume: --k is 7, but the run in" in printed) == (2, True), printed
    text = folder / "text.txt"
    kept = text.read_text()
    try:
        text.write_text(tiny.words(18 * BLOCK + 5, seed=1))
        code, printed = run(given | {"--output": str(tmp_path / "other data")}, "--resume")
    finally:
        text.write_text(kept)
    assert (code, "for --data: data: block 0 is not what the cache has" in printed) == (2, True), printed
    shard = tmp_path / "damaged/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    code, printed = run(given | {"--output": str(tmp_path / "damaged")}, "--resume")
    assert (code, "for --output: " in printed, "is corrupt: its checksum" in printed) == (2, True, True), printed
    # The same path with other weights.
    teacher = folder / "teacher/model.safetensors"
    weights = teacher.read_bytes()
    try:
        tiny.llama(3, hidden=24).save_pretrained(folder / "teacher")
        code, printed = run(given | {"--output": str(tmp_path / "other teacher")}, "--resume")
    finally:
        teacher.write_bytes(weights)
    assert (code, "for --teacher: info: weights is 'crc32:" in printed) == (2, True), printed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--k": "0"}, "for '--k': "),
        ({"--k": "65"}, "for --k: 65 is above the 64 columns of the teacher"),
        ({"--dtype": "bf16"}, "for --dtype: 'bf16'; expected fp32 or fp16"),
        ({"--temperature": "0"}, "for --temperature: 0.0 is not above 0"),
        ({"--vocab-size": "65"}, "for --vocab-size: vocab_size is 65; expected 1 to 64"),
        ({"--vocab-size": "32"}, "for --vocab-size: 32 is below the tokenizer's 64 tokens"),
        ({"--block-size": "4096"}, "for --data: the text has fewer than 4096 tokens"),
        ({"--teacher": "./nowhere"}, "for --teacher: ./nowhere does not exist"),
        ({"--data": "missing.txt"}, "for --data: missing.txt does not exist"),
        ({"--text-column": "body"}, "has no column 'body'; it has text"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    wrong: dict[str, str], message: str, folder: Path, tmp_path: Path
) -> None:
    code, printed = run(options(folder, tmp_path / "cache") | wrong)
    assert (code, message in printed) == (2, True), printed
    assert not (tmp_path / "cache").exists()


def test_a_teacher_without_a_number_is_named(folder: Path, tmp_path: Path) -> None:
    model = tiny.llama(2, hidden=24)
    model.get_input_embeddings().weight.data[7] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    tiny.word_tokenizer().save_pretrained(tmp_path / "teacher")
    code, printed = run(options(folder, tmp_path / "cache") | {"--teacher": str(tmp_path / "teacher")})
    assert (code, "for --teacher: append: topk_logprobs[" in printed, "is NaN (sequence 0)" in printed) == (
        2,
        True,
        True,
    )
