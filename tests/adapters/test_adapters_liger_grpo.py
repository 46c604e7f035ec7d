"""Liger's `triton_grpo_loss` against float64, sequence by sequence."""

from __future__ import annotations

import math
from typing import Any

import policy_oracle as oracle
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from kldiv_kernels.adapters import liger

LEVELS = [*((name, "token") for name in ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo"))]
LEVELS += [(name, "sequence") for name in ("bnpo", "dapo", "dr_grpo", "grpo", "luspo")]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"temperature": 1.3, "eps_high": 0.3},
    "bias": {"beta": 0.3, "use_bias_correction_kl": True},
    "delta": {"beta": 0.0, "delta": 1.15},
    "on-policy": {"beta": 0.1, "old": None},
    "weights": {"beta": 0.2, "is_ratio": "token"},
    "a weight a sequence": {"beta": 0.0, "is_ratio": "sequence"},
    "items": {"beta": 0.0, "num_items_in_batch": torch.tensor(31), "max_completion_length": 17},
}


def _sequence(
    lp: Tensor, old: Tensor, ref: Tensor, a: Tensor, w: Tensor, kind: str, level: str, o: dict[str, Any]
) -> Any:
    """(loss, KL, clipped) of one sequence's valid tokens, float64."""
    low, high = 1 - o.get("eps_low", 0.2), 1 + o.get("eps_high", 0.4)
    r = ((lp - old) if level == "token" else (lp - old).mean().expand(lp.shape)).exp()
    clipped = torch.zeros_like(lp)
    if kind == "cispo":
        loss, clipped = -r.detach().clamp(max=high - 1) * a * lp, ((r > high - 1) & (a > 0)).double()
    elif kind == "sapo":
        tau = torch.where(a > 0, 1.0, 1.05)
        loss = -4 / tau * torch.sigmoid(tau * (r - 1)) * a
    elif kind == "vespo":
        log_w = (lp - old).sum().detach() + (w.log().sum() if o.get("is_ratio") == "token" else w[:1].log().sum())
        k, rate = (2.0, 3.0) if a[0] >= 0 else (3.0, 2.0)
        loss, w = -(k * log_w + rate * (1 - log_w.exp())).exp() * a * lp, torch.ones_like(w)
    else:
        capped = r.clamp(max=o.get("delta", math.inf))
        loss = torch.max(-a * capped, -a * r.clamp(low, high))
        clipped = torch.where(a > 0, r > high, r < low).double()
    kl = (ref - lp).exp() - (ref - lp) - 1
    if o.get("use_bias_correction_kl"):
        kl = kl * r
    return loss * w + o.get("beta", 0.04) * kl, kl, clipped


def _is_allowed(kind: str, options: dict[str, Any]) -> bool:
    return "delta" not in options or kind not in ("cispo", "sapo", "vespo")


@pytest.mark.parametrize(
    ("kind", "level", "name"),
    [(kind, level, name) for kind, level in LEVELS for name in OPTIONS if _is_allowed(kind, OPTIONS[name])],
)
def test_grpo(kind: str, level: str, name: str) -> None:
    options, batch = dict(OPTIONS[name]), oracle.batch()
    shape, temperature = batch.mask.shape, options.get("temperature", 0.9)
    advantages = batch.advantages[:, 0]
    weights = torch.rand(shape, dtype=torch.float64) + 0.5 if "is_ratio" in options else torch.ones(shape).double()
    if options.get("is_ratio") == "sequence":
        weights = weights[:, :1].expand(shape)
    logits = batch.logits.clone().requires_grad_()
    now = batch.gathered(logits, temperature)
    old, ref = now.detach() if "old" in options else batch.old, batch.reference
    parts = [
        _sequence(*tensors, kind, level, options) if len(tensors[0]) else (torch.zeros(0).double(),) * 3
        for tensors in batch.split(now, old, ref, advantages[:, None].expand(shape), weights)
    ]
    how = oracle.AGGREGATION.get(kind, "token-mean")
    normalizer = None
    if kind == "dr_grpo":
        normalizer = shape[0] * options.get("max_completion_length", shape[1])
    elif "num_items_in_batch" in options and kind in ("dapo", "cispo", "vespo"):
        normalizer = 31
    expected = oracle.aggregate([loss for loss, _, _ in parts], how, normalizer)

    raw = pad(batch.logits, (0, 0, 0, 1), value=torch.nan).requires_grad_()
    given = None if options.get("is_ratio") is None else weights if options["is_ratio"] == "token" else weights[:, 0]
    call = {key: value for key, value in options.items() if key not in ("old", "is_ratio")}
    arguments = (
        raw, None if "old" in options else oracle.nan_where_masked(batch, old),
        oracle.nan_where_masked(batch, ref), batch.token_ids, advantages, batch.mask.int(),
    )  # fmt: skip
    call |= {"loss_type": kind, "importance_sampling_level": level, "vllm_is_ratio": given}
    loss, metrics = liger.triton_grpo_loss(*arguments, reduce=True, **call)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
    (wanted,), (got,) = torch.autograd.grad(expected, logits), torch.autograd.grad(loss, raw)
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(got[:, :-1], wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())
    assert not got[:, -1].any()

    per_token, kl, clipped = liger.triton_grpo_loss(*arguments, reduce=False, **call)
    columns = [torch.cat([part[i] for part in parts]) for i in range(3)]
    for values, column in zip((per_token, kl, clipped), columns, strict=True):
        if values is None:
            assert options["beta"] == 0
            continue
        assert torch.allclose(values[batch.mask], column, rtol=1e-10, atol=1e-12)
        assert not values[~batch.mask].any()
    means = [column.mean().item() for column in columns[1:]][options.get("beta", 0.04) == 0 :]
    assert [x.item() for x in metrics] == pytest.approx(means, rel=1e-10, abs=1e-12)


def test_bad_calls() -> None:
    ids, logits = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4, 5)
    grpo: dict[str, Any] = {"advantages": torch.ones(2), "ref_logp": None, "old_logp": None, "beta": 0.0}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"Unknown loss_type 'ppo'. Supported types: \['grpo', ", {"loss_type": "ppo"}),
        (
            ValueError,
            r"loss_type='vespo' requires importance_sampling_level='token'.",
            {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        ),
        (
            ValueError,
            r"Sequence-level importance sampling is not supported for loss_type='cispo'. Use "
            r"importance_sampling_level='token' instead.",
            {"loss_type": "cispo", "importance_sampling_level": "sequence"},
        ),
        (
            ValueError,
            r"importance_sampling_level must be 'token' or 'sequence', got word",
            {"importance_sampling_level": "word"},
        ),
        (
            ValueError,
            r"delta \(two-sided clipping\) is not supported for loss_type='sapo'.",
            {"loss_type": "sapo", "delta": 2.0},
        ),
        (
            ValueError,
            r"sapo_temperature_neg must be positive, got -1.0",
            {"loss_type": "sapo", "sapo_temperature_neg": -1.0},
        ),
        (ValueError, r"ref_logp is None; beta = 0.1 needs it, shape \[2, 3\]", {"beta": 0.1}),
        (ValueError, r"old_logp has shape \[2, 4\]; expected \[2, 3\]", {"old_logp": torch.zeros(2, 4)}),
        (ValueError, r"advantages has shape \[3\]; expected \[2\]", {"advantages": torch.ones(3)}),
        (ValueError, r"vllm_is_ratio has shape \[1, 3\]", {"vllm_is_ratio": torch.ones(1, 3)}),
        (IndexError, r"triton_grpo_loss: completion_ids\[0, 1\] is 5; expected 0 to 4", {"completion_ids": ids + 5}),
    ]
    wrong[-1][2]["completion_ids"][0, 0] = 4
    for error, message, change in wrong:
        with pytest.raises(error, match=message):
            liger.triton_grpo_loss(**{"logits": logits, "completion_ids": ids, **grpo, **change})
    with pytest.raises(ValueError, match=r"completion_ids has shape \[2, 4\]; expected \[2, 3\]"):
        liger.triton_grpo_loss(logits, None, None, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2), beta=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prompt", [0, 3])
def test_fused_selective_log_softmax(prompt: int, dtype: torch.dtype) -> None:
    """No gradient, masked tokens 0 whatever they hold, the prompt's ids and mask before the completion's."""
    logits = (4 * torch.randn(5, 8, 37)).to(dtype)
    logits[0, 2, 5:] = torch.finfo(dtype).min
    ids = torch.randint(37, (5, 7 + prompt))
    ids[0, prompt + 2] = 3
    mask = (torch.rand(5, 7 + prompt) < 0.7).int()
    mask[0, prompt + 2] = 1
    kept = mask[:, prompt:] != 0
    expected = (logits.double()[:, :-1] / 0.8).log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
    given = torch.where(torch.nn.functional.pad(kept, (0, 1))[..., None], logits, torch.nan).requires_grad_()
    got = liger.fused_selective_log_softmax(given, torch.where(mask != 0, ids, 99), 0.8, mask)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not got.requires_grad
    assert torch.allclose(got.double(), torch.where(kept, expected, 0.0), rtol=1e-5, atol=1e-5)
    # The default temperature is Liger's, and a mask of the completion alone goes with ids of both.
    got = liger.fused_selective_log_softmax(logits, ids, mask=mask[:, prompt:])
    expected = (logits.double()[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[:, prompt:, None])[..., 0]
    assert torch.allclose(got.double(), torch.where(kept, expected, 0.0), rtol=1e-5, atol=1e-5)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, r"logits has shape \[8, 37\]; expected \[B, L \+ 1, V\]", (logits[0], ids)),
        (ValueError, r"input_ids has shape \[5, 6\]; expected \[5, 7 or more\]", (logits, ids[:, :6])),
        (ValueError, r"mask has shape \[4, .*; expected \[5, 7 or more\]", (logits, ids, 0.9, mask[:4])),
        (TypeError, r"input_ids has dtype torch.float32", (logits, ids.float())),
        (ValueError, r"fused_selective_log_softmax: temperature is 0", (logits, ids, 0)),
        (IndexError, r"fused_selective_log_softmax: input_ids\[:, -L:\]\[0, 0\] is 43; expected 0", (logits, ids + 40)),
    ]
    wrong[-1][2][1][0, prompt] = 43
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            liger.fused_selective_log_softmax(*arguments)
