"""What inference servers and other caches hand out, as the arrays of `TeacherCacheWriter.append`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import inf, isnan
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Arguments of `append`: positions [rows] int32, topk_ids [rows, K] int64, topk_logprobs [rows, K] float32."""

    positions: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor


def from_prompt_logprobs(prompt_logprobs: Iterable[Mapping[Any, Any] | None], k: int | None = None) -> Rows:
    """Rows from vLLM's `RequestOutput.prompt_logprobs`, or from the same field of its server's JSON.

    Entry i there is the distribution of token i, which this library has at position i − 1. Entry 0 is None or empty;
    other entries that are leave their position out.

    Args:
        prompt_logprobs: one entry a prompt token: a mapping from token id (int, or its digits as JSON has them) to
            an object with `.logprob`, a mapping with "logprob", or a float. With `prompt_logprobs=K` vLLM adds the
            prompt's own token where it is not among the K.
        k: width of the rows, at least 1: the k most probable entries are kept, shorter rows padded with -1. Default:
            the longest row, which is K + 1 where the prompt's own token was added; the writer wants its `info.k`.

    Raises:
        ValueError: no entry at all, one for token 0, NaN; TypeError: an entry that is not as described.

    >>> rows = from_prompt_logprobs([None, {7: -0.5, 3: -1.5}, {2: -0.1}])
    >>> rows.positions.tolist(), rows.topk_ids.tolist()
    ([0, 1], [[7, 3], [2, -1]])
    """
    positions, rows = [], []
    for token, entry in enumerate(prompt_logprobs):
        if not entry:
            continue
        if token == 0:
            raise ValueError(
                "from_prompt_logprobs: entry 0 is not None; nothing comes before the first token of a prompt"
            )
        if not isinstance(entry, Mapping):
            raise TypeError(
                f"from_prompt_logprobs: entry {token} is {type(entry).__name__}; expected a mapping or None"
            )
        positions.append(token - 1)
        rows.append([(_logprob(value, token), int(name)) for name, value in entry.items()])
    if not rows:
        raise ValueError("from_prompt_logprobs: prompt_logprobs has no entry; expected at least one after the first")
    return _rows("from_prompt_logprobs", positions, rows, k)


def from_rows(ids: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]], k: int | None = None) -> Rows:
    """Rows from lists of one length or of several, such as DistillKit's unpacked `indices` and `logprobs`.

    Row r is the distribution of token r + 1. An entry at -inf is padding, as DistillKit has it, whatever its id.

    Args:
        ids, logprobs: one list a row, of equal lengths.
        k: width of the rows, at least 1; the k most probable entries are kept. Default: the longest row.

    Raises ValueError: ids and log-probs of different lengths, none at all, NaN.

    >>> from_rows([[5, 2], [9, 4]], [[-0.1, -3.0], [-0.2, float("-inf")]]).topk_ids.tolist()
    [[5, 2], [9, -1]]
    """
    if len(ids) != len(logprobs) or not len(ids):
        raise ValueError(
            f"from_rows: ids has {len(ids)} rows and logprobs {len(logprobs)}; expected as many, at least 1"
        )
    rows = []
    for row, (row_ids, row_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
        if len(row_ids) != len(row_logprobs):
            raise ValueError(
                f"from_rows: row {row} has {len(row_ids)} ids and {len(row_logprobs)} logprobs; expected as many"
            )
        pairs = zip(row_logprobs, row_ids, strict=True)
        rows.append([(float(logprob), int(token)) for logprob, token in pairs if logprob != -inf])
    return _rows("from_rows", list(range(len(rows))), rows, k)


def _logprob(value: Any, token: int) -> float:
    if isinstance(value, Mapping):
        value = value.get("logprob")
    found = getattr(value, "logprob", value)
    try:
        return float(found)
    except (TypeError, ValueError):
        raise TypeError(
            f"from_prompt_logprobs: entry {token} has {value!r}; expected a float, .logprob or ['logprob']"
        ) from None


def _rows(where: str, positions: list[int], rows: list[list[tuple[float, int]]], k: int | None) -> Rows:
    """Of (log-prob, id) pairs: the `k` most probable of each row, in falling order, padded to one width."""
    if k is not None and k < 1:
        raise ValueError(f"{where}: k is {k}; expected at least 1")
    width = max(1, *(len(row) for row in rows)) if k is None else k
    # int64: an id too large for int32 is for `append` to name.
    ids = torch.full((len(rows), width), -1)
    logprobs = torch.full((len(rows), width), -inf)
    for number, row in enumerate(rows):
        if any(isnan(logprob) for logprob, _ in row):
            # It has no place in the order, and would be cut off or not by chance.
            raise ValueError(f"{where}: a log-prob of row {number} is NaN; expected at most 0")
        # Sorting is stable: equally probable tokens stay in the order in which they came.
        kept = sorted(row, key=lambda pair: -pair[0])[:width]
        logprobs[number, : len(kept)] = torch.tensor([logprob for logprob, _ in kept])
        ids[number, : len(kept)] = torch.tensor([token for _, token in kept], dtype=torch.int64)
    return Rows(torch.tensor(positions, dtype=torch.int32), ids, logprobs)
