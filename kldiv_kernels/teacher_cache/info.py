"""What a cache is of: the teacher, its vocabulary and how its log-probs are stored; and `cache.json`, which says it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from kldiv_kernels.teacher_cache.commit import write_whole

FORMAT = 1
RECORD = "cache.json"
DTYPES = ("float32", "float16")
# Ids are stored as int32.
_MOST_COLUMNS = 2**31 - 1


@dataclass(frozen=True)
class CacheInfo:
    """Whose log-probabilities a cache holds, and in which form. Two caches with equal fields may be read as one.

    Args:
        teacher: name or path of the model.
        vocab_size: columns of the teacher's logits that its softmax ran over; ids are below it.
        k: log-probs a row, 1 to vocab_size; rows that have fewer are padded with id -1.
        temperature: that the teacher's logits were divided by. Default 1.
        dtype: of the stored log-probs, "float32" (default) or "float16".
        weights: a checksum of the teacher's weights, or another mark of its version; "" where nobody knows.
        shard_rows: rows of a shard, at least 1; default 65,536, which is 34 MB at K = 64 in float32. A kill loses at
            most what one shard holds.
        hidden_size: width H of `kk.teacher_projection`'s numbers beside each row, 4·(H + 2) bytes in float32 whatever
            `dtype` is; 0 (default): none are stored.
        head: a checksum, or another mark, of the student's frozen head that they were made with.

    Raises ValueError naming the field.

    >>> CacheInfo(teacher="Qwen/Qwen3-4B", vocab_size=151_936, k=64).dtype
    'float32'
    """

    teacher: str
    vocab_size: int
    k: int
    temperature: float = 1.0
    dtype: str = "float32"
    weights: str = ""
    shard_rows: int = 65_536
    hidden_size: int = 0
    head: str = ""

    def __post_init__(self) -> None:
        # Of one type each: the JSON of equal descriptions, which checksums cover, is then equal too.
        for name, kind in (("teacher", str), ("temperature", float), ("weights", str), ("head", str)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        for name in ("vocab_size", "k", "shard_rows", "hidden_size"):
            object.__setattr__(self, name, index(getattr(self, name)))
        _require(1 <= self.vocab_size <= _MOST_COLUMNS, "vocab_size", self.vocab_size, f"1 to {_MOST_COLUMNS}")
        _require(1 <= self.k <= self.vocab_size, "k", self.k, f"1 to vocab_size = {self.vocab_size}")
        _require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 and finite")
        _require(self.dtype in DTYPES, "dtype", repr(self.dtype), " or ".join(DTYPES))
        _require(self.shard_rows >= 1, "shard_rows", self.shard_rows, "at least 1")
        _require(self.hidden_size >= 0, "hidden_size", self.hidden_size, "at least 0")
        _require(not self.head or self.hidden_size > 0, "head", repr(self.head), "'' where hidden_size is 0")

    def described(self) -> dict[str, Any]:
        """As it stands in JSON. Without a projection there is no word of one: checksums of such shards cover this."""
        fields = dataclasses.asdict(self)
        return fields if self.hidden_size else {k: v for k, v in fields.items() if k not in ("hidden_size", "head")}


@dataclass(frozen=True)
class Totals:
    """What a finished cache holds: with it a reader knows whether a shard is missing."""

    shards: int
    sequences: int
    tokens: int
    rows: int


def first_difference(found: CacheInfo, expected: CacheInfo) -> str | None:
    """The first field in which they differ, as "k is 32; expected 64"."""
    for field in dataclasses.fields(CacheInfo):
        have, want = getattr(found, field.name), getattr(expected, field.name)
        if have != want:
            return f"{field.name} is {have!r}; expected {want!r}"
    return None


def info_from(value: Any, where: str) -> CacheInfo:
    """The `CacheInfo` in JSON; ValueError, beginning with `where`, for another format or other fields."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else None
        raise ValueError(f"{where}: its format is {found!r}; this version of kldiv_kernels reads {FORMAT}")
    try:
        return CacheInfo(**value["info"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} does not describe a cache: {error!r}") from error


def write_record(folder: Path, info: CacheInfo, totals: Totals | None) -> None:
    record = {
        "format": FORMAT,
        "info": info.described(),
        "finished": None if totals is None else dataclasses.asdict(totals),
    }
    content = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    write_whole(folder / RECORD, len(content), lambda path: path.write_bytes(content))


def open_record(folder: Path, info: CacheInfo, *, resume: bool, shards: int, begin: bool = True) -> None:
    """Begin the cache in `folder`, which has `shards` shards, or see to it that it can go on.

    Raises ValueError where a cache is there and `resume` is not given, it is finished or of something else than `info`,
    or where none is: with shards without a record, or without `begin`.
    """
    if begin and not (folder / RECORD).exists():
        # Without the record nothing says whose shards these are.
        if shards:
            raise ValueError(f"{folder} holds {shards} shards but no {RECORD}; choose another folder")
        write_record(folder, info, None)
        return
    found, finished = read_record(folder)
    if not resume:
        raise ValueError(f"{folder} holds a cache of {found.teacher!r}; expected none (resume=True continues it)")
    difference = first_difference(info, found)
    if difference is not None:
        raise ValueError(f"info: {difference}, as the cache in {folder} began")
    if finished is not None:
        raise ValueError(f"{folder} is a finished cache of {finished.sequences} sequences; nothing can be added")


def read_record(folder: Path) -> tuple[CacheInfo, Totals | None]:
    """Of the cache in `folder`; the totals are None while it is being written. ValueError where there is none."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no teacher cache (no {RECORD})") from None
    # RecursionError: brackets in brackets, some thousand deep.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    info = info_from(record, str(path))
    try:
        totals = record["finished"] and Totals(**record["finished"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return info, totals


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"CacheInfo: {field} is {value}; expected {allowed}")
