"""What a causal language model says about blocks of tokens, its top k a position, into a teacher cache.

The log-probs are exact over the whole vocabulary: `torch.topk` chooses the ids, `selective_log_softmax` reads each
row of logits once more for their log-probs, and no log-softmax is formed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kldiv_kernels.stats import selective_log_softmax
from kldiv_kernels.teacher_cache import CacheInfo, ParallelCacheWriter

# Training moves nearly every value: a few of each parameter tell two checkpoints apart, without reading all of them.
_VALUES_OF_EACH = 1024
# Of as many blocks, spread evenly: another text differs in nearly all of them.
_BLOCKS_OF_DATA = 64


def weights_checksum(model: PreTrainedModel) -> str:
    """Of the first values of every parameter: the same for the same weights, whatever folder they came from.

    Of a model that is spread over ranks it is that of the whole one, and all ranks come here.
    """
    crc = 0
    for name, parameter in sorted(model.named_parameters()):
        values = _first_values(parameter.detach()).float().cpu().numpy()
        crc = zlib.crc32(values.tobytes(), zlib.crc32(name.encode(), crc))
    return f"crc32:{crc:08x}"


def _first_values(parameter: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        # As many rows as have them: the other rows need not leave their rank.
        rows = -(-_VALUES_OF_EACH // max(1, parameter.shape[1:].numel()))
        parameter = cast("DTensor", parameter[:rows]).full_tensor()
    return parameter.flatten()[:_VALUES_OF_EACH]


def data_checksum(blocks: Dataset) -> str:
    """Of how many blocks there are, and of some of them."""
    some = np.linspace(0, len(blocks) - 1, min(len(blocks), _BLOCKS_OF_DATA)).astype(int).tolist()
    crc = zlib.crc32(np.array(blocks[some]["input_ids"], dtype=np.int32).tobytes(), len(blocks))
    return f"crc32:{crc:08x} of {len(blocks)} blocks"


@torch.no_grad()
def top_rows(
    model: PreTrainedModel, input_ids: Tensor, *, k: int, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the k most probable tokens after each position but the last, which nothing follows.

    input_ids [batch, tokens] -> [batch, tokens - 1, k] int64 and float32, most probable first.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    ids = logits[..., :vocab_size].topk(k).indices
    return ids, selective_log_softmax(logits, ids, temperature=temperature, vocab_size=vocab_size)


def check_same_data(number: int, sequences: Iterable[Tensor], blocks: Dataset) -> None:
    """Raises ValueError, naming the first, where sequences of a cache, the first of which has this number, are not the
    blocks of their numbers."""
    for block, sequence in enumerate(sequences, number):
        if sequence.tolist() != blocks[block]["input_ids"]:
            raise ValueError(f"data: block {block} is not what the cache has; a continued cache keeps its data")


def cache_blocks(
    model: PreTrainedModel, blocks: Dataset, writer: ParallelCacheWriter, shards: Iterable[int], *, batch_size: int,
    write: bool = True, on_progress: Callable[[int], object] = lambda new: None,
) -> None:  # fmt: skip
    """Write these shards, one after another.

    Batches are those of a run from the start, also where a shard begins or ends inside one: a row's last bits depend
    on the batch that it was computed in. Where two ranks have the shards on both sides of a batch, both compute it.

    Args:
        model: on its device, in evaluation mode, as `from_pretrained` leaves it.
        blocks: rows of `input_ids`, all of one length of at least 2.
        shards: numbers of shards; the next one is asked for when the one before is written.
        batch_size: blocks a call of the model, at least 1.
        write: False for a rank that only takes part in the model's work.
        on_progress: called with the number of blocks that were added, after each batch.
    """
    at, batch = -1, None
    for number in shards:
        wanted = writer.sequences_of(number)
        for start in range(wanted.start - wanted.start % batch_size, wanted.stop, batch_size):
            if batch is None or start != at:
                at, batch = start, _scored(model, blocks[start : start + batch_size]["input_ids"], writer.info)
            first, end = max(start, wanted.start), min(start + batch_size, wanted.stop)
            if write:
                writer.append(first, *(values[first - start : end - start] for values in batch))
            on_progress(end - first)


def _scored(model: PreTrainedModel, blocks: list[list[int]], info: CacheInfo) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the k most probable tokens and their log-probs, in the processor's memory."""
    input_ids = torch.tensor(blocks)
    ids, logprobs = top_rows(
        model, input_ids.to(model.device), k=info.k, temperature=info.temperature, vocab_size=info.vocab_size
    )
    return input_ids, ids.cpu(), logprobs.cpu()
