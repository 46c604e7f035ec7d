"""Which token of a teacher is which of the student: two vocabularies that have some of their tokens in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Columns of two vocabularies, sorted into those that both have and the rest of each. Made by `of`, once.

    student_ids, teacher_ids: [K], the columns of the same tokens. student_rest, teacher_rest: the other columns.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_rest: Tensor
    teacher_rest: Tensor

    @classmethod
    def of(cls, vocab_map: Tensor, student_size: int) -> VocabularyMap:
        """From the student's column of each of the teacher's: [V_teacher] integers, −1 for none.

        Waits for the device, to count the columns: once, not in every step.

        Raises ValueError where a column is not the student's, or is there twice; TypeError where it is no integer.

        >>> found = VocabularyMap.of(torch.tensor([2, -1, 0]), student_size=4)
        >>> found.teacher_ids.tolist(), found.student_ids.tolist(), found.student_rest.tolist()
        ([0, 2], [2, 0], [1, 3])
        """
        if vocab_map.is_floating_point() or vocab_map.dtype == torch.bool:
            raise TypeError(f"VocabularyMap: vocab_map has dtype {vocab_map.dtype}; expected integers")
        if vocab_map.dim() != 1:
            raise ValueError(f"VocabularyMap: vocab_map has shape {list(vocab_map.shape)}; expected [V_teacher]")
        vocab_map = vocab_map.long()
        mapped = vocab_map >= 0
        student_ids = vocab_map[mapped]
        if ((vocab_map < -1) | (vocab_map >= student_size)).any():
            raise ValueError(
                f"VocabularyMap: vocab_map has values from {vocab_map.min()} to {vocab_map.max()}; expected -1 to "
                f"{student_size - 1}, for the student has {student_size} columns"
            )
        times = torch.bincount(student_ids, minlength=student_size)
        if (times > 1).any():
            twice = int((times > 1).nonzero()[0, 0])
            raise ValueError(f"VocabularyMap: column {twice} of the student is there {times[twice]} times; expected 1")
        return cls(student_ids, mapped.nonzero()[:, 0], (times == 0).nonzero()[:, 0], (~mapped).nonzero()[:, 0])

    @property
    def student_size(self) -> int:
        """How many columns the student's logits have."""
        return self.student_ids.numel() + self.student_rest.numel()

    @property
    def teacher_size(self) -> int:
        """How many columns the teacher's logits have."""
        return self.teacher_ids.numel() + self.teacher_rest.numel()

    def to(self, device: torch.device | str) -> VocabularyMap:
        """The same on another device; itself where it is there already."""
        return VocabularyMap(*(x.to(device) for x in vars(self).values()))


def vocabulary_map(
    vocab: Mapping[str, int], teacher_vocab: Mapping[str, int], *, teacher_size: int | None = None
) -> Tensor:
    """The student's id of each of the teacher's tokens, by their text: [V_teacher], −1 for what the student has not.

    Args: vocab, teacher_vocab: token -> id, as `tokenizer.get_vocab()` has it. The texts have to be written alike: byte
    level and SentencePiece tokenizers mark spaces differently. teacher_size: how many columns the teacher's logits
    have; default: up to its largest id.

    Raises ValueError for a teacher_size that leaves out a token.

    >>> vocabulary_map({"a": 0, "b": 1}, {"b": 0, "c": 1, "a": 2}, teacher_size=4)
    tensor([ 1, -1,  0, -1])
    """
    needed = max(teacher_vocab.values(), default=-1) + 1
    size = needed if teacher_size is None else teacher_size
    if size < needed:
        raise ValueError(f"vocabulary_map: teacher_size is {teacher_size}; expected {needed} or more, for its ids")
    columns = [-1] * size
    for token, column in teacher_vocab.items():
        columns[column] = vocab.get(token, -1)
    return torch.tensor(columns, dtype=torch.long)


def mapped_columns(where: str, vocab_map: Tensor | VocabularyMap, logits: Tensor, teacher: Tensor) -> VocabularyMap:
    """The map that a function was given, for these logits [*, V] and [*, V_teacher], on their device."""
    given = vocab_map if isinstance(vocab_map, VocabularyMap) else VocabularyMap.of(vocab_map, logits.shape[-1])
    for name, x, size in (("logits", logits, given.student_size), ("teacher_logits", teacher, given.teacher_size)):
        if x.shape[-1] != size:
            raise ValueError(f"{where}: {name} has {x.shape[-1]} columns; expected {size}, as vocab_map has them")
    return given.to(logits.device)
