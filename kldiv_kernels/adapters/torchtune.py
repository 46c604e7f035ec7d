r"""The distillation losses of torchtune 0.6.1 under its names, for the configuration of its recipes. It is not needed.

    kd_loss:
      _component_: kldiv_kernels.adapters.torchtune.ForwardKLWithChunkedOutputLoss

With p the teacher's and q the student's probabilities, over the tokens whose label is not `ignore_index`:

    ForwardKLLoss     KL(p‖q) = Σ p (log p − log q)
    ReverseKLLoss     KL(q‖p) = Σ q (log q − log p)
    SymmetricKLLoss   w·KL(p‖q) + (1−w)·KL(q‖p), w = sym_kd_ratio

`...WithChunkedOutputLoss` take lists of logits, chunks of the sequence, and are the mean over the tokens of all chunks.

Loss and gradient come out of one read of the logits, without a copy in float32; SymmetricKLLoss reads them twice unless
w is 0, ½ or 1. No function waits for the device.

What differs from torchtune:

- The forward KL is the divergence: 0 where student and teacher agree. torchtune's is the cross-entropy −Σ p log q,
  which is larger by the teacher's entropy. The gradients are the same.
- A token that the teacher has and the student excludes by a logit of −inf makes the forward KL infinite, and the other
  way round the reverse KL. torchtune leaves such a column out of the sum.
- Without a token that counts every loss is 0 with a gradient of 0. torchtune's is a constant that has no `backward`,
  and the chunked reverse and symmetric losses are NaN. What stands in a row that does not count is never looked at.
- Chunks whose lengths are not those of the labels are an error; torchtune pairs them as they come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kldiv_kernels.losses import divergence_loss
from kldiv_kernels.stats import token_stats

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
]


class _Loss(nn.Module):
    """w·KL(p‖q) + (1−w)·KL(q‖p) of logits [rows, V]."""

    def __init__(self, forward_share: float, ignore_index: int) -> None:
        super().__init__()
        self._forward_share = forward_share
        self.ignore_index = ignore_index

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """A float32 scalar, in nats.

        Args:
            student_logits: [rows, V], or any shape before V. Gets the gradient.
            teacher_logits: like student_logits.
            labels: one for each row, in any shape: where it is `ignore_index`, the row does not count.
            normalize: True (default): the mean over the rows that count. False: their sum.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what is allowed.
        """
        valid = self._valid(labels)
        where = type(self).__name__
        if isinstance(student_logits, Tensor) and valid.numel() * student_logits.shape[-1] != student_logits.numel():
            raise ValueError(
                f"{where}: labels has {valid.numel()} entries; expected one for each row of student_logits "
                f"{list(student_logits.shape)}"
            )
        valid = valid.reshape(student_logits.shape[:-1])
        return self._total(student_logits, teacher_logits, valid, valid.sum().clamp_min(1) if normalize else None)

    def _valid(self, labels: Tensor) -> Tensor:
        if not isinstance(labels, Tensor):
            raise TypeError(f"{type(self).__name__}: labels is {type(labels).__name__}; expected a torch.Tensor")
        return labels != self.ignore_index

    def _total(self, student: Tensor, teacher: Tensor, valid: Tensor, count: Tensor | None) -> Tensor:
        """The sum over the rows that count, divided by `count`."""
        share = self._forward_share
        one_read = {1.0: "forward_kl", 0.0: "reverse_kl", 0.5: "jeffreys"}.get(share)
        if one_read is not None:
            reduction = "sum" if count is None else "mean"
            loss = divergence_loss(student, teacher, one_read, mask=valid, normalizer=count, reduction=reduction)  # type: ignore[arg-type]
            return loss / 2 if one_read == "jeffreys" else loss
        stats = token_stats(student, teacher, stats=("forward_kl", "reverse_kl"), mask=valid)
        total = (share * stats.forward_kl + (1 - share) * stats.reverse_kl).sum()
        return total if count is None else total / count


class _ChunkedLoss(_Loss):
    """The same of lists of chunks [batch, tokens of the chunk, V], and labels [batch, tokens]."""

    def __init__(self, num_output_chunks: int, forward_share: float, ignore_index: int) -> None:
        super().__init__(forward_share, ignore_index)
        # torchtune's recipes cut the sequence by it.
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]
        self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor
    ) -> Tensor:
        """A float32 scalar, in nats: the mean over the tokens that count, of all chunks.

        Args:
            student_logits: chunks [batch, tokens of the chunk, V] of the sequence, in order. Get the gradient.
            teacher_logits: like student_logits.
            labels: [batch, tokens]: where it is `ignore_index`, the token does not count.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what is allowed.
        """
        where = type(self).__name__
        valid = self._valid(labels)
        if valid.dim() != 2:
            raise ValueError(f"{where}: labels has shape {list(labels.shape)}; expected [batch, tokens]")
        for name, chunks in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            if isinstance(chunks, Tensor) or not all(isinstance(x, Tensor) and x.dim() == 3 for x in chunks):
                raise TypeError(f"{where}: {name} is {type(chunks).__name__}; expected a list of [batch, tokens, V]")
            tokens = sum(x.shape[1] for x in chunks)
            if tokens != valid.shape[1]:
                raise ValueError(f"{where}: the chunks of {name} have {tokens} tokens; expected {valid.shape[1]}")
        count = valid.sum().clamp_min(1)
        parts = torch.split(valid, [x.shape[1] for x in student_logits], dim=1)
        losses = [self._total(*chunk, count) for chunk in zip(student_logits, teacher_logits, parts, strict=True)]
        return sum(losses[1:], start=losses[0])


class ForwardKLLoss(_Loss):
    """KL(p‖q), the mean over the rows whose label is not `ignore_index`.

    >>> teacher = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2).log()
    >>> loss = ForwardKLLoss()(torch.zeros(2, 4), teacher, torch.tensor([1, -100]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(1.0, ignore_index)


class ReverseKLLoss(_Loss):
    """KL(q‖p), the mean over the rows whose label is not `ignore_index`.

    >>> student = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2).log()
    >>> loss = ReverseKLLoss()(student, torch.zeros(2, 4), torch.tensor([1, -100]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(0.0, ignore_index)


class SymmetricKLLoss(_Loss):
    """w·KL(p‖q) + (1−w)·KL(q‖p) with w = sym_kd_ratio, the mean over the rows whose label is not `ignore_index`.

    >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    >>> round(SymmetricKLLoss(0.5)(student, teacher, torch.tensor([1])).item(), 4)  # tanh ½
    0.4621
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(_share("SymmetricKLLoss", sym_kd_ratio), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """`ForwardKLLoss` of chunks of the sequence.

    >>> student, teacher = torch.randn(2, 6, 32), torch.randn(2, 6, 32)
    >>> labels = torch.randint(0, 32, (2, 6))
    >>> chunked = ForwardKLWithChunkedOutputLoss(num_output_chunks=3)
    >>> loss = chunked(student.chunk(3, dim=1), teacher.chunk(3, dim=1), labels)
    >>> torch.allclose(loss, ForwardKLLoss()(student, teacher, labels))
    True
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 1.0, ignore_index)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """`ReverseKLLoss` of chunks of the sequence.

    >>> chunks = torch.randn(2, 6, 32).chunk(3, dim=1)
    >>> ReverseKLWithChunkedOutputLoss()(chunks, chunks, torch.ones(2, 6, dtype=torch.long)).item()
    0.0
    """

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, 0.0, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """`SymmetricKLLoss` of chunks of the sequence.

    >>> chunks = torch.randn(2, 6, 32).chunk(3, dim=1)
    >>> SymmetricKLWithChunkedOutputLoss()(chunks, chunks, torch.ones(2, 6, dtype=torch.long)).item()
    0.0
    """

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, _share("SymmetricKLWithChunkedOutputLoss", sym_kd_ratio), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


def _share(where: str, ratio: float) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f"{where}: sym_kd_ratio is {ratio!r}; expected a number between 0 and 1")
    return float(ratio)
