r"""NeMo-RL's distillation on the k likeliest tokens of the teacher, from logits spread over a group.

p are the teacher's and q the student's probabilities of the k tokens of a row. Both are renormalised over these; with
`zero_outside_topk` the student's are those of its whole row, and the teacher has log-probability −100 elsewhere:

    forward   Σ_k p (log p − log q)
    reverse   Σ_k q (log q − log p)  [+ Σ_rest q log q + 100·Σ_rest q]
    mixed     w·forward + (1 − w)·reverse

Source: NeMo-RL's `DistillationLossFn` (`algorithms/loss/loss_functions.py`) and what prepares its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kldiv_kernels.adapters.config import read
from kldiv_kernels.adapters.nemo_rl import context
from kldiv_kernels.adapters.nemo_rl.arguments import columns, local, of_rank
from kldiv_kernels.parallel import Group
from kldiv_kernels.stats import token_stats

_INTERFACES = "nemo_rl.algorithms.loss.interfaces"
_KINDS = ("forward", "reverse", "mixed")
# What stands for the teacher's log-probability of a token outside of its top k.
_OUTSIDE = -100.0
# Added to the number of tokens, by NeMo-RL's mean.
_EPSILON = 1e-8


def get_distillation_topk_logprobs_from_logits(
    student_logits: Tensor,
    teacher_topk_logits: Tensor,
    teacher_topk_indices: Tensor,
    zero_outside_topk: bool,
    calculate_entropy: bool,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Group | None = None,
    context_parallel_group: Group | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of both sides on the teacher's top k, and Σ q log q of the student's whole rows.

    Args:
        student_logits: [batch, tokens / cp, *]: columns of rank `vocab_parallel_rank` of `vocab_parallel_group`, or
            else a DTensor that the dimension "tp" of its mesh splits by columns, or else whole rows.
        teacher_topk_logits, teacher_topk_indices: [batch, tokens, k], of whole sequences; ids of the whole vocabulary.
        zero_outside_topk: True: the student's log-probabilities are those of its whole rows. False: renormalised over
            the k tokens.
        calculate_entropy: with `zero_outside_topk`, whether Σ q log q is returned too. Without it there is none.
        context_parallel_group: see `from_parallel_logits_to_logprobs`; of a DTensor, that of the dimension "cp".

    Returns:
        Student [batch, tokens − 1, k] with gradient, teacher [batch, tokens − 1, k] without, and [batch, tokens − 1] or
        None; float32, in nats, the same on all ranks.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed.

    >>> student, ids = torch.zeros(1, 2, 4), torch.tensor([[[2, 0], [0, 1]]])
    >>> q, p, sums = get_distillation_topk_logprobs_from_logits(student, torch.zeros(1, 2, 2), ids, True, True)
    >>> q.exp(), p.exp(), round(sums.item(), 4)
    (tensor([[[0.2500, 0.2500]]]), tensor([[[0.5000, 0.5000]]]), -1.3863)
    """
    where = "get_distillation_topk_logprobs_from_logits"
    if calculate_entropy and not zero_outside_topk:
        raise ValueError(
            f"{where}: calculate_entropy is True beside zero_outside_topk=False; expected False: there is no rest of "
            f"the vocabulary whose entropy could count"
        )
    ids = teacher_topk_indices.to(student_logits.device)
    if ids.dim() != 3 or ids.shape[-1] < 1 or teacher_topk_logits.shape != ids.shape:
        raise ValueError(
            f"{where}: teacher_topk_logits and teacher_topk_indices have shapes {list(teacher_topk_logits.shape)} and "
            f"{list(ids.shape)}; expected [batch, tokens, k] of both, k from 1"
        )
    of: dict[str, Any] = {}
    group = context_parallel_group
    if vocab_parallel_group is not None:
        first = of_rank(where, vocab_parallel_rank, vocab_parallel_group) * student_logits.shape[-1]
        end = first + student_logits.shape[-1]
        of = columns(where, student_logits, first, end, vocab_parallel_group, None)
    elif isinstance(student_logits, DTensor):
        mesh = student_logits.device_mesh
        group = mesh.get_group("cp") if "cp" in (mesh.mesh_dim_names or ()) else None
        student_logits, of = local(where, student_logits)

    ranks, tokens = context.size_of(group), student_logits.shape[1]
    length = ids.shape[1]
    if length > tokens * ranks:
        raise ValueError(f"{where}: teacher_topk_indices has {length} tokens; expected {tokens * ranks} at most")
    ids = torch.nn.functional.pad(ids, (0, 0, 0, tokens * ranks - length))
    # The last token predicts nothing, and those behind it are padding.
    counts = (torch.arange(tokens * ranks, device=ids.device) < length - 1).expand(ids.shape[:-1])
    table = None
    if group is not None and ranks > 1:
        table = context.balanced(torch.tensor([0, tokens * ranks], device=ids.device), tokens, ranks)
        ids, counts = (context.of_this_rank(x, table, group) for x in (ids, counts))
    stats = ("logprob", "entropy") if calculate_entropy else ("logprob",)
    found = token_stats(student_logits, labels=ids, mask=counts, stats=stats, **of)
    parts = [x if table is None or group is None else context.of_all_ranks(x, table, group) for x in found.values()]
    student = parts[0][:, : length - 1]
    teacher = teacher_topk_logits[:, :-1].detach().to(student.device, student.dtype).log_softmax(-1)
    return (
        student if zero_outside_topk else student.log_softmax(-1),
        teacher,
        -parts[1][:, : length - 1] if calculate_entropy else None,
    )


class DistillationLossFn:
    """NeMo-RL's loss of this name: the divergence on the teacher's top k, averaged over tokens.

    Args:
        cfg: its DistillationLossConfig, or a mapping: `kl_type` "forward", "reverse" or "mixed" (default);
            `mixed_kl_weight` (default 0.5), the share of the forward one in "mixed"; `zero_outside_topk` (default
            False), as of `get_distillation_topk_logprobs_from_logits`.

    Raises: ValueError: naming the option, what it was and what is allowed.

    >>> loss = DistillationLossFn({"kl_type": "forward"})
    >>> student, teacher = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    >>> data = {"input_ids": torch.zeros(1, 2), "token_mask": torch.ones(1, 2), "sample_mask": torch.ones(1)}
    >>> value, metrics = loss(student, teacher, None, data, torch.tensor(1), torch.tensor(1))
    >>> round(value.item(), 4), metrics["num_valid_samples"]
    (0.1308, 1)
    """

    def __init__(self, cfg: Any = None) -> None:
        self.kl_type = read(cfg, "kl_type", "mixed")
        self.mixed_kl_weight = read(cfg, "mixed_kl_weight", 0.5)
        self.zero_outside_topk = bool(read(cfg, "zero_outside_topk", False))
        if self.kl_type not in _KINDS:
            raise ValueError(
                f"DistillationLossFn: cfg.kl_type is {self.kl_type!r}; expected one of {', '.join(_KINDS)}"
            )
        if not 0 <= self.mixed_kl_weight <= 1:
            raise ValueError(f"DistillationLossFn: cfg.mixed_kl_weight is {self.mixed_kl_weight}; expected 0 to 1")

    @property
    def loss_type(self) -> Any:
        """NeMo-RL's name of a mean over tokens. ImportError without NeMo-RL."""
        return import_module(_INTERFACES).LossType.TOKEN_LEVEL

    @property
    def input_type(self) -> Any:
        """NeMo-RL's name of what a call is given. ImportError without NeMo-RL."""
        return import_module(_INTERFACES).LossInputType.DISTILLATION

    def __call__(
        self,
        student_topk_logprobs: Tensor,
        teacher_topk_logprobs: Tensor,
        H_all: Tensor | None,  # noqa: N803  (NeMo-RL gives it by this name)
        data: Mapping[str, Any],
        global_valid_seqs: Tensor | None = None,
        global_valid_toks: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """(loss, metrics).

        Args:
            student_topk_logprobs, teacher_topk_logprobs, H_all: what `get_distillation_topk_logprobs_from_logits`
                returns. H_all: Σ q log q; needed with `zero_outside_topk`, unless `kl_type` is "forward".
            data: NeMo-RL's: `input_ids` [batch, tokens]; `token_mask` [batch, tokens] and `sample_mask` [batch], of
                which a token's weight is the product. Without masks all tokens count the same.
            global_valid_seqs: not used by a mean over tokens.
            global_valid_toks: what the sum is divided by. Default: the sum of the weights.
        """
        where = "DistillationLossFn"
        if teacher_topk_logprobs.shape != student_topk_logprobs.shape:
            raise ValueError(
                f"{where}: teacher_topk_logprobs has shape {list(teacher_topk_logprobs.shape)}; expected "
                f"{list(student_topk_logprobs.shape)} like student_topk_logprobs"
            )
        log_p, log_q, entropies = teacher_topk_logprobs, student_topk_logprobs, H_all
        of_the_rest = self.zero_outside_topk and self.kl_type != "forward"
        if of_the_rest and entropies is None:
            raise ValueError(
                f"{where}: H_all is None beside zero_outside_topk and kl_type {self.kl_type!r}; expected Σ q log q per "
                f"token"
            )
        weight = None
        if "token_mask" in data and "sample_mask" in data:
            weight = data["token_mask"][:, 1:][:, : log_q.shape[1]] * data["sample_mask"][:, None]
            counts = weight != 0
            log_p, log_q = (torch.where(counts[..., None], x, 0.0) for x in (log_p, log_q))
            entropies = None if entropies is None else torch.where(counts, entropies, 0.0)
        share = {"forward": 1.0, "reverse": 0.0, "mixed": self.mixed_kl_weight}[self.kl_type]
        per_token = log_q.new_zeros(log_q.shape[:-1])
        if self.kl_type != "reverse":
            per_token = per_token + share * _divergence(log_p, log_q)
        if self.kl_type != "forward":
            per_token = per_token + (1 - share) * _divergence(log_q, log_p)
        if of_the_rest and entropies is not None:
            per_token = per_token + (1 - share) * _of_the_rest(log_q, entropies)
        if weight is None:
            loss = per_token.mean()
        else:
            count = weight.sum() if global_valid_toks is None else global_valid_toks
            loss = (per_token * weight).sum() / (count + _EPSILON)
        # NeMo-RL's workers send metrics to a driver that may have no GPU: they have to be Python's numbers.
        return loss, {"loss": loss.item(), "num_valid_samples": data["input_ids"].shape[0]}


def _of_the_rest(log_q: Tensor, entropies: Tensor) -> Tensor:
    """Σ_rest q (log q + 100)"""
    return entropies - _divergence(log_q, torch.zeros_like(log_q)) - _OUTSIDE * (1 - log_q.exp().sum(-1))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ_k p (log p − log q); tokens without mass add 0, also in backward."""
    p = log_p.exp()
    there = p > 0
    log_p, log_q = (torch.where(there, x, 0.0) for x in (log_p, log_q))
    return (torch.where(there, p, 0.0) * (log_p - log_q)).sum(-1)
