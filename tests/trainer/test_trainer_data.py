"""Loading and packing of text."""

from __future__ import annotations

import json
from pathlib import Path

import commands
import pytest
import tiny
from datasets import Dataset, DatasetDict

from kldiv_kernels.trainer import data


def ids(text: str) -> list[int]:
    return [int(word[1:]) + 1 for word in text.split()]


def test_packing_keeps_every_token_in_order_with_an_end_after_each_document() -> None:
    texts = [tiny.words(17, seed) for seed in range(5)]
    blocks = data.pack(Dataset.from_dict({"text": texts}), tiny.word_tokenizer(), 8)
    stream = [token for text in texts for token in (*ids(text), 0)]
    assert [token for row in blocks for token in row["input_ids"]] == stream[: len(stream) // 8 * 8]
    assert all(row["labels"] == row["input_ids"] and len(row["labels"]) == 8 for row in blocks)


def test_files_folders_and_saved_data_sets_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["w1 w2\nw3", "w4", "w5\n\nw6"]
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.py").write_text(texts[1])
    (folder / "deeper" / "c.md").write_text(texts[2])
    (folder / ".hidden").write_text("w9")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "table.parquet")
    for source, column in (
        (folder, "text"),
        (lines, "body"),
        (tmp_path / "saved", "text"),
        (tmp_path / "table.parquet", "text"),
    ):
        assert list(data.load_documents([str(source)], column=column).train["text"]) == texts, source
    several = data.load_documents([str(folder / "a.txt"), str(folder / "b.py")])
    assert list(several.train["text"]) == texts[:2]
    assert several.held_out is None


def test_a_validation_split_is_the_held_out_text(tmp_path: Path) -> None:
    splits = {"train": tiny.words(40, 1), "validation": tiny.words(24, 2), "test": tiny.words(24, 3)}
    DatasetDict({name: Dataset.from_dict({"text": [text]}) for name, text in splits.items()}).save_to_disk(tmp_path)
    blocks = data.load_blocks([str(tmp_path)], tiny.word_tokenizer(), block_size=8)
    assert blocks.train[0]["input_ids"] == ids(splits["train"])[:8]
    assert blocks.held_out[0]["input_ids"] == ids(splits["validation"])[:8]
    assert (len(blocks.train), len(blocks.held_out)) == (5, 3)


def test_held_out_blocks_are_apart_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"{index}.txt").write_text(tiny.words(39, index))

    def split(seed: int) -> data.Blocks:
        return data.load_blocks([str(tmp_path)], tiny.word_tokenizer(), block_size=8, held_out=0.2, seed=seed)

    first, again, other = split(0), split(0), split(1)
    assert (len(first.train), len(first.held_out)) == (40, 10)
    rows = [tuple(row) for part in first for row in part["input_ids"]]
    assert len(set(rows)) == 50
    assert first.held_out["input_ids"] == again.held_out["input_ids"] != other.held_out["input_ids"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)
    text = tmp_path / "short.txt"
    text.write_text("w1 w2")
    tokenizer = tiny.word_tokenizer()
    with pytest.raises(
        ValueError, match=r"data: 'nobody/nothing' is no local file or folder, and not found on the hub"
    ):
        data.load_documents(["nobody/nothing"])
    with pytest.raises(ValueError, match=r"short.txt' has no column 'body'; it has text"):
        data.load_documents([str(text)], column="body")
    with pytest.raises(ValueError, match=r"the text makes 0 block.* expected at least 2"):
        data.load_blocks([str(text)], tokenizer, block_size=8)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty': the folder holds no files"):
        data.load_documents([str(empty)])
    (tmp_path / "rows.json").write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match="mixes json and text files"):
        data.load_documents([str(tmp_path)])
