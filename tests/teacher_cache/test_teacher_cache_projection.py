"""A teacher's projection through a frozen head, stored beside its top-k, is the teacher of forward KL again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import kldiv_kernels as kk
from kldiv_kernels.linear import TeacherProjection
from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter

TOKENS, HIDDEN, VOCAB, K = 6, 8, 40, 3
INFO = CacheInfo("teacher", VOCAB, K, dtype="float16", hidden_size=HIDDEN, head="crc32:1", shard_rows=10)


def made(sequences: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TeacherProjection]:
    """Head, tokens [sequences, TOKENS], teacher's logits and what the head sees of them."""
    generator = torch.Generator().manual_seed(3)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    tokens = torch.randint(0, VOCAB, (sequences, TOKENS), generator=generator)
    logits = 4 * torch.randn(sequences, TOKENS, VOCAB, generator=generator)
    return head, tokens, logits, kk.teacher_projection(kk.Head(head, torch.arange(VOCAB) / 9), logits)


def test_the_loss_from_a_cache_is_that_of_the_teacher(tmp_path: Path) -> None:
    head, tokens, logits, known = made(4)
    logprobs, ids = logits.log_softmax(-1).topk(K)
    single = TeacherProjection(known.projection[0], known.offset[0], known.entropy[0], VOCAB)
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        writer.append(tokens[0], ids[0], logprobs[0], projection=single)
        rest = TeacherProjection(known.projection[1:], known.offset[1:], known.entropy[1:], VOCAB)
        writer.append(tokens[1:], ids[1:], logprobs[1:], projection=rest)
    frozen, hidden = kk.Head(head, torch.arange(VOCAB) / 9), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    cache = TeacherCache(tmp_path, head="crc32:1")
    cache.verify()
    for number, sequence in enumerate(cache):
        loss = kk.linear_divergence_loss(hidden, frozen, kind="forward_kl", reference_projection=sequence.projection)
        wanted = kk.forward_kl(hidden @ head.T + torch.arange(VOCAB) / 9, logits[number])
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        found, expected = (torch.autograd.grad(value, hidden)[0] for value in (loss, wanted))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match="TeacherCache: head of the cache is 'crc32:1'; expected 'crc32:2'"):
        TeacherCache(tmp_path, head="crc32:2")


def test_a_cache_without_one_does_not_mention_it(tmp_path: Path) -> None:
    """Caches that were written before there were projections have the same bytes, checksums and all."""
    with TeacherCacheWriter(tmp_path, CacheInfo("t", VOCAB, 1)) as writer:
        writer.append([3, 2], [[2]], torch.zeros(1, 1))
    with safe_open(tmp_path / "shard-00000.safetensors", "pt") as file:
        described = str(file.metadata())
    assert "hidden_size" not in described + (tmp_path / "cache.json").read_text()
    assert "crc32:61cfcf41" in described
    assert TeacherCache(tmp_path)[0].projection is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": None}, r"projection is None, with hidden_size = 8 in info; expected one"),
        ({"vocab": 39}, r"projection is over 39 columns \(sequence 0\); expected vocab_size = 40"),
        ({"projection": torch.zeros(TOKENS, 7)}, r"projection has shape \[6, 7\] .*; expected \[6, 8\]"),
        ({"entropy": torch.zeros(5)}, r"projection_entropy has shape \[5\] .*; expected \[6\]"),
        ({"offset": torch.full((TOKENS,), torch.nan)}, r"projection_offset\[0\] is nan .*; expected finite"),
    ],
    ids=["none", "columns", "width", "rows", "nan"],
)
def test_a_wrong_projection_is_named_and_nothing_is_kept(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    parts = {"projection": torch.zeros(TOKENS, HIDDEN), "offset": torch.zeros(TOKENS), "entropy": torch.zeros(TOKENS)}
    vocab, given = changes.get("vocab", VOCAB), {**parts, **changes}
    given.pop("vocab", None)
    projection = None if given["projection"] is None else TeacherProjection(**given, vocab_size=vocab)
    writer = TeacherCacheWriter(tmp_path, INFO)
    with pytest.raises(ValueError, match=message):
        writer.append([1] * TOKENS, [[0, 1, 2]] * TOKENS, torch.full((TOKENS, K), -3.0), projection=projection)
    writer.finish()
    assert len(TeacherCache(tmp_path)) == 0


def test_one_that_nobody_asked_for(tmp_path: Path) -> None:
    writer = TeacherCacheWriter(tmp_path, CacheInfo("t", VOCAB, 1))
    with pytest.raises(ValueError, match="projection is given, with hidden_size = 0 in info; expected none"):
        writer.append([3], [[2]], torch.zeros(1, 1), projection=made(1)[3])
    with pytest.raises(ValueError, match="CacheInfo: head is 'x'; expected '' where hidden_size is 0"):
        CacheInfo("t", VOCAB, 1, head="x")
