"""policy_loss: every loss type, masks, aggregations and metrics against the formulas of policy_oracle in float64."""

from __future__ import annotations

from typing import Any

import policy_oracle as oracle
import pytest
import torch
from checks import BACKENDS
from policy_oracle import AGGREGATION, TERMS, NoHostValue, check, leaves, nan_where_masked
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels import ops
from kldiv_kernels.backends import Call
from kldiv_kernels.policy import loss as policy
from kldiv_kernels.policy.options import LOSS_TYPES

AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]


def _arguments(name: str) -> dict[str, Any]:
    loss_type, options, _ = TERMS[name]
    needs = {"normalizer": 30.0} if loss_type == "dr_grpo" else {}
    return {"loss_type": loss_type, **options, **needs}


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, per_sequence: bool) -> None:
    """Value, per-token values and gradient, with NaN in every argument where the mask is False."""
    batch = oracle.batch()
    loss_type, _, term = TERMS[name]
    if per_sequence:
        batch.advantages = batch.advantages[:, :1].expand_as(batch.old)
    logits, again = leaves(batch)
    arguments = _arguments(name)
    sequences = [term(*x) for x in batch.split(batch.gathered(logits), batch.old, batch.advantages) if len(x[0])]
    sequences.insert(3, torch.zeros(0, dtype=torch.float64))
    expected = oracle.aggregate(sequences, AGGREGATION.get(loss_type, "token-mean"), arguments.get("normalizer"))
    advantages = nan_where_masked(batch, batch.advantages)
    if per_sequence:
        advantages = batch.advantages[:, 0].clone()
        advantages[3] = torch.nan
    with torch.no_grad():
        again[~batch.mask] = torch.nan
    out = kk.policy_loss(
        again, batch.token_ids, advantages, old_logprobs=nan_where_masked(batch, batch.old), mask=batch.mask,
        **arguments,
    )  # fmt: skip
    check(batch, expected, logits, out, again)
    assert torch.allclose(out.per_token_loss[batch.mask], torch.cat(sequences), rtol=1e-10)
    assert not out.per_token_loss[~batch.mask].any()


def test_every_loss_type_has_a_formula() -> None:
    assert {loss_type for loss_type, _, _ in TERMS.values()} == set(LOSS_TYPES)


@pytest.mark.parametrize("count_empty", [True, False])
@pytest.mark.parametrize("normalizer", [None, 17.0, torch.tensor([23])], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation: str, normalizer: float | Tensor | None, count_empty: bool) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    sequences = [-a * lp for lp, a in batch.split(batch.gathered(logits), batch.advantages)]
    divisor = None if normalizer is None else float(normalizer)
    expected = oracle.aggregate(sequences, aggregation, divisor, count_empty)
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask.int(),
        aggregation=aggregation, normalizer=normalizer, count_empty_sequences=count_empty,
    )  # fmt: skip
    check(batch, expected, logits, out, again)


@pytest.mark.parametrize("how", ["loss", "token-mean"])
@pytest.mark.parametrize("quantile", [1.0, 0.45])
def test_entropy_bonus_and_quantile(how: str, quantile: float) -> None:
    batch = oracle.batch()
    logits, again = leaves(batch)
    log_q = (logits / 1.3).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    threshold = torch.quantile(entropy[batch.mask].detach(), 1 - quantile)
    kept = batch.mask & (entropy >= threshold)
    assert quantile == 1 or 0 < kept.sum() < batch.mask.sum()
    lp = batch.gathered(logits, 1.3)
    terms = [term for (term,) in batch.split(-batch.advantages * lp * kept)]
    policy_term = oracle.aggregate(terms, "seq-mean-token-sum", 11.0)
    bonus = (entropy * kept).sum() / (11.0 if how == "loss" else kept.sum())
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="reinforce", mask=batch.mask, temperature=1.3,
        entropy_coef=0.3, entropy_quantile=quantile, entropy_aggregation=how, aggregation="seq-mean-token-sum",
        normalizer=11.0,
    )  # fmt: skip
    check(batch, policy_term - 0.3 * bonus, logits, out, again)


def test_token_weights_and_anchor() -> None:
    """The ratio is against the anchor; the off-policy weight still starts from old_logprobs."""
    batch = oracle.batch()
    logits, again = leaves(batch)
    anchor, weights = batch.old + 0.2, torch.randn(batch.old.shape).double()
    off_policy = (batch.old - batch.sampling).exp().clamp(max=1.1)
    terms = [
        w * c * TERMS["dapo"][2](lp, start, a)
        for lp, start, a, w, c in batch.split(batch.gathered(logits), anchor, batch.advantages, weights, off_policy)
        if len(lp)
    ]
    out = kk.policy_loss(
        again, batch.token_ids, batch.advantages, loss_type="dapo", clip_high=oracle.HIGH, mask=batch.mask,
        old_logprobs=batch.old, anchor_logprobs=nan_where_masked(batch, anchor), sampling_logprobs=batch.sampling,
        off_policy_max=1.1, token_weights=nan_where_masked(batch, weights.requires_grad_()),
    )  # fmt: skip
    check(batch, oracle.aggregate(terms, "token-mean", None), logits, out, again)
    assert out.metrics["sampling_kl"].item() == pytest.approx((batch.sampling - batch.old)[batch.mask].mean().item())
    assert out.metrics["off_policy_weight"].item() == pytest.approx(off_policy[batch.mask].mean().item())


def test_only_the_logits_get_a_gradient() -> None:
    batch = oracle.batch()
    logits, _ = leaves(batch)
    names = ("old_logprobs", "anchor_logprobs", "reference_logits", "sampling_logprobs", "token_weights")
    given = (batch.old, batch.old + 0.1, batch.reference_logits, batch.sampling, batch.old)
    others = {name: x.detach().clone().requires_grad_() for name, x in zip(names, given, strict=True)}
    advantages = batch.advantages.clone().requires_grad_()
    out = kk.policy_loss(
        logits, batch.token_ids, advantages, **others, kl_coef=0.1, kl_estimator="reverse_kl", off_policy_max=5.0
    )
    out.loss.backward()
    assert logits.grad.any()
    assert all(x.grad is None for x in (advantages, *others.values()))


def test_columns_at_minus_infinity() -> None:
    """As if they were not there; the entropy p·log p at p = 0 is where TRL's NaN comes from."""
    batch = oracle.batch()
    logits, again = leaves(batch)
    options = {"old_logprobs": batch.old, "entropy_coef": 0.1, "kl_coef": 0.1, "kl_estimator": "js"}
    narrow = kk.policy_loss(
        logits, batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, **options
    )
    gone = torch.full((5, 6, 4), -torch.inf, dtype=torch.float64)
    wide = kk.policy_loss(
        torch.cat([again, gone], -1), batch.token_ids, batch.advantages,
        reference_logits=torch.cat([batch.reference_logits, gone], -1), **options,
    )  # fmt: skip
    batch.mask[:] = True
    check(batch, narrow.loss, logits, wide, again)


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "sapo", "cispo", "gmpo", "topr", "dppo_kl"])
@pytest.mark.parametrize("apart", [300.0, -300.0])
def test_a_ratio_that_would_overflow(loss_type: str, apart: float) -> None:
    """e^300 is infinite in float32, and 0·inf in the gradient of a clip would be NaN."""
    batch = oracle.batch()
    logits = batch.logits.float().requires_grad_()
    old = batch.gathered(batch.logits).float() - apart
    out = kk.policy_loss(logits, batch.token_ids, batch.advantages.float(), loss_type=loss_type, old_logprobs=old)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()


def test_ignored_tokens_are_masked() -> None:
    batch = oracle.batch()
    options = {"old_logprobs": batch.old, "entropy_coef": 0.1}
    by_mask = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, mask=batch.mask, **options)
    ids = batch.token_ids.masked_fill(~batch.mask, -100)
    assert torch.equal(by_mask.loss, kk.policy_loss(batch.logits, ids, batch.advantages, **options).loss)
    # What stands where the mask is False need not be a token at all.
    ids = batch.token_ids.masked_fill(~batch.mask, 12345)
    by_both = kk.policy_loss(batch.logits, ids, batch.advantages, mask=batch.mask, **options)
    assert torch.equal(by_mask.loss, by_both.loss)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "reinforce", "dppo_tv"])
def test_packed_tokens(loss_type: str) -> None:
    """[N, V] is [B, T, V] without sequences."""
    batch = oracle.batch()
    tensors = (batch.old, batch.reference, batch.sampling, batch.mask)
    names = ("old_logprobs", "reference_logprobs", "sampling_logprobs", "mask")
    options = {"loss_type": loss_type, "kl_coef": 0.1, "aggregation": "token-mean", "entropy_coef": 0.2}
    logits, again = leaves(batch)
    whole = kk.policy_loss(
        logits, batch.token_ids, batch.advantages, **dict(zip(names, tensors, strict=True)), **options
    )
    flat = dict(zip(names, (x.reshape(-1) for x in tensors), strict=True))
    packed = kk.policy_loss(
        again.reshape(-1, 9), batch.token_ids.reshape(-1), batch.advantages.reshape(-1), **flat, **options
    )
    assert packed.per_token_loss.shape == (30,)
    assert torch.allclose(packed.per_token_loss, whole.per_token_loss.reshape(-1))
    check(batch, whole.loss, logits, packed, again)


def _needs_sequences(name: str) -> bool:
    loss_type, options, _ = TERMS[name]
    return loss_type in ("gspo", "vespo", "gmpo", "topr") or "importance_level" in options


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (name, shape)
        for name in TERMS
        for shape in [(2, 3), (2, 0), (0, 3), (4,), (0,)]
        if len(shape) == 2 or not _needs_sequences(name)
    ],
    ids=str,
)
def test_no_valid_token(name: str, shape: tuple[int, ...]) -> None:
    """0 with zero gradient and finite metrics, although everything holds NaN."""
    arguments = _arguments(name)
    if len(shape) == 1:
        arguments["aggregation"] = "token-mean"
    nan = torch.full(shape, torch.nan)
    logits = torch.full((*shape, 7), torch.nan, requires_grad=True)
    out = kk.policy_loss(
        logits, torch.zeros(shape, dtype=torch.int64), nan, old_logprobs=nan, sampling_logprobs=nan,
        reference_logprobs=nan, kl_coef=0.1, entropy_coef=0.1, mask=torch.zeros(shape, dtype=torch.bool),
        **arguments,
    )  # fmt: skip
    assert out.loss.item() == 0
    assert not out.per_token_loss.any()
    out.loss.backward()
    assert not logits.grad.any()
    assert all(value.item() == 0 for value in out.metrics.values())


def test_metrics() -> None:
    batch = oracle.batch()
    out = kk.policy_loss(
        batch.logits.requires_grad_(), batch.token_ids, batch.advantages, mask=batch.mask, dual_clip=1.5,
        old_logprobs=nan_where_masked(batch, batch.old), reference_logprobs=batch.reference,
    )  # fmt: skip
    moved = (batch.gathered(batch.logits) - batch.old)[batch.mask].detach()
    ratio, a = moved.exp(), batch.advantages[batch.mask]
    log_q = batch.logits.log_softmax(-1)[batch.mask].detach()
    x = batch.reference[batch.mask].detach() - batch.gathered(batch.logits)[batch.mask].detach()
    expected = {
        "tokens": batch.mask.sum(),
        "entropy": -(log_q.exp() * log_q).sum(-1).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - moved).mean(),
        "clip_fraction_low": ((a < 0) & (ratio < 0.8)).double().mean(),
        "clip_fraction_high": ((a > 0) & (ratio > 1.2)).double().mean(),
        "clip_fraction_dual": ((a < 0) & (ratio > 1.5)).double().mean(),
        "kl": (x.exp() - 1 - x).mean(),
    }
    assert out.metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value.item(), rel=1e-10), name
        assert value > 0
        assert out.metrics[name].shape == ()
        assert not out.metrics[name].requires_grad


@pytest.mark.parametrize("name", [*TERMS, "clip-cov", "kl-cov"])
def test_nothing_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, assemble = oracle.batch(), policy.assemble

    def watched(*arguments: Any) -> kk.PolicyLoss:
        with NoHostValue():
            return assemble(*arguments)

    monkeypatch.setattr(policy, "assemble", watched)
    cov = name.endswith("-cov")
    arguments = {"cov_selection": name[:-4]} if cov else _arguments(name)
    more = {} if arguments.get("loss_type") == "gmpo" else {"entropy_quantile": 0.5}
    out = kk.policy_loss(
        batch.logits, batch.token_ids, batch.advantages, mask=batch.mask, old_logprobs=batch.old, kl_coef=0.1,
        reference_logprobs=batch.reference, sampling_logprobs=batch.sampling, entropy_coef=0.1,
        off_policy_threshold=0.1, **more, **arguments,
    )  # fmt: skip
    assert out.loss.isfinite()


@pytest.mark.parametrize("estimator", ["k3", "reverse_kl"])
def test_the_logits_are_read_by_one_call(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = oracle.batch()
    calls: list[tuple[str, ...]] = []

    def counted(call: Call, *arguments: Any) -> Tensor:
        calls.append(call.stats)
        return statistics(call, *arguments)

    statistics = ops.statistics
    monkeypatch.setattr(ops, "statistics", counted)
    kk.policy_loss(
        batch.logits, batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, kl_coef=0.1,
        kl_estimator=estimator, entropy_coef=0.1, entropy_quantile=0.5,
    )  # fmt: skip
    assert calls == [("logprob", "entropy", "reference_logprob" if estimator == "k3" else estimator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends(backend: str, dtype: torch.dtype) -> None:
    """Everything at once, in float32 and bfloat16, against float64 on the same logits."""
    batch = oracle.batch()
    options = {"kl_coef": 0.1, "kl_estimator": "reverse_kl", "entropy_coef": 0.05, "mask": batch.mask}
    logits = batch.logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    reference = batch.reference_logits.to(dtype)
    rest = {"old_logprobs": batch.old.float(), **options}
    advantages = batch.advantages.float()
    out = kk.policy_loss(logits, batch.token_ids, advantages, reference_logits=reference, backend=backend, **rest)
    want = kk.policy_loss(
        exact, batch.token_ids, advantages, reference_logits=reference.double(), backend="reference", **rest
    )
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    out.loss.backward()
    want.loss.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * exact.grad.abs().max())


def test_module() -> None:
    batch = oracle.batch()
    module = kk.nn.PolicyLoss(preset="verl", loss_type="cispo", clip_high=0.3, temperature=0.7)
    tensors = {"old_logprobs": batch.old, "mask": batch.mask}
    got = module(batch.logits, batch.token_ids, batch.advantages, **tensors)
    options = {"preset": "verl", "loss_type": "cispo", "clip_high": 0.3, "temperature": 0.7}
    expected = kk.policy_loss(batch.logits, batch.token_ids, batch.advantages, **tensors, **options)
    assert torch.equal(got.loss, expected.loss)
    assert repr(module) == "PolicyLoss(preset='verl', loss_type='cispo', clip_high=0.3, temperature=0.7)"


@pytest.mark.parametrize("preset", [None, "trl", "verl"])
def test_torch_compile(preset: str | None) -> None:
    """One graph, the same loss and gradient."""
    batch = oracle.batch()
    logits, again = leaves(batch)

    def loss(x: Tensor) -> Tensor:
        return kk.policy_loss(
            x, batch.token_ids, batch.advantages, old_logprobs=batch.old, mask=batch.mask, preset=preset,
            sampling_logprobs=batch.sampling, entropy_coef=0.1, entropy_quantile=0.5,
        ).loss  # fmt: skip

    expected, got = loss(logits), torch.compile(loss, backend="aot_eager", fullgraph=True)(again)
    assert torch.allclose(expected, got)
    assert torch.allclose(*(torch.autograd.grad(y, x)[0] for y, x in ((expected, logits), (got, again))))


def test_what_the_policy_says_of_each_token() -> None:
    batch = oracle.batch()
    out = kk.policy_loss(batch.logits.requires_grad_(), batch.token_ids, batch.advantages, mask=batch.mask)
    log_q = batch.logits.detach().log_softmax(-1)
    for got, expected in ((out.logprob, batch.gathered(log_q)), (out.entropy, -(log_q.exp() * log_q).sum(-1))):
        assert torch.allclose(got, torch.where(batch.mask, expected, 0.0), rtol=1e-12)
        assert not got.requires_grad
