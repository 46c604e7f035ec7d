"""Bad input raises before anything is computed, naming the argument, what it was and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from bad_policy import POLICY
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.backends import get, names

ROWS = torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)


def _labels(position: tuple[int, ...], value: int, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    labels = torch.zeros(shape, dtype=torch.int64)
    labels[position] = value
    return labels


@pytest.fixture(autouse=True)
def _nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets as far as a backend fails the test."""

    def computed(*arguments: object) -> None:
        pytest.fail("computed before the arguments were checked")

    for name in names():
        for method in ("forward", "backward", "one_read"):
            monkeypatch.setattr(type(get(name)), method, computed)


Case = tuple[Callable[[], object], type[Exception], str]


def _stats(*arguments: object, **options: object) -> Callable[[], object]:
    return lambda: kk.token_stats(*arguments, **{"stats": ["entropy"], **options})


def _loss(*arguments: object, **options: object) -> Callable[[], object]:
    return lambda: kk.divergence_loss(*arguments, **options)


SHAPES: dict[str, Case] = {
    "vocabulary mismatch": (
        _loss(torch.zeros(4, 31_999), torch.zeros(4, 32_000)), ValueError,
        "divergence_loss: reference_logits has shape [4, 32000]; expected [4, 31999] like logits "
        "(pass vocab_size= to ignore padding columns)",
    ),
    "leading mismatch": (
        _stats(ROWS, torch.zeros(2, 4, 8), stats=["js"]), ValueError,
        "token_stats: reference_logits has shape [2, 4, 8]; expected [2, 3, 8] like logits",
    ),
    "scalar logits": (_stats(torch.zeros(())), ValueError, "logits has shape []; expected [*, vocabulary]"),
    "empty vocabulary": (_stats(torch.zeros(3, 0)), ValueError, "logits has shape [3, 0]; expected [*, vocabulary]"),
    "labels": (
        _stats(ROWS, labels=torch.zeros(3, 2, dtype=torch.int64), stats=["logprob"]), ValueError,
        "token_stats: labels has shape [3, 2]; expected [2, 3], or [2, 3, 'K'] for K a token",
    ),
    "loss labels": (
        _loss(ROWS, ROWS, labels=torch.zeros(6, dtype=torch.int64)), ValueError,
        "labels has shape [6]; expected [2, 3], one value a token",
    ),
    "mask": (_stats(ROWS, mask=torch.ones(2)), ValueError, "mask has shape [2]; expected [2, 3], one value a token"),
    "loss mask": (
        _loss(ROWS, ROWS, mask=torch.ones(3, 2).bool()), ValueError, "mask has shape [3, 2]; expected [2, 3]",
    ),
    "weight": (
        _loss(ROWS, ROWS, weight=torch.ones(2, 3, 1)), ValueError, "weight has shape [2, 3, 1]; expected [2, 3]",
    ),
    "exclude": (_stats(ROWS, exclude=LABELS[0]), ValueError, "exclude has shape [3]; expected [2, 3]"),
    "temperature": (_stats(ROWS, temperature=torch.ones(3)), ValueError, "temperature has shape [3]; expected [2, 3]"),
    "normalizer": (
        _loss(ROWS, ROWS, normalizer=torch.ones(2)), ValueError, "normalizer has shape [2]; expected a number",
    ),
    "stride": (
        _stats(torch.zeros(8, 5).T), ValueError, "logits has stride 5 in the vocabulary dimension; expected 1",
    ),
    "reference stride": (
        _loss(torch.zeros(5, 8), torch.zeros(8, 5).T), ValueError, "reference_logits has stride 5 in the vocabulary",
    ),
    "more labels than columns": (
        _stats(ROWS, labels=torch.zeros(2, 3, 9, dtype=torch.int64), stats=["logprob"]), ValueError,
        "labels has K = 9 a token; expected at most 8, the vocabulary size",
    ),
    "vocab_size above the width": (_stats(ROWS, vocab_size=9), ValueError, "vocab_size is 9; expected 1 to 8"),
    "vocab_size of 0": (_stats(ROWS, vocab_size=0), ValueError, "vocab_size is 0; expected 1 to 8"),
    "vocab_size above the reference": (
        _stats(ROWS, torch.zeros(2, 3, 5), stats=["js"], vocab_size=6), ValueError,
        "vocab_size is 6; expected at most 5, the width of reference_logits",
    ),
}  # fmt: skip

TYPES: dict[str, Case] = {
    "logits list": (_stats([[0.0]]), TypeError, "logits is list; expected a torch.Tensor"),
    "logits dtype": (_stats(ROWS.int()), TypeError, "logits has dtype torch.int32; expected float32, bfloat16"),
    "reference dtype": (
        _loss(ROWS, ROWS.long()), TypeError, "reference_logits has dtype torch.int64; expected float32",
    ),
    "reference list": (_loss(ROWS, [[0.0]]), TypeError, "reference_logits is list; expected a torch.Tensor"),
    "labels dtype": (
        _stats(ROWS, labels=LABELS.float(), stats=["logprob"]), TypeError,
        "labels has dtype torch.float32; expected int64",
    ),
    "loss labels dtype": (
        _loss(ROWS, ROWS, labels=LABELS.bool()), TypeError, "labels has dtype torch.bool; expected int64",
    ),
    "exclude dtype": (
        _stats(ROWS, exclude=LABELS.float()), TypeError, "exclude has dtype torch.float32; expected int64",
    ),
    # Whose class 156 would be −100.
    "labels of bytes": (
        _loss(ROWS, ROWS, labels=LABELS.to(torch.uint8)), TypeError, "labels has dtype torch.uint8; expected int64",
    ),
    "exclude of bytes, shifted": (
        _stats(ROWS, exclude=LABELS.to(torch.uint8), shift=True), TypeError, "exclude has dtype torch.uint8; expected",
    ),
    "token ids of bytes": (
        lambda: kk.policy_loss(ROWS, LABELS.to(torch.uint8), torch.ones(2)), TypeError,
        "token_ids has dtype torch.uint8; expected int64",
    ),
    "labels of bytes in a recipe": (
        lambda: kk.recipes.dft_loss(ROWS, LABELS.to(torch.uint8)), TypeError, "labels has dtype torch.uint8; expected",
    ),
    "mask dtype": (
        _stats(ROWS, mask=torch.ones(2, 3)), TypeError, "mask has dtype torch.float32; expected bool or integers",
    ),
    "mask list": (_loss(ROWS, ROWS, mask=[1, 0]), TypeError, "mask is list; expected a torch.Tensor"),
    "weight list": (_loss(ROWS, ROWS, weight=[1.0]), TypeError, "weight is list; expected a torch.Tensor"),
    "temperature string": (
        _stats(ROWS, temperature="hot"), TypeError, "temperature is str; expected a float or a tensor",
    ),
    "beta bool": (_loss(ROWS, ROWS, "js", beta=True), TypeError, "beta is bool; expected a float or a tensor [2, 3]"),
    "stats string": (_stats(ROWS, stats="entropy"), TypeError, "stats is the string 'entropy'; expected a sequence"),
    "per-batch option of a module": (
        lambda: kk.nn.DivergenceLoss("js", mask=LABELS), TypeError, "mask belongs to a batch; give it to forward()",
    ),
    "device": (
        _loss(ROWS, ROWS.to("meta")), ValueError, "reference_logits is on meta; expected cpu like logits",
    ),
    "labels device": (
        _stats(ROWS, labels=LABELS.to("meta"), stats=["logprob"]), ValueError,
        "labels is on meta; expected cpu like logits",
    ),
}  # fmt: skip

NAMES: dict[str, Case] = {
    "statistic": (
        _stats(ROWS, stats=["entropi"]), ValueError,
        "token_stats: stats: unknown statistic 'entropi'; did you mean entropy",
    ),
    "kind": (
        _loss(ROWS, ROWS, "forwardkl"), ValueError,
        "divergence_loss: kind: unknown statistic 'forwardkl'; did you mean forward_kl",
    ),
    "kind that compares nothing": (_loss(ROWS, ROWS, "entropy"), ValueError, "kind: unknown statistic 'entropy'"),
    "kind of a module": (
        lambda: kk.nn.DivergenceLoss("jss"), ValueError,
        "DivergenceLoss: kind: unknown statistic 'jss'; did you mean js",
    ),
    "nothing alike": (_stats(ROWS, stats=["zzzzzz"]), ValueError, "unknown statistic 'zzzzzz' (known: logprob, "),
    "no statistics": (_stats(ROWS, stats=[]), ValueError, "stats is empty; expected at least one of logprob"),
    "twice": (_stats(ROWS, stats=["entropy", "entropy"]), ValueError, "stats names a statistic twice"),
    "reduction": (_loss(ROWS, ROWS, reduction="avg"), ValueError, "reduction is 'avg'; expected mean, sum or none"),
    "backend": (
        _stats(ROWS, backend="tpu"), ValueError,
        "backend is 'tpu'; expected auto or one of cpu, cuda, triton, reference",
    ),
    "no reference": (
        _stats(ROWS, stats=["js"]), ValueError, "reference_logits is None; js compares two rows and needs them",
    ),
    "no labels": (_stats(ROWS, stats=["logprob"]), ValueError, "labels is None; logprob needs one label a token"),
}  # fmt: skip

NAN, INF = float("nan"), float("inf")
VALUES: dict[str, Case] = {
    "label too large": (
        _stats(ROWS, labels=_labels((1, 2), 8), stats=["logprob"]), IndexError,
        "token_stats: labels[1, 2] is 8; expected 0 to 7 or ignore_index = -100",
    ),
    "label below 0": (
        _stats(ROWS, labels=_labels((0, 1), -1), stats=["logprob"]), IndexError, "labels[0, 1] is -1; expected 0 to 7",
    ),
    "label in the padding": (
        _stats(ROWS, labels=_labels((0, 2), 6), stats=["logprob"], vocab_size=6), IndexError,
        "labels[0, 2] is 6; expected 0 to 5",
    ),
    "one of K labels": (
        _stats(ROWS, labels=_labels((1, 0, 3), 99, (2, 3, 4)), stats=["logprob"]), IndexError,
        "labels[1, 0, 3] is 99; expected 0 to 7",
    ),
    "exclude": (
        _stats(ROWS, exclude=_labels((1, 1), 8)), IndexError, "exclude[1, 1] is 8; expected 0 to 7 or -1 for none",
    ),
    "temperature 0": (_stats(ROWS, temperature=0), ValueError, "temperature is 0; expected above 0 and finite"),
    "temperature below 0": (_loss(ROWS, ROWS, temperature=-1.5), ValueError, "temperature is -1.5; expected above 0"),
    "temperature NaN": (_stats(ROWS, temperature=NAN), ValueError, "temperature is nan; expected above 0 and finite"),
    "temperature infinite": (
        _stats(ROWS, temperature=INF), ValueError, "temperature is inf; expected above 0 and finite",
    ),
    "one token's temperature": (
        _stats(ROWS, temperature=torch.tensor([[1.0, 2.0, 1.0], [1.0, -3.0, 1.0]])), ValueError,
        "temperature is -3.0; expected",
    ),
    "reference_temperature": (
        _loss(ROWS, ROWS, reference_temperature=0.0), ValueError,
        "reference_temperature is 0.0; expected above 0 and finite",
    ),
    "beta above 1": (_loss(ROWS, ROWS, "js", beta=1.2), ValueError, "beta is 1.2; expected between 0 and 1 for js"),
    "beta below 0": (_loss(ROWS, ROWS, "js", beta=-0.1), ValueError, "beta is -0.1; expected between 0 and 1 for js"),
    "one token's beta": (
        _loss(ROWS, ROWS, "js", beta=torch.full((2, 3), 2.0)), ValueError,
        "beta is 2.0; expected between 0 and 1 for js",
    ),
    "skew alpha": (
        _loss(ROWS, ROWS, "skew_kl", alpha=1.5), ValueError, "alpha is 1.5; expected between 0 and 1 for skew_kl",
    ),
    "renyi pole": (
        _loss(ROWS, ROWS, "renyi", alpha=1.0), ValueError, "alpha is 1.0; expected above 0, finite and not 1",
    ),
    "renyi at 0": (
        _loss(ROWS, ROWS, "renyi", alpha=0.0), ValueError, "alpha is 0.0; expected above 0, finite and not 1",
    ),
    "alpha infinite": (_loss(ROWS, ROWS, "alpha", alpha=INF), ValueError, "alpha is inf; expected finite for alpha"),
    "alpha_beta pole in alpha": (
        _loss(ROWS, ROWS, "alpha_beta", alpha=0.0), ValueError,
        "alpha is 0.0; expected finite and not 0 (a pole) for alpha_beta",
    ),
    "alpha_beta pole in beta": (
        _loss(ROWS, ROWS, "alpha_beta", beta=0.0), ValueError, "beta is 0.0; expected finite and not 0",
    ),
    "alpha_beta pole in the sum": (
        _loss(ROWS, ROWS, "alpha_beta", alpha=0.5, beta=-0.5), ValueError,
        "alpha + beta is 0.0; expected not 0 (a pole)",
    ),
    "normalizer 0": (_loss(ROWS, ROWS, normalizer=0), ValueError, "normalizer is 0; expected a number above 0"),
    "temperature with a gradient": (
        _stats(ROWS, temperature=torch.ones(2, 3, requires_grad=True)), ValueError,
        "temperature requires grad; gradients flow to the logits only, pass temperature.detach()",
    ),
}  # fmt: skip

GROUPS = {"shape": SHAPES, "type": TYPES, "name": NAMES, "value": VALUES, "policy": POLICY}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str) -> None:
    call, error, message = CASES[case]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert caught.type is error


def test_the_backend_from_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLDIV_BACKEND", "tpu")
    with pytest.raises(
        ValueError, match="KLDIV_BACKEND is 'tpu'; expected auto or one of cpu, cuda, triton, reference"
    ):
        kk.entropy(ROWS)


def test_a_backend_says_why_it_cannot() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve this call: .*(float64|not built)"):
        kk.entropy(ROWS.double(), backend="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0, "vocab": 8}, "plan: rows is 0; expected an integer of at least 1"),
        ({"rows": 4, "vocab": 2.5}, "plan: vocab is 2.5; expected an integer"),
        (
            {"rows": 4, "vocab": 8, "device": "cuda:99"},
            "plan: device is 'cuda:99'; this machine has"
            if torch.cuda.is_available()
            else "plan: device is 'cuda:99', but there is no CUDA device here; name the architecture instead, such as "
            "'sm_90'",
        ),
        (
            {"rows": 4, "vocab": 8, "device": "mps"},
            "plan: device is 'mps'; expected 'cpu', a CUDA device or an architecture such as 'sm_90'",
        ),
        ({"rows": 4, "vocab": 8, "device": "H200"}, "plan: device is 'H200'; expected 'cpu', a CUDA device or an"),
        ({"rows": 4, "vocab": 8, "kind": "jss"}, "plan: kind: unknown statistic 'jss'; did you mean js"),
        ({"rows": 4, "vocab": 8, "kind": "js", "stats": ["js"]}, "plan: stats and kind are both given"),
    ],
)
def test_plan(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kk.plan(**options)
