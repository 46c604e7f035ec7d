"""A teacher cache as training data: the sequences are the text, the rows the teacher.

Read from memory-mapped shards, a sequence at a time: neither the cache nor a teacher is held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kldiv_kernels.distillation import IGNORED
from kldiv_kernels.teacher_cache import TeacherCache

# Causal models do not look at what comes after a token, and no padded position has a target: any id pads.
_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "topk_ids": -1, "topk_logprobs": -inf}


class CachedSequences(Dataset[dict[str, Tensor]]):
    """Sequences of a cache, by number, as `DistillationTrainer` reads them without a teacher:

        input_ids       [tokens] int64
        labels          [tokens] int64            unshifted; -100 where the cache has no row for the position before
        topk_ids        [tokens, K] int32         after each token; -1 where there is none
        topk_logprobs   [tokens, K] as stored     -inf where there is none

    A cache that has rows after the tokens of answers only trains on the answers only.

    Args:
        cache: opened with `check=False` where `cache.verify()` was called before; workers would check again.
        vocab_size: tokens and ids are below it. Default: that of the cache. A smaller one, for a student that has
            fewer columns than the teacher had, reads all of the cache once to see that it is so.
        numbers: of the sequences, in order. Default: all of them.

    Raises ValueError for a token or an id that is not below `vocab_size`.

    >>> import tempfile
    >>> from kldiv_kernels.teacher_cache import CacheInfo, TeacherCacheWriter
    >>> folder = tempfile.mkdtemp()
    >>> with TeacherCacheWriter(folder, CacheInfo(teacher="t", vocab_size=9, k=1)) as writer:
    ...     writer.append([3, 2, 7], [[4], [8]], torch.zeros(2, 1), positions=[1, 2])
    >>> row = CachedSequences(TeacherCache(folder))[0]
    >>> row["labels"].tolist(), row["topk_ids"].flatten().tolist()
    ([-100, -100, 7], [-1, 4, 8])
    """

    def __init__(
        self, cache: TeacherCache, *, vocab_size: int | None = None, numbers: Sequence[int] | None = None
    ) -> None:
        self.cache = cache
        self.numbers = range(len(cache)) if numbers is None else numbers
        self.vocab_size = cache.info.vocab_size if vocab_size is None else vocab_size
        if self.vocab_size < cache.info.vocab_size:
            self._check_ids()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequence = self.cache[self.numbers[index]]
        tokens, positions = sequence.token_ids.long(), sequence.positions.long()
        shape = (len(tokens), self.cache.info.k)
        ids = torch.full(shape, -1, dtype=sequence.topk_ids.dtype)
        logprobs = torch.full(shape, -inf, dtype=sequence.topk_logprobs.dtype)
        ids[positions], logprobs[positions] = sequence.topk_ids, sequence.topk_logprobs
        labels = torch.full_like(tokens, IGNORED)
        labels[1:] = torch.where((ids[:-1] >= 0).any(dim=-1), tokens[1:], IGNORED)
        return {"input_ids": tokens, "labels": labels, "topk_ids": ids, "topk_logprobs": logprobs}

    def split(self, held_out: float, seed: int) -> CachedSplit:
        """`held_out` of the sequences apart, at least one: neighbours, from a place that `seed` chooses.

        Neighbours are often of one document: at most two documents then stand on both sides.
        """
        if len(self) < 2:
            raise ValueError(
                f"{self.cache.folder} has {len(self)} sequence(s); expected at least 2, one of them held out"
            )
        count = min(len(self) - 1, max(1, round(held_out * len(self))))
        generator = torch.Generator().manual_seed(seed)
        first = int(torch.randint(len(self) - count + 1, (), generator=generator))
        chosen = list(self.numbers)
        return CachedSplit(self._of(chosen[:first] + chosen[first + count :]), self._of(chosen[first : first + count]))

    def check_for(self, *, vocab_size: int, temperature: float, positions: int | None) -> None:
        """Raises ValueError where a student cannot be trained on these.

        Args:
            vocab_size: columns of the student's softmax.
            temperature: of the loss.
            positions: that the student has; None where any number will do.
        """
        folder, info = self.cache.folder, self.cache.info
        if temperature != info.temperature:
            raise ValueError(
                f"temperature is {temperature}; the log-probs in {folder} were taken at {info.temperature}"
            )
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{folder} has ids up to {self.vocab_size - 1}; the student has {vocab_size} columns (pass vocab_size= "
                "to CachedSequences if the ids are in fact below that)"
            )
        if positions is not None:
            lengths = self.cache.lengths
            too_long = next((number for number in self.numbers if lengths[number] > positions), None)
            if too_long is not None:
                raise ValueError(
                    f"sequence {too_long} of {folder} has {lengths[too_long]} tokens; the student has {positions} "
                    "positions"
                )

    def _of(self, numbers: Sequence[int]) -> CachedSequences:
        # The ids of all of them were checked.
        part = CachedSequences(self.cache, numbers=numbers)
        part.vocab_size = self.vocab_size
        return part

    def _check_ids(self) -> None:
        for number in self.numbers:
            sequence = self.cache[number]
            for what, ids in (("token", sequence.token_ids), ("top-k id", sequence.topk_ids)):
                if ids.numel() and int(ids.max()) >= self.vocab_size:
                    raise ValueError(
                        f"sequence {number} of {self.cache.folder} has the {what} {int(ids.max())}; expected below "
                        f"vocab_size = {self.vocab_size}"
                    )


class CachedSplit(NamedTuple):
    train: CachedSequences
    held_out: CachedSequences


def collate(sequences: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Sequences of any lengths as one batch, padded on the right: [batch, tokens] and [batch, tokens, K].

    Takes tensors or lists of input_ids, labels, topk_ids and topk_logprobs, and makes an attention_mask where there is
    none. Raises ValueError for another column, whose padding it does not know.
    """
    columns = list(sequences[0])
    unknown = [name for name in columns if name not in _PADDING]
    if unknown:
        raise ValueError(f"collate: unknown column {unknown[0]!r}; expected {', '.join(_PADDING)}")
    batch = {
        name: pad_sequence([torch.as_tensor(row[name]) for row in sequences], batch_first=True, padding_value=padding)
        for name, padding in _PADDING.items()
        if name in columns
    }
    if "attention_mask" not in batch:
        lengths = torch.tensor([len(row["input_ids"]) for row in sequences])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch
