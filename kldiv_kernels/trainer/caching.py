"""What a causal language model says about blocks of tokens, its top k a position, into a teacher cache.

The log-probs are exact over the whole vocabulary: `torch.topk` chooses the ids, `selective_log_softmax` reads each
row of logits once more for their log-probs, and no log-softmax is formed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from kldiv_kernels.stats import selective_log_softmax
from kldiv_kernels.teacher_cache import TeacherCache, TeacherCacheWriter

# Training moves nearly every value: a few of each parameter tell two checkpoints apart, without reading all of them.
_VALUES_OF_EACH = 1024


def weights_checksum(model: PreTrainedModel) -> str:
    """Of the first values of every parameter: the same for the same weights, whatever folder they came from."""
    crc = 0
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()[:_VALUES_OF_EACH].float().cpu().numpy()
        crc = zlib.crc32(values.tobytes(), zlib.crc32(name.encode(), crc))
    return f"crc32:{crc:08x}"


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


def check_same_data(cache: TeacherCache, blocks: Dataset) -> None:
    """Raises ValueError, naming the first, where a sequence of the cache is not the block of its number."""
    if len(cache) > len(blocks):
        raise ValueError(f"data: it makes {len(blocks)} blocks; the cache has {len(cache)} already, of other data")
    for number, (sequence, block) in enumerate(zip(cache, blocks, strict=False)):
        if sequence.token_ids.tolist() != block["input_ids"]:
            raise ValueError(f"data: block {number} is not what the cache has; a continued cache keeps its data")


def cache_blocks(
    model: PreTrainedModel, blocks: Dataset, writer: TeacherCacheWriter, *, batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """Append to `writer` the blocks that it does not have, and finish it.

    Batches are those of a run from the start, also where the writer stopped inside one: a row's last bits depend on
    the batch that it was computed in.

    Args:
        model: on its device, in evaluation mode, as `from_pretrained` leaves it.
        blocks: rows of `input_ids`, all of one length of at least 2.
        batch_size: blocks a call of the model, at least 1.
        on_progress: called with the number of blocks that are done, after each batch.
    """
    info, have = writer.info, writer.sequences
    on_progress(have)
    for start in range(have - have % batch_size, len(blocks), batch_size):
        input_ids = torch.tensor(blocks[start : start + batch_size]["input_ids"])
        ids, logprobs = top_rows(
            model, input_ids.to(model.device), k=info.k, temperature=info.temperature, vocab_size=info.vocab_size
        )
        new = max(0, have - start)
        writer.append(input_ids[new:], ids[new:], logprobs[new:])
        on_progress(start + len(input_ids))
    writer.finish()
