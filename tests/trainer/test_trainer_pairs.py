"""Preference pairs: the tokens of texts and conversations, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny

from kldiv_kernels.trainer import pairs

TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} ;{% endfor %}"
ASKED = TEMPLATE + "{% if add_generation_prompt %}assistant :{% endif %}"
ROW = {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6 w7", "rejected": " w4 w9 w7"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)


def words(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids)).replace("<|endoftext|>", "#")


def test_a_text_ends_and_an_answer_starts_where_its_own_tokens_do() -> None:
    tokenizer = tiny.word_tokenizer()
    row = pairs.encode(ROW, tokenizer, max_length=9, phrases=True)
    assert words(tokenizer, row["prompt_ids"]) == "w1 w2 w3"
    assert words(tokenizer, row["chosen_ids"]) == "w1 w2 w3 w4 w5 w6 w7 #"
    assert words(tokenizer, row["rejected_ids"]) == "w1 w2 w3 w4 w9 w7 #"
    assert (row["chosen_start"], row["rejected_start"]) == (3, 3)
    assert row["chosen_phrases"] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert row["rejected_phrases"] == [0, 0, 0, 0, 1, 0, 0]
    # Without a prompt it is what both begin with, in whole words: w1 and w12 begin alike.
    row = pairs.encode({"chosen": "w5 w1 w7", "rejected": "w5 w12"}, tokenizer, max_length=9)
    assert (words(tokenizer, row["prompt_ids"]), row["chosen_start"], row["rejected_start"]) == ("w5", 1, 1)
    # A prompt's last token that grows together with the answer is the answer's.
    row = pairs.encode({"prompt": "w5 w1", "chosen": "2 w7", "rejected": " w8"}, tokenizer, max_length=9)
    assert (words(tokenizer, row["chosen_ids"]), row["chosen_start"], row["rejected_start"]) == ("w5 w12 w7 #", 1, 2)
    cut = pairs.encode(ROW, tokenizer, max_length=4)
    assert (len(cut["chosen_ids"]), len(cut["prompt_ids"]), cut["chosen_start"]) == (4, 3, 3)


@pytest.mark.parametrize("with_prompt", [True, False])
def test_conversations_go_through_the_chat_template(with_prompt: bool) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.add_tokens(["user", "assistant", ":", ";"])
    tokenizer.chat_template = ASKED
    asked, answers = [{"role": "user", "content": "w1 w2"}], ("w3 w4", "w5")
    said = [[{"role": "assistant", "content": text}] for text in answers]
    row: dict[str, Any] = {"chosen": said[0], "rejected": said[1], "prompt": asked}
    if not with_prompt:
        # As in data sets whose prompt column is the question's text.
        row = {"prompt": "w1 w2", "chosen": asked + said[0], "rejected": asked + said[1]}
    found = pairs.encode(row, tokenizer, max_length=20)
    assert words(tokenizer, found["prompt_ids"]) == "user : w1 w2 ; assistant :"
    assert words(tokenizer, found["chosen_ids"][found["chosen_start"] :]) == "w3 w4 ;"
    assert words(tokenizer, found["rejected_ids"][found["rejected_start"] :]) == "w5 ;"
    with pytest.raises(ValueError, match="the tokenizer has no chat template; expected texts"):
        pairs.encode(row, tiny.word_tokenizer(), max_length=20)
    with pytest.raises(ValueError, match="chosen is 3 and rejected 'w1'; expected two texts, or two lists"):
        pairs.encode({"chosen": 3, "rejected": "w1"}, tokenizer, max_length=20)


def test_files_are_split_and_pairs_without_an_answer_are_dropped(tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "pairs.jsonl", tiny.word_tokenizer()
    rows = [{"prompt": f"w{n}", "chosen": " w1", "rejected": " w2"} for n in range(20)]
    rows.append({"prompt": "w1 w2 w3 w4", "chosen": " w1", "rejected": " w2"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pairs.load_pairs([str(file)], tokenizer, max_length=4, held_out=0.2, seed=1)
    assert (len(found.train), len(found.held_out)) == (16, 4)
    prompts = [tuple(ids) for part in found for ids in part["prompt_ids"]]
    assert sorted(prompts) == sorted(tuple(tokenizer(f"w{n}")["input_ids"]) for n in range(20))
    again = pairs.load_pairs([str(file)], tokenizer, max_length=4, held_out=0.2, seed=2)
    assert again.held_out["prompt_ids"] != found.held_out["prompt_ids"]
    (tmp_path / "texts.jsonl").write_text('{"text": "w1"}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl' has no column chosen and rejected; it has text"):
        pairs.load_pairs([str(tmp_path / "texts.jsonl")], tokenizer, max_length=4)
    with pytest.raises(ValueError, match=r"makes 0 pairs for training and 0 held out .* max_length = 1 tokens"):
        pairs.load_pairs([str(file)], tokenizer, max_length=1)
