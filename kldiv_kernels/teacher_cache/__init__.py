"""A teacher on disk: for each position of each sequence the ids and log-probabilities of K tokens.

    cache/
        cache.json                  whose log-probs these are, and, once the writer finished, how many
        shard-00000.safetensors     whole sequences, at most `shard_rows` rows unless one sequence alone is longer
        shard-00001.safetensors

A row is what the teacher says after one position of a sequence: row p is its distribution of token p + 1, the same as
row p of a causal model's logits. A shard holds, one sequence after another:

    token_ids      [tokens] int32            the input of the teacher
    positions      [rows] int32              of each row in its sequence, increasing
    topk_ids       [rows, K] int32           -1 pads
    topk_logprobs  [rows, K] float32/16      raw, not renormalised over the K; -inf where padded or impossible
    token_offsets, row_offsets  [sequences + 1] int64

    where `CacheInfo.hidden_size` is H, what `kk.teacher_projection` says of the same rows:
    projection     [rows, H] float32
    projection_offset, projection_entropy  [rows] float32

and in its header what `cache.json` says, its number, its counts and a CRC-32 of all of that. Shards are plain
safetensors: random access by memory map, and any language reads them. (Parquet would pack ids smaller but be decoded
page by page; a loss needs rows as they are.)

Shards are read in the order of their numbers. A cache that several processes began may lack one between others, and
is refused until `ParallelCacheWriter` has written it.

Float16 halves the log-probs and rounds them by up to 2⁻¹¹ of their size, so that a row may sum to slightly more
than 1. Needs the extra `kldiv_kernels[cache]`.
"""

from __future__ import annotations

from kldiv_kernels.extras import needed_by

with needed_by(__name__):
    from kldiv_kernels.teacher_cache.adapters import Rows, from_prompt_logprobs, from_rows
    from kldiv_kernels.teacher_cache.info import CacheInfo
    from kldiv_kernels.teacher_cache.parallel import ParallelCacheWriter
    from kldiv_kernels.teacher_cache.reader import CachedSequence, TeacherCache
    from kldiv_kernels.teacher_cache.writer import TeacherCacheWriter

__all__ = [
    "CacheInfo",
    "CachedSequence",
    "ParallelCacheWriter",
    "Rows",
    "TeacherCache",
    "TeacherCacheWriter",
    "from_prompt_logprobs",
    "from_rows",
]
