"""Divergences by name: functions and modules, and the parameters that each kind has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from checks import BACKENDS, DIVERGENCES, taken
from logit_pairs import pair
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.registry import STATISTICS

PARAMETERS = {
    "js": ("beta",), "skew_kl": ("alpha",), "skew_reverse_kl": ("alpha",), "renyi": ("alpha",), "alpha": ("alpha",),
    "alpha_beta": ("alpha", "beta"),
}  # fmt: skip
NAMED: dict[str, Callable[..., Tensor]] = {
    "forward_kl": kk.forward_kl,
    "reverse_kl": kk.reverse_kl,
    "jeffreys": kk.jeffreys,
    "js": kk.js_divergence,
    "skew_kl": kk.skew_kl,
    "skew_reverse_kl": kk.skew_reverse_kl,
    "hellinger": kk.hellinger,
    "tvd": kk.tvd,
    "forward_chi2": kk.forward_chi2,
    "reverse_chi2": kk.reverse_chi2,
    "renyi": kk.renyi,
    "alpha": kk.alpha_divergence,
    "alpha_beta": kk.alpha_beta_divergence,
    "triangular": kk.triangular,
    "cauchy_schwarz": kk.cauchy_schwarz,
    "cross_entropy": kk.soft_cross_entropy,
}


def test_the_named_forms() -> None:
    """A divergence may have its kind alone for a name."""
    assert NAMED.keys() <= {name for name in DIVERGENCES if STATISTICS[name].builtin}
    for function in NAMED.values():
        assert getattr(kk, function.__name__) is function
        assert function.__doc__


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_named_forms(kind: str, backend: str) -> None:
    logits, reference = pair()
    common = {"temperature": 1.4, "mask": torch.rand(3, 4) < 0.7, "backend": backend}
    options = {name: {**common, **taken(name, 0.3, 0.8)} for name in NAMED}
    named = NAMED[kind](logits, reference, **options[kind])
    general = kk.divergence_loss(logits, reference, kind, **options[kind])
    assert torch.equal(named, general)
    # Not another divergence's form, nor one with student and teacher exchanged.
    others = [kk.divergence_loss(logits, reference, other, **options[other]) for other in NAMED if other != kind]
    assert not any(torch.allclose(named, other, rtol=1e-4) for other in others)


@pytest.mark.parametrize("given", [0.9, 0.5, torch.full((3, 4), 0.5)], ids=["another", "the default", "per token"])
@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_parameter_is_for_the_kinds_that_have_it(kind: str, name: str, given: float | Tensor) -> None:
    """An error for the others, also where it would be what None means; token_stats serves several kinds at once."""
    logits, reference = pair()
    ids, logprobs = reference.log_softmax(-1).topk(5).indices, reference.log_softmax(-1).topk(5).values
    option, has = {name: given}, PARAMETERS.get(kind, ())
    general = functools.partial(kk.divergence_loss, kind=kind)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("divergence_loss", lambda: kk.divergence_loss(logits, reference, kind, **option)),
        ("divergence_loss", lambda: NAMED.get(kind, general)(logits, reference, **option)),
        ("topk_divergence_loss", lambda: kk.topk_divergence_loss(logits, ids, logprobs, kind, **option)),
        ("topk_divergence_loss", lambda: kk.topk_divergence_from_logits(logits, reference, kind, k=5, **option)),
        ("DivergenceLoss", lambda: kk.nn.DivergenceLoss(kind, **option)),
        ("TopKDivergenceLoss", lambda: kk.nn.TopKDivergenceLoss(kind, **option)),
    ]
    for where, call in calls:
        if name in has:
            call()
            continue
        what = "given" if isinstance(given, Tensor) else given
        allowed = ", ".join(other for other in DIVERGENCES if name in PARAMETERS.get(other, ()))
        with pytest.raises(ValueError, match=rf"^{where}: {name} is {what}, which kind '{kind}' has no use for; it is"
                           rf" for {allowed}$"):  # fmt: skip
            call()
    if name in has:
        half = kk.divergence_loss(logits, reference, kind, **{name: 0.5})
        assert torch.equal(half, kk.divergence_loss(logits, reference, kind))
    kk.token_stats(logits, reference, stats=list({kind, "js", "renyi"}), **option)


@pytest.mark.parametrize(
    ("module", "kind", "options"),
    [
        (kk.nn.DivergenceLoss("renyi", alpha=0.3), "renyi", {"alpha": 0.3}),
        (kk.nn.KLDivLoss(temperature=2.0), "forward_kl", {"temperature": 2.0}),
        (kk.nn.KLDivLoss(reverse=True), "reverse_kl", {}),
        (kk.nn.JSDivLoss(0.9), "js", {"beta": 0.9}),
        (kk.nn.JSDivLoss(), "js", {"beta": 0.5}),
        (kk.nn.HellingerLoss(reduction="sum"), "hellinger", {"reduction": "sum"}),
    ],
    ids=repr,
)
def test_modules(module: kk.nn.DivergenceLoss, kind: str, options: dict[str, object]) -> None:
    logits, reference = pair()
    mask = torch.rand(3, 4) < 0.7
    assert torch.equal(
        module(logits, reference, mask=mask), kk.divergence_loss(logits, reference, kind, mask=mask, **options)
    )
    assert kind in repr(module)
