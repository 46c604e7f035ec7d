"""Many labels a row, and the columns that are none of them, in the two-sweep CUDA kernels: on the model of a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from checks import CUDA_ON_HOST, check_gradient, check_value
from cuda_host.one_read import DTYPES, pair, prepare, some_coefficients
from torch import Tensor

from kldiv_kernels.backends import Call, get

if not CUDA_ON_HOST:
    pytest.skip("runs under KLDIV_CUDA_HOST=1", allow_module_level=True)

# A block has 16,384 columns: two whole slices, and a short one that is no multiple of eight.
SLICE, COLUMNS = 16_384, 32_811
BORDERS = torch.tensor([0, 7, 8, SLICE - 1, SLICE, 2 * SLICE - 1, 2 * SLICE, COLUMNS - 1, -1, -1])
ALONE = [
    ("tail_logprob",), ("logprob", "tail_logprob"), ("logprob",), ("untempered_logprob",),
    ("max_logprob", "logprob", "argmax", "tail_logprob", "logsumexp", "entropy", "untempered_logprob"),
]  # fmt: skip
BESIDE = [
    ("logprob", "reference_logprob"), ("tail_logprob", "js", "argmax", "reference_logprob", "forward_kl"),
    ("hellinger", "logprob", "tvd", "tail_logprob", "reverse_kl", "reference_entropy"),
    ("untempered_logprob", "forward_kl"), ("reverse_kl", "untempered_logprob"), ("untempered_logprob", "logprob", "js"),
    ("hellinger", "untempered_logprob"), ("js", "reverse_kl", "untempered_logprob", "tail_logprob", "logprob"),
]  # fmt: skip


def _labels(rows: int, columns: int, count: int) -> Tensor:
    """Different ones in each row, in no order."""
    return torch.stack([torch.randperm(columns)[:count] for _ in range(rows)])


def _double(call: Call) -> Call:
    reference = None if call.reference is None else call.reference.double()
    return dataclasses.replace(call, logits=call.logits.double(), reference=reference)


def _largest_probability(call: Call) -> Tensor:
    """[*, 1]: the gradient is a difference of probabilities, of all columns and of the tail's."""
    assert call.labels is not None
    rows = torch.cat(
        [
            x.reshape(call.rows, -1)[:, : call.vocab_size].double()
            for x in (call.logits, call.reference)
            if x is not None
        ]
    )
    labels = call.labels.repeat(len(rows) // call.rows, 1)
    tail = torch.cat([rows, rows[:, :1]], -1).scatter(1, labels.where(labels >= 0, rows.shape[1]), -torch.inf)
    tail[:, -1] = -torch.inf
    both = torch.maximum(rows.softmax(-1).amax(-1), tail.softmax(-1).amax(-1).nan_to_num(0.0))
    return both.nan_to_num(0.0).reshape(-1, call.rows).amax(0).reshape(*call.logits.shape[:-1], 1)


def _check(call: Call, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Values and the student's gradient; both gradients against float64, in one call and from a saved state."""
    backend = get("cuda")
    two = call.reference is not None
    wanted = get("reference").one_read(_double(call), coefficients.double(), True, two)
    got = backend.one_read(call, coefficients, True, two)
    largest = _largest_probability(call)
    check_value(got[0], wanted[0].float())
    for gradient, expected in zip(got[1:], wanted[1:], strict=True):
        if expected is not None:
            check_gradient(gradient, expected, coefficients.abs().amax(0).reshape(largest.shape) * largest)
            assert expected.any()
    values, state = backend.forward(call, True)
    assert torch.equal(values, got[0])
    again = backend.backward(call, state, coefficients, True, two)
    assert torch.equal(again[0], got[1])
    assert not two or torch.equal(again[1], got[2])
    return got[0], got[1]


def _coefficients(call: Call) -> Tensor:
    return some_coefficients(tuple(str(i) for i in range(get("cuda").forward(call, False)[0].shape[0])), call.rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stats", ALONE + BESIDE, ids="+".join)
def test_statistics(stats: tuple[str, ...], dtype: torch.dtype) -> None:
    logits, reference = pair(3, COLUMNS, dtype)
    labels = torch.cat([BORDERS.expand(3, -1), _labels(3, COLUMNS, 54)], dim=-1)
    labels[1] = labels[1][torch.randperm(64)]
    # The largest logit twice: the first is found, whether it is a label or not.
    logits[0, 5], logits[0, 8], logits[1, 8], logits[1, 9] = 20.0, 20.0, 20.0, 20.0
    call = prepare(
        stats, logits, reference if stats in BESIDE else None, labels, ignore_index=-1, temperature=0.8,
        reference_temperature=1.3, beta=0.4, exclude=torch.tensor([-1, 3, SLICE]),
    )  # fmt: skip
    _check(call, _coefficients(call))


@pytest.mark.parametrize("count", [1, 2, 33, 1024, 3000])
@pytest.mark.parametrize("stats", [("logprob", "tail_logprob"), ("tail_logprob", "entropy")], ids="+".join)
def test_how_many(stats: tuple[str, ...], count: int) -> None:
    """Up to the whole row, whose tail has no mass and no gradient."""
    logits, _ = pair(3, 3000, torch.float32)
    call = prepare(stats, logits, None, _labels(3, 3000, count), ignore_index=-1)
    values, _ = _check(call, _coefficients(call))
    tail = values[count if stats[0] == "logprob" else 0]
    assert (tail == -torch.inf).all() if count == 3000 else tail.isfinite().all()


@pytest.mark.parametrize(
    "stats",
    [("logprob", "tail_logprob"), ("logprob", "reference_logprob"), ("logprob", "untempered_logprob")],
    ids="+".join,
)
def test_a_label_that_occurs_again(stats: tuple[str, ...]) -> None:
    """Its coefficients add up, and the tail is without it once."""
    logits, reference = pair(2, 300, torch.float32)
    labels = torch.tensor([[7, 9, 7, -1, 299, 7], [3, 3, 3, 3, 3, 3]])
    call = prepare(stats, logits, reference, labels, ignore_index=-1, temperature=1.7)
    _check(call, _coefficients(call))


@pytest.mark.parametrize(
    ("heavy", "left"),
    [("labels", 1e-7), ("labels", 1e-12), ("labels", 1e-30), ("labels", 1e-60), ("tail", 1e-7), ("tail", 1e-12)],
)
def test_next_to_nothing_left(heavy: str, left: float) -> None:
    """1 − Σ exp(label log-probabilities) would be 0, or noise."""
    logits, _ = pair(3, 2000, torch.float32)
    labels = _labels(3, 2000, 20)
    here = torch.zeros(3, 2000, dtype=torch.bool).scatter_(1, labels, True)
    shift = torch.tensor(left, dtype=torch.float64).log().float()
    logits = logits + torch.where(here == (heavy == "tail"), shift, 0.0)
    call = prepare(("logprob", "tail_logprob"), logits, None, labels, ignore_index=-1)
    coefficients = torch.zeros(21, 3)
    coefficients[20] = torch.tensor([1.0, -2.0, 0.5])
    values, gradient = _check(call, coefficients)
    assert heavy == "tail" or (values[20] < 0.5 * shift).all()
    assert heavy == "tail" or gradient.masked_fill(here, 0.0).abs().amax() > 1e-3


def test_rows_apart() -> None:
    """A row of NaN, a tail at −inf, labels at −inf, a masked row: and no other row knows of them."""
    logits, _ = pair(6, 600, torch.bfloat16)
    labels = _labels(6, 600, 9)
    here = torch.zeros(6, 600, dtype=torch.bool).scatter_(1, labels, True)
    logits[1, labels[1, 0]] = torch.nan
    logits[2, ~here[2]] = -torch.inf
    logits[3, here[3]] = torch.finfo(torch.bfloat16).min
    logits[4] = torch.nan
    mask = torch.arange(6) != 4
    call = prepare(("logprob", "tail_logprob"), logits, None, labels, ignore_index=-1, mask=mask)
    coefficients = some_coefficients(tuple("0123456789"), 6)
    keep = torch.tensor([0, 2, 3, 4, 5])
    some = prepare(("logprob", "tail_logprob"), logits[keep], None, labels[keep], ignore_index=-1, mask=mask[keep])
    expected, gradient = _check(some, coefficients[:, keep])
    assert expected[9, 1] == -torch.inf
    assert not gradient[3].any()
    values, dlogits, _ = get("cuda").one_read(call, coefficients, True, False)
    assert values[:, 1].isnan().all()
    assert dlogits[1].isnan().all()
    assert torch.equal(values[:, keep], expected)
    assert torch.equal(dlogits[keep], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_and_padding(dtype: torch.dtype) -> None:
    logits, _ = pair(8, 700, dtype)
    logits[:, 595:] = torch.nan
    shifted = logits.reshape(4, 2, 700)[:, :, 3:].transpose(0, 1)
    labels = _labels(8, 592, 11).reshape(2, 4, 11)
    call = prepare(("logprob", "tail_logprob"), shifted, None, labels, ignore_index=-1, vocab_size=592)
    _, gradient = _check(call, _coefficients(call))
    assert not gradient[..., 592:].any()


def test_parameters_per_token() -> None:
    logits, _ = pair(5, 777, torch.float32)
    temperature = torch.rand(5) + 0.6
    call = prepare(
        ("tail_logprob", "logprob", "untempered_logprob"), logits, None, _labels(5, 777, 6), ignore_index=-1,
        temperature=temperature,
    )  # fmt: skip
    _check(call, _coefficients(call))


def test_same_bits_in_any_order_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, _ = pair(5, SLICE + 700)
    labels = torch.cat([_labels(5, SLICE + 700, 60), torch.tensor([[4, 4, 4]]).expand(5, 3)], dim=-1)
    coefficients = some_coefficients(tuple(map(str, range(64))), 5)

    def bits(rows: slice | list[int]) -> tuple[Tensor, Tensor]:
        call = prepare(("logprob", "tail_logprob"), logits[rows], None, labels[rows], ignore_index=-1)
        values, gradient, _ = get("cuda").one_read(call, coefficients[:, rows], True, False)
        return values, gradient

    values, gradient = bits(slice(None))
    for seed in range(10):
        monkeypatch.setenv("KLDIV_HOST_SEED", str(seed))
        rows = [slice(None), [seed % 5], [4, 2]][seed % 3]
        again = bits(rows)
        assert torch.equal(again[0], values[:, rows])
        assert torch.equal(again[1], gradient[rows])
