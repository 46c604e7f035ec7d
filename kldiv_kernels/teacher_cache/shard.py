"""One shard: a safetensors file that says by itself what it holds and whether it is whole.

Its description is JSON under one key of the safetensors header: with more keys their order, and so the file's bytes,
would change from run to run. The CRC-32 covers the description and the tensors. It finds what disks and networks do
to a file, at twice the speed of SHA-256; it is no signature.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from kldiv_kernels.teacher_cache.commit import write_whole
from kldiv_kernels.teacher_cache.info import FORMAT, CacheInfo, first_difference, info_from

_KEY = "kldiv_kernels.teacher_cache"
_NAME = re.compile(r"shard-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Header:
    """What a shard says of itself. `mass` is Σ exp(log-prob) of a row before it was rounded to the stored dtype."""

    number: int
    sequences: int
    tokens: int
    rows: int
    mass_sum: float
    mass_min: float
    checksum: str = ""

    def __post_init__(self) -> None:
        for name in ("number", "sequences", "tokens", "rows"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}; expected a count")
        for name in ("mass_sum", "mass_min"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}; expected a number")


def path_of(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def present(folder: Path) -> list[int]:
    """The numbers of the shards in `folder`, increasing."""
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def numbered(folder: Path) -> list[Path]:
    """The shards in `folder`, in order. Raises ValueError naming the first one that is missing.

    Read past it, all sequences behind it would have the numbers of others.
    """
    found = present(folder)
    for expected, number in enumerate(found):
        if number != expected:
            missing = path_of(folder, expected).name
            raise ValueError(f"{folder}: {missing} is missing; {path_of(folder, found[-1]).name} is there")
    return [path_of(folder, number) for number in found]


def write(folder: Path, info: CacheInfo, header: Header, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """`arrays` as described in the package's docstring. The file appears under its name when it is whole."""
    header = dataclasses.replace(header, checksum=_checksum(info, header, arrays))
    metadata = {_KEY: _description(info, header)}
    size = len(metadata[_KEY]) + sum(array.nbytes for array in arrays.values())
    write_whole(path_of(folder, header.number), size, lambda path: save_file(dict(arrays), path, metadata))


def read_header(path: Path, info: CacheInfo) -> Header:
    """The header of a shard of the cache `info`, its form checked but not its checksum.

    Raises ValueError naming the file: truncated, no shard, or of another cache.
    """
    with _opened(path) as file:
        description = (file.metadata() or {}).get(_KEY)
        found = {name: _form(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
    if description is None:
        raise ValueError(f"{path} is no shard of a teacher cache: its header has no {_KEY!r}")
    try:
        value = json.loads(description)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} has a corrupt header: {error!r}") from error
    written_for = info_from(value, str(path))
    try:
        header = Header(**value["shard"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a corrupt header: {error!r}") from error
    difference = first_difference(written_for, info)
    if difference is not None:
        raise ValueError(f"{path} is of another cache: its {difference}")
    if path_of(path.parent, header.number) != path:
        raise ValueError(f"{path} is shard {header.number} by its header; it was renamed")
    expected = _forms(info, header)
    if found != expected:
        raise ValueError(f"{path} has a corrupt header: its tensors are {found}; expected {expected}")
    return header


def read_tensors(path: Path, info: CacheInfo, header: Header, *, check: bool) -> dict[str, Tensor]:
    """The tensors, memory-mapped. With `check` the whole file is read first.

    Raises ValueError naming the file where its checksum does not match, or where its offsets are none: a checksum is no
    signature, and slices by wrong offsets would be of another sequence.
    """
    with _opened(path) as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if check:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        found = _checksum(info, dataclasses.replace(header, checksum=""), arrays)
        if found != header.checksum:
            raise ValueError(f"{path} is corrupt: its checksum is {found}; its header says {header.checksum}")
    for name, end in (("token_offsets", header.tokens), ("row_offsets", header.rows)):
        offsets = tensors[name]
        if offsets[0] != 0 or offsets[-1] != end or not bool((offsets[1:] > offsets[:-1]).all()):
            raise ValueError(f"{path} is corrupt: its {name} are {_few(offsets)}; expected increasing, from 0 to {end}")
    return tensors


def _few(values: Tensor) -> str:
    """The first of them, and the last."""
    listed = values.tolist()
    return str(listed) if len(listed) <= 8 else f"[{', '.join(map(str, listed[:6]))}, …, {listed[-1]}]"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is truncated or corrupt: its {size:,} bytes are no safetensors file ({error})"
        ) from error


def _description(info: CacheInfo, header: Header) -> str:
    parts = {"format": FORMAT, "info": info.described(), "shard": dataclasses.asdict(header)}
    return json.dumps(parts, sort_keys=True)


def _checksum(info: CacheInfo, header: Header, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    crc = zlib.crc32(_description(info, header).encode())
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc)
    return f"crc32:{crc:08x}"


def _form(tensor: Any) -> tuple[str, list[int]]:
    return tensor.get_dtype(), list(tensor.get_shape())


def _forms(info: CacheInfo, header: Header) -> dict[str, tuple[str, list[int]]]:
    forms = {
        "token_ids": ("I32", [header.tokens]),
        "positions": ("I32", [header.rows]),
        "topk_ids": ("I32", [header.rows, info.k]),
        "topk_logprobs": ({"float32": "F32", "float16": "F16"}[info.dtype], [header.rows, info.k]),
        "token_offsets": ("I64", [header.sequences + 1]),
        "row_offsets": ("I64", [header.sequences + 1]),
    }
    if info.hidden_size:
        forms |= {
            "projection": ("F32", [header.rows, info.hidden_size]),
            "projection_offset": ("F32", [header.rows]),
            "projection_entropy": ("F32", [header.rows]),
        }
    return forms
