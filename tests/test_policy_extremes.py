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
from kldiv_kernels.policy_options import CLIPPED, DPPO, LOSS_TYPES, SAMPLED_KL, resolve

APART = (0.1, -0.3, 5.0, -5.0, 30.0, -30.0, 80.0, -80.0, 100.0, -100.0, 710.0, -710.0, 1e4, -1e4)
LARGEST, SMALLEST = 1e38, 1e-37


@st.composite
def options_of(draw: st.DrawFn, loss_type: str) -> dict[str, Any]:
    """Options of policy_loss that go together, the KL included."""
    out: dict[str, Any] = {"loss_type": loss_type, "preset": draw(st.sampled_from([None, "trl", "verl", "nemo_rl"]))}
    if draw(st.booleans()):
        out["log_ratio_clamp"] = draw(st.sampled_from([math.inf, 20.0, (-math.inf, 10.0), 200.0]))
    if loss_type in CLIPPED:
        out |= draw(st.sampled_from([{}, {}, {"delta": 1.7}, {"delta": 0.9}, {"dual_clip": 3.0}]))
    if loss_type in (*CLIPPED, "cispo", "gmpo", *DPPO) and draw(st.booleans()):
        out["clip_high"] = draw(st.sampled_from([0.28, 4.0, math.inf]))
    if loss_type in (*CLIPPED, "cispo", "sapo", "topr") and draw(st.booleans()):
        levels = ["sequence", "sequence_sum"] + ["token"] * (loss_type != "gspo")
        out["importance_level"] = draw(st.sampled_from(levels))
    out["kl_coef"] = 0.0
    if draw(st.booleans()):
        estimator = draw(st.sampled_from(SAMPLED_KL))
        out |= {"kl_coef": 0.5, "kl_estimator": estimator}
        if estimator != "k3_plus" and draw(st.booleans()):
            out["kl_bias_correction"] = draw(st.booleans())
        out |= draw(st.sampled_from([{}, {}, {"kl_clamp": 10.0}, {"kl_log_ratio_clamp": 20.0}]))
    return out


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
        apart["weights"] = each([0.0, 1.0, 0.3])
    return logits, token_ids, mask, apart


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_extreme_log_ratios(backend: str, loss_type: str, data: st.DataObject) -> None:
    logits, token_ids, mask, apart = data.draw(batches(loss_type))
    given_options = data.draw(options_of(loss_type))
    preset, given_options = given_options["preset"], {k: v for k, v in given_options.items() if k != "preset"}
    if "sampling" in apart and loss_type != "vespo":
        given_options["off_policy"] = data.draw(
            st.sampled_from(["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
        )
    options = resolve("policy_loss", preset, given_options)
    logits = logits.requires_grad_()
    now = kk.selective_log_softmax(logits.detach(), token_ids, backend=backend)

    def beside(name: str) -> Tensor | None:
        return (now - apart[name]).clamp_max(-1e-3) if name in apart else None

    old = beside("old")
    given_tensors = {
        "old_logprobs": old, "sampling_logprobs": beside("sampling"), "token_weights": apart.get("weights"),
        "reference_logprobs": beside("reference") if options.kl_coef else None,
    }  # fmt: skip
    for per_token_gradient in (False, True):
        out = kk.policy_loss(
            logits, token_ids, apart["advantages"], preset=preset, mask=mask, aggregation="token-sum", normalizer=7.0,
            per_token_gradient=per_token_gradient, backend=backend, **given_tensors, **given_options,
        )  # fmt: skip
        (got,) = torch.autograd.grad(out.loss, logits)
        assert not got[~mask].any()
        for b in range(2):
            kept = {
                name: None if x is None else x[b][mask[b]].tolist()
                for name, x in (given_tensors | {"advantages": apart["advantages"], "logprob": out.logprob}).items()
            }
            sequence = Completion(
                kept["logprob"], kept["old_logprobs"], kept["advantages"], kept["reference_logprobs"],
                kept["sampling_logprobs"], kept["token_weights"],
            )  # fmt: skip
            _check(sequence, options, out.per_token_loss[b][mask[b]], got[b][mask[b]], logits[b], token_ids[b], mask[b])


def _check(
    sequence: Completion, options: Any, values: Tensor, gradient: Tensor, logits: Tensor, ids: Tensor, mask: Tensor
) -> None:
    with mp.workdps(40):
        tokens = per_token(sequence, options)
        others = [other for other in (sequence.old, sequence.reference, sequence.sampling) if other is not None]
        far = max((abs(x - y) for other in others for x, y in zip(other, sequence.logprob, strict=True)), default=0.0)
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
                log_q = logits[mask][i].detach().double().log_softmax(-1)
                score = torch.nn.functional.one_hot(ids[mask][i], len(log_q)) - log_q.exp()
                error = (gradient[i].double() - float(sum(slopes[i])) / 7 * score).abs().max().item()
                size = max(sizes) if shared else sizes[i]
                assert error <= tolerance * float(size) + 1e-30, (i, gradient[i], score, sum(slopes[i]) / 7)
