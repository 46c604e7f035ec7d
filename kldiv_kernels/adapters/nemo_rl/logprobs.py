"""NeMo-RL's log-probabilities of the next tokens, from logits whose columns are spread over a group."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kldiv_kernels.adapters.nemo_rl import context
from kldiv_kernels.adapters.nemo_rl.arguments import columns, local, of_rank, served
from kldiv_kernels.parallel import Group
from kldiv_kernels.stats import selective_log_softmax

_NONE = -100


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Group,
    inference_only: bool = False,
    cp_group: Group | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """log softmax of the logits at t at the token t + 1, per token.

    Args:
        vocab_parallel_logits: [batch, tokens / cp, V / tp], columns [vocab_start_index, vocab_end_index) of the rows.
        target: [batch, tokens] token ids of the whole sequences, not shifted. Logits of more tokens are padding.
        tp_group: the process group that the columns are spread over.
        inference_only: True: without gradient.
        cp_group: the process group that the tokens are spread over, in Megatron's balanced order. In backward the
            gradients of all its ranks are summed, as in NeMo-RL. Default None: whole sequences.
        chunk_size: None, or tokens a chunk. No effect here, where no float32 copy of the logits is made. It keeps
            NeMo-RL's callers from making one.
        sampling_params: NeMo-RL's; top_k and top_p have to be off.
        vocab_size: columns of the whole vocabulary, where ranks have different numbers of them or the last are padding
            to be left out. NeMo-RL has no such argument. Default: as many on every rank.

    Returns:
        [batch, tokens − 1] float32, in nats, the same on all ranks.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what is allowed.
    """
    where = "from_parallel_logits_to_logprobs"
    served(where, chunk_size, sampling_params)
    of = columns(where, vocab_parallel_logits, vocab_start_index, vocab_end_index, tp_group, vocab_size)
    ranks, length = context.size_of(cp_group), target.shape[-1]
    here = vocab_parallel_logits.shape[1]
    labels = _padded(where, _next(target), here * ranks)
    with torch.no_grad() if inference_only else nullcontext():
        if cp_group is None or ranks == 1:
            return selective_log_softmax(vocab_parallel_logits, labels, **of)[:, : length - 1]
        table = context.balanced(torch.tensor([0, here * ranks], device=target.device), here, ranks)
        found = selective_log_softmax(vocab_parallel_logits, context.of_this_rank(labels, table, cp_group), **of)
        return context.of_all_ranks(found, table, cp_group)[:, : length - 1]


def from_parallel_logits_to_logprobs_packed_sequences(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    cu_seqlens_padded: Tensor,
    unpacked_seqlen: int,
    vocab_start_index: int,
    vocab_end_index: int,
    group: Group,
    inference_only: bool = False,
    cp_group: Group | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    target_is_pre_rolled: bool = False,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """`from_parallel_logits_to_logprobs` of sequences that follow each other in one row.

    Args:
        vocab_parallel_logits: [1, T / cp, V / tp]; T = cu_seqlens_padded[-1].
        target: [1, T] token ids, not shifted; or with `target_is_pre_rolled` [1, T / cp], shifted inside of each
            sequence and of this rank's tokens alone.
        cu_seqlens_padded: [batch + 1]; sequence i has tokens [cu_seqlens_padded[i], cu_seqlens_padded[i + 1]).
        unpacked_seqlen: tokens of a row of the result, and 1.
        group: the process group that the columns are spread over.
        the others: see `from_parallel_logits_to_logprobs`.

    Returns:
        [batch, unpacked_seqlen − 1] float32, in nats; 0 behind the end of a sequence. Nothing waits for the device.
    """
    where = "from_parallel_logits_to_logprobs_packed_sequences"
    served(where, chunk_size, sampling_params)
    of = columns(where, vocab_parallel_logits, vocab_start_index, vocab_end_index, group, vocab_size)
    ranks, here = context.size_of(cp_group), vocab_parallel_logits.shape[1]
    bounds = cu_seqlens_padded.to(vocab_parallel_logits.device).long()
    table = context.balanced(bounds, here, ranks)
    labels = target
    if not target_is_pre_rolled:
        labels = target.roll(-1, dims=-1)
        labels[:, bounds[1:] - 1] = _NONE
        labels = _padded(where, labels, here * ranks)
        labels = labels if cp_group is None or ranks == 1 else context.of_this_rank(labels, table, cp_group)
    with torch.no_grad() if inference_only else nullcontext():
        found = selective_log_softmax(vocab_parallel_logits, labels, **of)
        if cp_group is not None and ranks > 1:
            found = context.of_all_ranks(found, table, cp_group)
        offsets = torch.arange(unpacked_seqlen - 1, device=bounds.device)
        at = (bounds[:-1, None] + offsets).clamp_max(found.shape[1] - 1)
        return torch.where(offsets < bounds.diff()[:, None] - 1, found[0, at], 0.0)


def dtensor_from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Group,
    inference_only: bool = False,
    seq_index: Tensor | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """`from_parallel_logits_to_logprobs` whose context parallelism is that of a DTensor.

    Args:
        target: [batch, tokens]; a DTensor whose mesh has a dimension "cp" is split over its tokens there, in the order
            of `seq_index`.
        seq_index: [tokens], the number in its sequence of each token of that DTensor. Needed with such a target.
        the others: see `from_parallel_logits_to_logprobs`.

    Returns: [batch, tokens − 1]; a rank's gradient is that of its own tokens, as in NeMo-RL.
    """
    where = "dtensor_from_parallel_logits_to_logprobs"
    served(where, chunk_size, sampling_params)
    of = columns(where, vocab_parallel_logits, vocab_start_index, vocab_end_index, tp_group, vocab_size)
    with torch.no_grad() if inference_only else nullcontext():
        return _of_dtensor(where, vocab_parallel_logits, target, seq_index, of)


def get_logprobs_from_vocab_parallel_logits(
    vocab_parallel_logits: DTensor,
    input_ids: Tensor,
    seq_index: Tensor | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
) -> Tensor:
    """`dtensor_from_parallel_logits_to_logprobs` of a DTensor that the dimension "tp" of its mesh splits by columns.

    Args: see there; input_ids is its target. Columns need not be shared evenly.
    """
    where = "get_logprobs_from_vocab_parallel_logits"
    served(where, chunk_size, sampling_params)
    logits, of = local(where, vocab_parallel_logits)
    return _of_dtensor(where, logits, input_ids, seq_index, of)


def get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Group | None = None,
    context_parallel_group: Group | None = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of the next tokens, [batch, tokens − 1], of logits in any of NeMo-RL's forms.

    Args:
        next_token_logits: [batch, tokens, *]: columns of rank `vocab_parallel_rank` of `vocab_parallel_group`, or else
            a DTensor, or else whole rows. No float32 copy of them is made.
        the others: see `from_parallel_logits_to_logprobs` and `dtensor_from_parallel_logits_to_logprobs`.
    """
    where = "get_next_token_logprobs_from_logits"
    served(where, chunk_size, sampling_params)
    if vocab_parallel_group is not None:
        rank = of_rank(where, vocab_parallel_rank, vocab_parallel_group)
        width = next_token_logits.shape[-1]
        return from_parallel_logits_to_logprobs(
            next_token_logits, input_ids, rank * width, (rank + 1) * width, vocab_parallel_group,
            cp_group=context_parallel_group,
        )  # fmt: skip
    if context.size_of(context_parallel_group) > 1:
        raise ValueError(f"{where}: context_parallel_group is given, but vocab_parallel_group is None; expected both")
    if isinstance(next_token_logits, DTensor):
        return get_logprobs_from_vocab_parallel_logits(next_token_logits, input_ids, seq_index=seq_index)
    return selective_log_softmax(next_token_logits, input_ids, shift=True)[:, :-1]


def _of_dtensor(where: str, logits: Tensor, target: Tensor, seq_index: Tensor | None, of: dict[str, Any]) -> Tensor:
    mesh = target.device_mesh if isinstance(target, DTensor) else None
    cp = mesh is not None and "cp" in (mesh.mesh_dim_names or ()) and context.size_of(mesh.get_group("cp")) > 1
    if mesh is None or not isinstance(target, DTensor) or not cp:
        whole = target.full_tensor() if isinstance(target, DTensor) else target
        return selective_log_softmax(logits, _next(whole), **of)[:, :-1]
    if seq_index is None:
        raise ValueError(f"{where}: seq_index is None; expected the order of the tokens, which the mesh splits over cp")
    group = mesh.get_group("cp")
    table = seq_index.reshape(context.size_of(group), -1)
    labels = _next(target.full_tensor()[:, seq_index.argsort()])
    found = selective_log_softmax(logits, context.of_this_rank(labels, table, group), **of)
    return context.of_all_ranks(found, table, group, sum_gradients=False)[:, :-1]


def _next(target: Tensor) -> Tensor:
    """The token after each; none after the last."""
    return torch.nn.functional.pad(target[:, 1:], (0, 1), value=_NONE)


def _padded(where: str, labels: Tensor, tokens: int) -> Tensor:
    if labels.shape[-1] > tokens:
        raise ValueError(
            f"{where}: target has {labels.shape[-1]} tokens; expected {tokens} at most, those of the logits of all "
            f"context-parallel ranks"
        )
    return torch.nn.functional.pad(labels, (0, tokens - labels.shape[-1]), value=_NONE)
