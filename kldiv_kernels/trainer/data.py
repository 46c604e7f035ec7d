"""Text to fixed-length blocks of tokens, with the loaders of `datasets` and the tokenizers of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

# Other files are read as text, one document each.
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HELD_OUT_SPLITS = ("validation", "test")


class Blocks(NamedTuple):
    """Rows of `input_ids` and `labels`, all of one length."""

    train: Dataset
    held_out: Dataset


class Documents(NamedTuple):
    """Rows of `text`. `held_out` is the source's own split, where it has one."""

    train: Dataset
    held_out: Dataset | None


def load_documents(sources: Sequence[str], *, config: str | None = None, column: str = "text") -> Documents:
    """The documents of text, JSON, CSV or Parquet files, of folders of them, and of data sets on the hub.

    Args:
        sources: paths, or hub ids; a path that exists wins. A folder is read recursively, hidden files left out, or
            as `datasets.Dataset.save_to_disk` left it.
        config: configuration of the hub data sets, such as "wikitext-2-raw-v1".
        column: the column that holds the text; text files have "text".

    Raises ValueError naming the source.
    """
    found = [_documents(source, config, column) for source in sources]
    held_out = [part.held_out for part in found if part.held_out is not None]
    return Documents(
        concatenate_datasets([part.train for part in found]), concatenate_datasets(held_out) if held_out else None
    )


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """Documents, an end-of-text token after each where the tokenizer has one, cut into blocks of `block_size`.

    What is left at the end of each batch of 1000 documents is dropped, so that no block needs padding.
    """

    def to_blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        tokens = list(chain.from_iterable(ids + end for ids in encoded["input_ids"]))
        whole = len(tokens) - len(tokens) % block_size
        blocks = [tokens[start : start + block_size] for start in range(0, whole, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    return documents.map(to_blocks, batched=True, remove_columns=documents.column_names, desc="Tokenising")


def load_blocks(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    held_out: float = 0.05,
    seed: int = 0,
    config: str | None = None,
    column: str = "text",
) -> Blocks:
    """Training and held-out blocks. Without a validation or test split, documents are shuffled by `seed` and the
    last `held_out` of the blocks, at least one, are kept out of training.
    """
    documents = load_documents(sources, config=config, column=column)
    if documents.held_out is not None:
        blocks = Blocks(pack(documents.train, tokenizer, block_size), pack(documents.held_out, tokenizer, block_size))
        if min(len(blocks.train), len(blocks.held_out)) < 1:
            raise ValueError(f"data: a split of {', '.join(sources)} has fewer than block_size = {block_size} tokens")
        return blocks
    return split_blocks(pack(documents.train.shuffle(seed=seed), tokenizer, block_size), held_out)


def split_blocks(blocks: Dataset, held_out: float) -> Blocks:
    """The last `held_out` of the blocks apart: contiguous, so that at most one document stands on both sides."""
    if len(blocks) < 2:
        raise ValueError(
            f"data: the text makes {len(blocks)} block(s); expected at least 2, one of them held out "
            f"(more text, or a smaller block_size)"
        )
    first = len(blocks) - max(1, round(held_out * len(blocks)))
    return Blocks(blocks.select(range(first)), blocks.select(range(first, len(blocks))))


def load_rows(source: str, config: str | None = None) -> tuple[Dataset, Dataset | None]:
    """(training rows, held-out rows where the source has a validation or test split) of a source, with all columns.

    Sources and errors are those of `load_documents`.
    """
    splits = _load(source, config)
    if "train" not in splits:
        raise ValueError(f"data: {source!r} has no train split; it has {', '.join(splits)}")
    return splits["train"], next((splits[name] for name in _HELD_OUT_SPLITS if name in splits), None)


def _documents(source: str, config: str | None, column: str) -> Documents:
    train, held_out = load_rows(source, config)
    return Documents(
        _text_only(train, column, source), None if held_out is None else _text_only(held_out, column, source)
    )


def _load(source: str, config: str | None) -> dict[str, Dataset]:
    path = Path(source).expanduser()
    try:
        if not path.exists():
            return dict(load_dataset(source, config))
        if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            stored = load_from_disk(str(path))
            return dict(stored) if isinstance(stored, DatasetDict) else {"train": stored}
        return {"train": _load_files(source, _files(path))}
    except ValueError as error:
        raise ValueError(f"data: {source!r}: {error}") from error
    # datasets and huggingface_hub raise many kinds for a source that is not there or not readable.
    except Exception as error:
        kind = "cannot be read" if path.exists() else "is no local file or folder, and not found on the hub"
        raise ValueError(f"data: {source!r} {kind}: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise ValueError("the folder holds no files")
    return found


def _load_files(source: str, files: list[Path]) -> Dataset:
    by_builder: dict[str, list[str]] = {}
    for file in files:
        by_builder.setdefault(_BUILDERS.get(file.suffix.lower(), "text"), []).append(str(file))
    if len(by_builder) > 1:
        raise ValueError(f"the folder mixes {' and '.join(sorted(by_builder))} files; give them one by one")
    ((builder, paths),) = by_builder.items()
    options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files=paths, split="train", **options)


def _text_only(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        have = ", ".join(dataset.column_names)
        raise ValueError(f"data: {source!r} has no column {column!r}; it has {have} (choose one with --text-column)")
    texts = dataset.select_columns([column])
    return texts if column == "text" else texts.rename_column(column, "text")
