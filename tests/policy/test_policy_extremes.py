"""policy_loss at log-ratios up to ±10,000: in every form of the loss, value and gradient of the branch taken."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from checks import BACKENDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mpmath import mp
from policy_extremes import Completion, per_token
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.policy.options import CHOICES, CLIPPED, DPPO, LOSS_TYPES, SAMPLED_KL, PolicyOptions, resolve

APART = (0.1, -0.3, 5.0, -5.0, 30.0, -30.0, 80.0, -80.0, 100.0, -100.0, 710.0, -710.0, 1e4, -1e4)
LARGEST, SMALLEST = 1e38, 1e-37


@st.composite
def options_of(draw: st.DrawFn, loss_type: str, sampled: bool) -> tuple[str | None, dict[str, Any]]:
    """A preset, and options of policy_loss that go together; `sampled`: there are sampling_logprobs."""
    out: dict[str, Any] = {"loss_type": loss_type, "kl_coef": 0.0}
    if draw(st.booleans()):
        out["log_ratio_clamp"] = draw(st.sampled_from([math.inf, 20.0, (-math.inf, 10.0), 200.0]))
    if loss_type in CLIPPED:
        out |= draw(st.sampled_from([{}, {}, {"delta": 1.7}, {"delta": 0.9}, {"dual_clip": 3.0}]))
    if loss_type in (*CLIPPED, "cispo", "gmpo", *DPPO) and draw(st.booleans()):
        out["clip_high"] = draw(st.sampled_from([0.28, 4.0, math.inf]))
    if loss_type in (*CLIPPED, "cispo", "sapo", "topr") and draw(st.booleans()):
        levels = ["sequence", "sequence_sum"] + ["token"] * (loss_type != "gspo")
        out["importance_level"] = draw(st.sampled_from(levels))
    if sampled and loss_type != "vespo":
        out["off_policy"] = draw(st.sampled_from(CHOICES["off_policy"]))
    if draw(st.booleans()):
        estimator = draw(st.sampled_from(SAMPLED_KL))
        out |= {"kl_coef": 0.5, "kl_estimator": estimator}
        if estimator != "k3_plus" and draw(st.booleans()):
            out["kl_bias_correction"] = draw(st.booleans())
        out |= draw(st.sampled_from([{}, {}, {"kl_clamp": 10.0}, {"kl_log_ratio_clamp": 20.0}]))
    return draw(st.sampled_from([None, "trl", "verl", "nemo_rl"])), out


@st.composite
def batches(draw: st.DrawFn, loss_type: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Logits, token ids, mask, and lists by name of what stands beside the log-probability, [2, 3] each."""

    def each(values: Any) -> Tensor:
        return torch.tensor(draw(st.lists(st.sampled_from(values), min_size=6, max_size=6))).reshape(2, 3)

    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    logits = torch.randn(2, 3, 5, generator=generator)
    token_ids = torch.randint(5, (2, 3), generator=generator)
    logits.scatter_add_(-1, token_ids[..., None], each([0.0, 0.0, 3.0, -30.0, -100.0, -1e4])[..., None])
    mask = torch.tensor(draw(st.sampled_from([[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [0, 1, 1]]]))).bool()
    apart = {"advantages": each([1.5, 0.5, 0.0, -0.7, -2.0]), "reference": each(APART), "old": each(APART)}
    if loss_type not in ("topr", *DPPO) and draw(st.booleans()):
        del apart["old"]
    if draw(st.booleans()):
        apart["sampling"] = each(APART)
    if draw(st.booleans()):
        apart["token_weights"] = each([0.0, 1.0, 0.3])
    return logits, token_ids, mask, apart


# The losses that differ in their aggregation only are one.
@pytest.mark.parametrize("loss_type", ["grpo", *(name for name in LOSS_TYPES if name == "gspo" or name not in CLIPPED)])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_extreme_log_ratios(backend: str, loss_type: str, data: st.DataObject) -> None:
    logits, token_ids, mask, apart = data.draw(batches(loss_type))
    preset, given_options = data.draw(options_of(loss_type, "sampling" in apart))
    options = resolve("policy_loss", preset, given_options)
    logits = logits.requires_grad_()
    now = kk.selective_log_softmax(logits.detach(), token_ids, backend=backend)
    beside = {
        f"{name}_logprobs": (now - apart[name]).clamp_max(-1e-3)
        for name in ("old", "sampling", "reference")
        if name in apart and (name != "reference" or options.kl_coef)
    }
    beside |= {name: apart[name] for name in ("token_weights",) if name in apart}
    for per_token_gradient in (False, True):
        out = kk.policy_loss(
            logits, token_ids, apart["advantages"], preset=preset, mask=mask, aggregation="token-sum", normalizer=7.0,
            per_token_gradient=per_token_gradient, backend=backend, **beside, **given_options,
        )  # fmt: skip
        (got,) = torch.autograd.grad(out.loss, logits)
        assert not got[~mask].any()
        tensors = {"logprob": out.logprob, "advantages": apart["advantages"], **beside}
        for b, kept in enumerate(mask):
            completion = Completion(**{name: x[b][kept].tolist() for name, x in tensors.items()})
            _check(completion, options, *(x[b][kept] for x in (out.per_token_loss, got, logits.detach(), token_ids)))


def _check(
    completion: Completion, options: PolicyOptions, values: Tensor, gradient: Tensor, logits: Tensor, ids: Tensor
) -> None:
    with mp.workdps(40):
        tokens = per_token(completion, options)
        logprob = torch.tensor(completion.logprob)
        beside = (completion.old_logprobs, completion.reference_logprobs, completion.sampling_logprobs)
        far = max(((logprob - torch.tensor(x)).abs().max().item() for x in beside if x is not None), default=0.0)
        # Of a log-ratio that is a difference of float32 numbers, and of the power of e that it is.
        tolerance = 1e-5 + 5e-7 * far
        parts = [(term * weight, kl) for term, weight, kl in tokens]
        # What is beyond float32's numbers before it is weighted is infinite, unless its weight is 0.
        beyond = [
            [weight != 0 and (abs(x) > LARGEST or weight < SMALLEST) for x in (term.value, *term.slopes)]
            for term, weight, _ in tokens
        ]  # fmt: skip
        columns = range(len(tokens))
        slopes = [[part.slopes[i] for pair in parts for part in pair] for i in columns]
        sizes = [sum(abs(x) for x in column) for column in slopes]
        # Tokens that share a ratio share its rounding.
        shared = options.importance_level != "token" or options.loss_type == "gmpo"
        for i, pair in enumerate(parts):
            size = sum(abs(part.value) for part in pair)
            if size < LARGEST and not beyond[i][0]:
                want = float(pair[0].value + pair[1].value)
                assert abs(values[i].item() - want) <= tolerance * float(size) + 1e-30, (i, values[i], want)
            if sizes[i] < LARGEST and not any(row[i + 1] for row in beyond):
                log_q = logits[i].double().log_softmax(-1)
                score = torch.nn.functional.one_hot(ids[i], len(log_q)) - log_q.exp()
                error = (gradient[i].double() - float(sum(slopes[i])) / 7 * score).abs().max().item()
                size = max(sizes) if shared else sizes[i]
                assert error <= tolerance * float(size) + 1e-30, (i, gradient[i], score, sum(slopes[i]) / 7)


# With a probability of ½ for the token and a log-ratio of 100 unless said otherwise: arguments, loss, gradient.
_PRESETS = [{"preset": preset, "loss_type": "gspo"} for preset in ("trl", "nemo_rl")]
CASES: list[tuple[dict[str, Any], float, list[float]]] = [
    *[(options, -1.2, [0.0, 0.0]) for options in _PRESETS],
    *[(options | {"advantages": 0.0}, 0.0, [0.0, 0.0]) for options in _PRESETS],
    *[(options | {"advantages": -1.0, "delta": 2.0}, 2.0, [0.0, 0.0]) for options in _PRESETS],
    *[(options | {"advantages": -1.0, "dual_clip": 3.0}, 3.0, [0.0, 0.0]) for options in _PRESETS],
    *[
        ({"preset": "trl", "loss_type": loss_type, "advantages": 0.0, "clip_high": math.inf}, 0.0, [0.0, 0.0])
        for loss_type in ("grpo", "cispo", "gmpo")
    ],
    ({"preset": "trl", "loss_type": "sapo"}, -4.0, [0.0, 0.0]),
    ({"preset": "trl", "loss_type": "sapo", "advantages": -1.0}, 4 / 1.05, [0.0, 0.0]),
    ({"preset": "trl", "loss_type": "grpo", "log_ratio_clamp": 95.0}, -1.2, [0.0, 0.0]),
    # k3 of e^199 times the ratio e^−199.
    (
        {"preset": "trl", "logits": [0.0, -200.0], "id": 1, "old": -1.0, "reference": -1.0, "advantages": 0.0},
        1.0, [0.0, 0.0],
    ),
    # e^30 − 31, whose slope is its ratio's but for −30.
    ({"logits": [0.0, -30.0], "id": 1, "old": -30.0, "reference": 0.0, "advantages": 0.0, "kl_bias_correction": True},
     math.exp(30) - 31, [30.0, -30.0]),
    # The slope of k3 whose value is beyond float32.
    ({"logits": [0.0, -100.0], "id": 1, "old": -100.0, "reference": 0.0, "advantages": 0.0, "kl_estimator": "k3_plus"},
     math.inf, [100.0, -100.0]),
    ({"logits": [0.0, -100.0], "id": 1, "old": -100.0, "reference": 0.0, "advantages": 0.0, "preset": "trl"},
     math.inf, [100.0, -100.0]),
    *[
        ({"loss_type": loss_type, "logits": [0.0, -100.0, 0.0], "id": 1, "old": None, "reference": -1.0,
          "kl_clamp": 10.0}, 9.0, [0.5, -1.0, 0.5])
        for loss_type in ("grpo", "gspo")
    ],
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "loss", "gradient"), CASES, ids=str)
@pytest.mark.parametrize("per_token_gradient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_cut_off(
    backend: str, per_token_gradient: bool, arguments: dict[str, Any], loss: float, gradient: list[float]
) -> None:
    """Where a factor overflows in float32 and the loss or its gradient does not."""
    rest = dict(arguments)
    logits = torch.tensor([[rest.pop("logits", [0.0, 0.0])]], requires_grad=True)
    token_ids, advantages = torch.tensor([[rest.pop("id", 0)]]), torch.tensor([rest.pop("advantages", 1.0)])
    for name, default in (("old", -100.0), ("reference", None)):
        value = rest.pop(name, default)
        if value is not None:
            rest[f"{name}_logprobs"] = torch.tensor([[value]])
    if "reference_logprobs" in rest:
        rest["kl_coef"] = 1.0
    out = kk.policy_loss(logits, token_ids, advantages, backend=backend, per_token_gradient=per_token_gradient, **rest)
    assert out.loss.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    (got,) = torch.autograd.grad(out.loss, logits)
    assert got.flatten().tolist() == pytest.approx(gradient, rel=1e-5, abs=1e-6)


def test_the_slope_of_sapo_has_its_digits_where_it_is_flat() -> None:
    """In float32, 1 − sigmoid(r − 1) has two digits at r = 13 and none at 18."""
    for ratio in (2.0, 13.0, 18.0, 40.0):
        logits = torch.zeros(1, 1, 4, requires_grad=True)
        old = kk.selective_log_softmax(logits.detach(), torch.tensor([[1]])) - math.log(ratio)
        for level in ("token", "sequence"):
            out = kk.policy_loss(
                logits, torch.tensor([[1]]), torch.tensor([1.0]), loss_type="sapo", old_logprobs=old,
                importance_level=level,
            )  # fmt: skip
            (got,) = torch.autograd.grad(out.loss, logits)
            r = mp.exp(mp.mpf(float(kk.selective_log_softmax(logits.detach(), torch.tensor([[1]])) - old)))
            wanted = -4 * r / ((1 + mp.exp(1 - r)) * (1 + mp.exp(r - 1))) * 0.75
            assert abs(got[0, 0, 1].item() / float(wanted) - 1) < 1e-4, (ratio, level)
