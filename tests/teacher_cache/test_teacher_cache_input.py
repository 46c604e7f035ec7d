"""Rows that are no log-probs are refused by name and place; servers' and other caches' rows come in as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kldiv_kernels.teacher_cache import CacheInfo, TeacherCache, TeacherCacheWriter, from_prompt_logprobs, from_rows

INFO = CacheInfo(teacher="teacher", vocab_size=50, k=3)
NAN, OFF = float("nan"), float("-inf")
TOKENS = [1, 2, 3]
IDS = [[4, 2, 9], [7, 0, -1]]
LOGPROBS = [[-0.5, -1.5, -3.0], [-0.2, -2.0, 0.0]]


def changed(rows: list[list[Any]], row: int, entry: int, value: Any) -> list[list[Any]]:
    return [[value if (r, e) == (row, entry) else x for e, x in enumerate(xs)] for r, xs in enumerate(rows)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_ids": changed(IDS, 1, 1, 50)}, r"topk_ids\[1, 1\] is 50 .*; expected -1 \(padding\) or 0 to 49"),
        ({"topk_ids": changed(IDS, 0, 2, -2)}, r"topk_ids\[0, 2\] is -2 .*; expected -1 \(padding\) or 0 to 49"),
        ({"topk_ids": changed(IDS, 0, 2, 2**40)}, r"topk_ids\[0, 2\] is 1099511627776 "),
        ({"topk_ids": changed(IDS, 0, 2, 4)}, r"topk_ids\[0\] has 4 twice .*; expected each id once in a row"),
        ({"topk_ids": [row[:2] for row in IDS]}, r"topk_ids has shape \[2, 2\] .*; expected \[rows, k = 3\]"),
        ({"topk_ids": IDS[:1]}, r"topk_logprobs has shape \[2, 3\] .*; expected \[1, 3\] like topk_ids"),
        ({"token_ids": [1, 50, 3]}, r"token_ids\[1\] is 50 .*; expected 0 to 49"),
        ({"token_ids": [1, -1, 3]}, r"token_ids\[1\] is -1 .*; expected 0 to 49"),
        ({"token_ids": torch.tensor([], dtype=torch.int64)}, r"token_ids has shape \[0\] .*; expected \[tokens\]"),
        ({"token_ids": [1] * 9}, "positions is None, with 2 rows for 9 tokens .*; expected positions, or 9 or 8 rows"),
        ({"positions": [1, 1]}, r"positions\[1\] is 1, after 1 .*; expected increasing positions"),
        ({"positions": [1, 3]}, r"positions\[1\] is 3 .*; expected 0 to 2"),
        ({"positions": [1]}, r"positions has shape \[1\] .*; expected \[2\], one a row"),
        ({"topk_logprobs": changed(LOGPROBS, 1, 0, NAN)}, r"topk_logprobs\[1, 0\] is NaN .*; expected at most 0"),
        ({"topk_logprobs": changed(LOGPROBS, 0, 1, 0.01)}, r"topk_logprobs\[0, 1\] is 0.01 .*; expected at most 0"),
        ({"topk_logprobs": changed(LOGPROBS, 0, 0, float("inf"))}, r"topk_logprobs\[0, 0\] is inf "),
        ({"topk_logprobs": changed(LOGPROBS, 0, 2, -0.9)}, r"topk_logprobs\[0\] sums to a probability of 1.2362"),
        (
            {"topk_ids": torch.zeros(0, 3, dtype=torch.int64), "topk_logprobs": torch.zeros(0, 3)},
            "topk_ids has no rows",
        ),
        ({"token_ids": [[1, 2], [3, 4]]}, r"topk_ids has shape \[3\] .*; expected \[rows, k = 3\]"),
        (
            {"token_ids": [[1, 2]]},
            r".* have shapes \[1, 2\], \[2, 3\] and \[2, 3\]; expected the same number of sequences",
        ),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_kept(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    right = {"token_ids": TOKENS, "topk_ids": IDS, "topk_logprobs": LOGPROBS}
    writer = TeacherCacheWriter(tmp_path, INFO)
    writer.append(**right)
    with pytest.raises(ValueError, match=f"append: {message}"):
        writer.append(**{**right, **arguments})
    writer.append(**right)
    writer.finish()
    assert len(TeacherCache(tmp_path)) == 2


def test_the_sequence_is_named_by_number(tmp_path: Path) -> None:
    writer = TeacherCacheWriter(tmp_path, INFO)
    writer.append(TOKENS, IDS, LOGPROBS)
    with pytest.raises(ValueError, match=r"topk_ids\[1, 1\] is 50 \(sequence 2\)"):
        writer.append([TOKENS, TOKENS], [IDS, changed(IDS, 1, 1, 50)], [LOGPROBS, LOGPROBS])
    writer.finish()
    assert len(TeacherCache(tmp_path)) == 1, "of a batch with a wrong row nothing is kept"


@pytest.mark.parametrize("name", ["token_ids", "topk_ids", "topk_logprobs"])
def test_a_wrong_type_is_named(name: str, tmp_path: Path) -> None:
    arguments = {
        "token_ids": torch.tensor(TOKENS),
        "topk_ids": torch.tensor(IDS),
        "topk_logprobs": torch.tensor(LOGPROBS),
    }
    arguments[name] = arguments[name].long() if name == "topk_logprobs" else arguments[name].double()
    with (
        pytest.raises(TypeError, match=f"append: {name} has dtype torch"),
        TeacherCacheWriter(tmp_path, INFO) as writer,
    ):
        writer.append(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_may_sum_to_as_much_above_one_as_their_dtype_rounds(dtype: torch.dtype, tmp_path: Path) -> None:
    logprobs = torch.full((1, 3), 1 / 3).log()
    # The next value towards 0 in the dtype: all three are rounded the same way.
    rounded = logprobs.to(dtype) * (1 - torch.finfo(dtype).eps)
    assert rounded.double().exp().sum() > 1 + 2e-4
    with TeacherCacheWriter(tmp_path / "in its dtype", INFO) as writer:
        writer.append([1], [[1, 2, 3]], rounded)
    with pytest.raises(ValueError, match="sums to a probability"), TeacherCacheWriter(tmp_path / "f", INFO) as writer:
        writer.append([1], [[1, 2, 3]], rounded.float())


@pytest.mark.parametrize("make", [list, np.asarray, torch.as_tensor], ids=["lists", "arrays", "tensors"])
def test_arguments_may_be(make: Any, tmp_path: Path) -> None:
    ids, logprobs = make(IDS), make(LOGPROBS)
    before = torch.as_tensor(logprobs).tolist()
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        writer.append(make(TOKENS), ids, logprobs)
    (sequence,) = TeacherCache(tmp_path)
    assert sequence.topk_ids.tolist() == IDS
    assert sequence.topk_logprobs.tolist() == torch.tensor([LOGPROBS[0], [-0.2, -2.0, OFF]]).tolist()
    assert torch.as_tensor(logprobs).tolist() == before, "the caller's values stay"


@dataclass
class Logprob:
    """The class of vLLM, as far as its users see it."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


OBJECTS: list[Any] = [
    None,
    {7: Logprob(-0.1, 1), 2: Logprob(-2.5, 2)},
    {5: Logprob(-9.0, 40), 8: Logprob(-0.5, 1), 4: Logprob(-1.5, 2)},
]
PLAIN: list[Any] = [None if e is None else {i: v.logprob for i, v in e.items()} for e in OBJECTS]
JSON: list[Any] = [None if e is None else {str(i): vars(v) for i, v in e.items()} for e in OBJECTS]


@pytest.mark.parametrize(
    "given", [OBJECTS, PLAIN, JSON, [{}, *OBJECTS[1:]]], ids=["objects", "floats", "json", "empty"]
)
def test_prompt_logprobs(given: list[Any], tmp_path: Path) -> None:
    found = from_prompt_logprobs(given)
    assert found.positions.tolist() == [0, 1], "entry 1 is the distribution of token 1, after position 0"
    assert found.topk_ids.tolist() == [[7, 2, -1], [8, 4, 5]]
    assert torch.equal(found.topk_logprobs, torch.tensor([[-0.1, -2.5, OFF], [-0.5, -1.5, -9.0]]))
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        writer.append([3, 7, 5], found.topk_ids, found.topk_logprobs, positions=found.positions)
    assert TeacherCache(tmp_path)[0].topk_ids.tolist() == found.topk_ids.tolist()
    assert from_prompt_logprobs(given, k=2).topk_ids.tolist() == [[7, 2], [8, 4]], "the improbable prompt token goes"
    assert from_prompt_logprobs(given, k=4).topk_ids.tolist() == [[7, 2, -1, -1], [8, 4, 5, -1]]
    assert from_prompt_logprobs([given[0], None, *given[1:]]).positions.tolist() == [1, 2]


def test_unpacked_rows(tmp_path: Path) -> None:
    found = from_rows([[3, 9, 3], [4]], [[-2.0, -0.5, OFF], [-0.1]])
    assert found.positions.tolist() == [0, 1]
    assert found.topk_ids.tolist() == [[9, 3], [4, -1]], "an entry at -inf is none"
    assert torch.equal(found.topk_logprobs, torch.tensor([[-0.5, -2.0], [-0.1, OFF]]))
    found = from_rows([[3, 9, 3], [4]], [[-2.0, -0.5, OFF], [-0.1]], k=3)
    assert from_rows([[3, 9]], [[-2.0, -0.5]], k=1).topk_ids.tolist() == [[9]]
    with TeacherCacheWriter(tmp_path, INFO) as writer:
        writer.append([1, 2, 3], found.topk_ids, found.topk_logprobs, positions=found.positions)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([{1: -0.5}], ValueError, "entry 0 is not None; nothing comes before the first token"),
        ([None], ValueError, "prompt_logprobs has no entry"),
        ([None, {1: -0.5, 2: NAN}], ValueError, "a log-prob of row 0 is NaN"),
        ([None, {1: "a"}], TypeError, r"entry 1 has 'a'; expected a float, .logprob or \['logprob'\]"),
        ([None, {1: {"rank": 2}}], TypeError, "entry 1 has None"),
        ([None, [1, 2]], TypeError, "entry 1 is list; expected a mapping or None"),
    ],
)
def test_wrong_prompt_logprobs(entries: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"from_prompt_logprobs: {message}"):
        from_prompt_logprobs(entries)
    with pytest.raises(ValueError, match="from_prompt_logprobs: k is 0; expected at least 1"):
        from_prompt_logprobs(OBJECTS, k=0)


def test_wrong_unpacked_rows() -> None:
    for ids, logprobs, message in (
        ([], [], "ids has 0 rows and logprobs 0; expected as many, at least 1"),
        ([[1]], [], "ids has 1 rows and logprobs 0"),
        ([[1], [1, 2]], [[-0.5], [-0.5]], "row 1 has 2 ids and 1 logprobs; expected as many"),
        ([[1]], [[NAN]], "a log-prob of row 0 is NaN"),
    ):
        with pytest.raises(ValueError, match=f"from_rows: {message}"):
            from_rows(ids, logprobs)
