"""What the papers' losses must be in special cases, with exact expectations over four tokens in place of samples."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from recipe_case import B, S, T, batch
from torch import Tensor

import kldiv_kernels as kk

BATCH = {name: x.float() if x.is_floating_point() else x for name, x in batch(seed=2).items()}
LOGITS, IDS, ADVANTAGES, MASK = (BATCH[name] for name in ("logits", "token_ids", "advantages", "mask"))
OLD, TEACHER, EXPERT = (BATCH[f"{name}_logprobs"] for name in ("old", "teacher", "base"))
SPANS = torch.tensor([[1, 1, 0, 0, 1], [0, 2, 2, 0, 2], [0, 0, 0, 1, 2]])
GIVEN: dict[str, dict[str, Any]] = {
    "trrd_loss": {"teacher_logprobs": TEACHER},
    "kdrl_loss": {"teacher_logprobs": TEACHER},
    "trace_loss": {"teacher_logits": BATCH["teacher_logits"], "spans": SPANS, "kl_coef": 0.25},
    "skill_sd_loss": {"teacher_logprobs": TEACHER},
    "calibrl_loss": {"expert_logprobs": EXPERT, "correct": BATCH["correct"]},
}


def of(name: str, *, logits: Tensor = LOGITS, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, of `policy_loss` or of a recipe with what it needs."""
    logits = logits.clone().requires_grad_()
    function = kk.policy_loss if name == "policy_loss" else getattr(kk.recipes, name)
    tensors = {"token_ids": IDS, "advantages": ADVANTAGES, "old_logprobs": OLD, "mask": MASK}
    loss = function(logits=logits, **{**tensors, **GIVEN.get(name, {}), **options}).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def same(*pairs: tuple[Tensor, Tensor]) -> None:
    (value, gradient), (other, of_other) = pairs
    assert torch.allclose(value, other, atol=2e-6)
    assert torch.allclose(gradient, of_other, atol=2e-6)
    assert gradient.abs().max() > 1e-3


PER_ANSWER: dict[str, Any] = {"aggregation": "seq-mean-token-mean", "clip_high": 0.28}
PER_TOKEN: dict[str, Any] = {"aggregation": "token-mean"}


@pytest.mark.parametrize("clamp", [0.1, 1.0, math.inf])
def test_trrd_with_alpha_1_is_grpo(clamp: float) -> None:
    same(of("trrd_loss", alpha=1.0, teacher_clamp=clamp), of("policy_loss", **PER_ANSWER))


def test_a_clamp_that_holds_nothing_is_none() -> None:
    same(of("trrd_loss", teacher_clamp=1e3), of("trrd_loss", teacher_clamp=math.inf))


def test_trrd_halfway_is_the_geometric_mean_of_both_ratios() -> None:
    out = kk.recipes.trrd_loss(
        LOGITS, IDS, torch.ones(3), old_logprobs=OLD, teacher_logprobs=TEACHER, teacher_clamp=1e3, clip_low=1.0,
        clip_high=math.inf, mask=MASK,
    )  # fmt: skip
    logprob = LOGITS.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    wanted = -((logprob - OLD).exp() * (logprob - TEACHER).exp()).sqrt()
    assert torch.allclose(out.per_token_loss[MASK], wanted[MASK], rtol=1e-5)


def test_trrd_without_a_reward_has_no_gradient() -> None:
    assert (of("trrd_loss", advantages=torch.zeros(3))[1] == 0).all()


def test_without_their_coefficient_they_are_grpo() -> None:
    same(of("kdrl_loss", kd_coef=0.0), of("policy_loss", **PER_TOKEN))
    same(of("skill_sd_loss", kd_coef=0.0), of("policy_loss", **PER_TOKEN))
    same(of("calibrl_loss", hinge_coef=0.0), of("policy_loss", **PER_TOKEN, dual_clip=3.0))
    same(of("trace_loss", kl_coef=0.0), of("policy_loss", **PER_ANSWER))


def test_trace_without_spans_is_grpo() -> None:
    same(of("trace_loss", spans=torch.zeros_like(SPANS)), of("policy_loss", **PER_ANSWER))
    # Neither of the two.
    same(of("trace_loss", spans=torch.full_like(SPANS, 3)), of("policy_loss", **PER_ANSWER))


def test_trace_at_its_initial_coefficient_has_the_gradient_of_the_kl_alone() -> None:
    teacher, spans = BATCH["teacher_logits"], torch.ones_like(SPANS)
    gradient = of("trace_loss", spans=spans, kl_coef=0.5)[1]
    wanted = 0.5 * (LOGITS.softmax(-1) - teacher.softmax(-1)) * (MASK / MASK.sum(-1, keepdim=True) / 3)[..., None]
    assert torch.allclose(gradient, wanted, atol=1e-6)


def test_a_clip_that_holds_nothing_is_none() -> None:
    same(of("trace_loss", entry_clip=1e3), of("trace_loss"))


def test_trace_reads_the_teacher_on_spans_alone() -> None:
    teacher = torch.where((SPANS > 0)[..., None], BATCH["teacher_logits"], torch.nan)
    same(of("trace_loss", teacher_logits=teacher), of("trace_loss"))


def test_columns_that_the_teacher_or_the_student_leaves_out() -> None:
    """A clipped term is the clip, and has no gradient, where it would be infinite; 0 where there is no mass."""
    student, teacher = torch.tensor([S, S]), torch.tensor([T, T])
    teacher[0, 2] = student[1, 2] = -torch.inf
    cases: list[tuple[Literal["forward_kl", "reverse_kl"], int]] = [("reverse_kl", 0), ("forward_kl", 1)]
    for kind, at in cases:
        rows = kk.recipes.clipped_divergence_rows(student.requires_grad_(), teacher, kind=kind)
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        student = student.detach()
        assert rows.isfinite().all()
        assert gradient.isfinite().all()
        kept = [0, 1, 3]
        q, p = student[at].log_softmax(-1)[kept], teacher[at].log_softmax(-1)[kept]
        terms = q.exp() * (q - p) if kind == "reverse_kl" else p.exp() * (p - q)
        assert torch.allclose(rows[at], terms.clamp_max(0.05).sum() + 0.05, atol=1e-6)


def test_the_statistics_are_registered_when_needed_and_once() -> None:
    program = (
        "import torch, kldiv_kernels as kk\nfrom kldiv_kernels.registry import STATISTICS\n"
        "clipped = lambda: [x for x in STATISTICS if x.startswith('clipped')]\n"
        "kk.recipes.listing(); print(clipped())\n"
        "x = torch.zeros(1, 2)\n"
        "for kind in ('forward_kl', 'forward_kl', 'reverse_kl'):\n"
        "    kk.recipes.clipped_divergence_rows(x, x, kind=kind)\n"
        "print(clipped())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['clipped_forward_kl', 'clipped_reverse_kl']"]


def test_kdrl_with_nothing_kept_is_grpo() -> None:
    nothing = kk.recipes.kdrl_mask(torch.ones(3, dtype=torch.bool), BATCH["groups"], MASK)
    assert not nothing.any()
    same(of("kdrl_loss", keep_mask=nothing, kd_coef=1.0), of("policy_loss", **PER_TOKEN))


def test_skill_sd_of_a_student_that_is_the_teacher_is_0() -> None:
    logprob = LOGITS.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    value, gradient = of("skill_sd_loss", teacher_logprobs=logprob, advantages=torch.zeros(3), kd_coef=1.0)
    assert value.abs() < 1e-12
    assert gradient.abs().max() < 1e-6


def expected(loss: Callable[[Tensor, Tensor], Tensor], sampler: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_y sampler_y·loss(s, y) of the row S, and its gradient."""
    s = torch.tensor(S, dtype=torch.float64, requires_grad=True)
    total = sum(sampler[y] * loss(s[None, None], torch.tensor([[y]])) for y in range(4))
    assert isinstance(total, Tensor)
    return total.detach(), torch.autograd.grad(total, s)[0]


def divergence(kind: str) -> tuple[Tensor, Tensor]:
    s, t = torch.tensor([S], dtype=torch.float64, requires_grad=True), torch.tensor([T], dtype=torch.float64)
    value = kk.divergence_loss(s, t, kind)
    return value.detach(), torch.autograd.grad(value, s)[0][0]


@pytest.mark.parametrize(("estimator", "kind"), [("k2", "reverse_kl"), ("k3", "forward_kl")])
def test_the_gradient_of_kdrl_without_reward_is_that_of_a_kl(estimator: str, kind: str) -> None:
    q, p = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (S, T))

    def loss(s: Tensor, y: Tensor) -> Tensor:
        return kk.recipes.kdrl_loss(
            s, y, torch.zeros(1), old_logprobs=q[y], teacher_logprobs=p[y], kd_coef=1.0, kl_estimator=estimator
        ).loss

    assert torch.allclose(expected(loss, q.exp())[1], divergence(kind)[1], rtol=1e-9)


def test_skill_sd_on_samples_of_the_old_policy_is_the_reverse_kl() -> None:
    old, p = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (B, T))

    def loss(s: Tensor, y: Tensor) -> Tensor:
        return kk.recipes.skill_sd_loss(
            s, y, torch.zeros(1), old_logprobs=old[y], teacher_logprobs=p[y], kd_coef=1.0
        ).loss

    for found, wanted in zip(expected(loss, old.exp()), divergence("reverse_kl"), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9)


def test_the_hinge_with_slope_1_is_linear() -> None:
    apart = torch.tensor([[-0.7, 0.7], [-0.7, 0.7]])
    found = kk.recipes.leaky_hinge(apart, torch.tensor([0.8, 0.8]), torch.tensor([True, False]), slope=1.0)
    assert torch.equal(found, 0.8 * torch.tensor([[-1.0], [1.0]]) * apart)


@pytest.mark.parametrize("apart", [100.0, -100.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", GIVEN)
def test_extreme_ratios(name: str, sign: float, apart: float) -> None:
    for moved in ("old_logprobs", "teacher_logprobs", "expert_logprobs"):
        if moved == "old_logprobs" or moved in GIVEN[name]:
            extreme = {moved: OLD + apart, "advantages": sign * ADVANTAGES.abs()}
            value, gradient = of(name, **extreme)
            assert not value.isnan()
            assert gradient.isfinite().all()


@pytest.mark.parametrize("name", GIVEN)
def test_packed_tokens(name: str) -> None:
    """[N, V] in place of [B, T, V], with an advantage a token."""
    wanted = of(name, aggregation="token-mean")
    flat = {"token_ids": IDS.flatten(), "old_logprobs": OLD.flatten(), "mask": MASK.flatten()}
    flat |= {"advantages": ADVANTAGES[:, None].expand(3, 5).flatten()}
    flat |= {key: x.flatten(0, 1) for key, x in GIVEN[name].items() if isinstance(x, Tensor) and x.dim() > 1}
    if name == "calibrl_loss":
        flat["correct"] = BATCH["correct"][:, None].expand(3, 5).flatten()
    value, gradient = of(name, logits=LOGITS.flatten(0, 1), aggregation="token-mean", **flat)
    same((value, gradient.reshape_as(LOGITS)), wanted)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trrd_loss", {"alpha": 1.5}, "trrd_loss: alpha is 1.5; expected 0 to 1"),
        ("trrd_loss", {"teacher_clamp": 0.0}, "trrd_loss: teacher_clamp is 0.0; expected a number above 0"),
        ("trrd_loss", {"kl_coef": 0.1}, "trrd_loss: reference_logprobs is None; kl_coef = 0.1 needs them"),
        ("kdrl_loss", {"kd_normalizer": "all"}, "kdrl_loss: kd_normalizer is 'all'; expected kept, tokens or a number"),
        ("kdrl_loss", {"aggregation": "token-sum"}, "kd_normalizer is 'kept' with aggregation 'token-sum'; expected"),
        ("trace_loss", {"kl_coef": 0.6}, "trace_loss: kl_coef is 0.6 with initial_coef 0.5; expected 0 to"),
        ("trace_loss", {"kl_coef": -0.1}, "trace_loss: kl_coef is -0.1"),
        ("trace_loss", {"entry_clip": 0.0}, "clipped_divergence_rows: clip is 0.0; expected a number above 0"),
        ("calibrl_loss", {"slope": -1.0}, "leaky_hinge: slope is -1.0; expected 0 or more"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(name, **options)


def test_wrong_options_of_the_parts() -> None:
    with pytest.raises(ValueError, match="kdrl_mask: keep is 'all'; expected response or group"):
        kk.recipes.kdrl_mask(BATCH["correct"], BATCH["groups"], MASK, keep="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clipped_divergence_rows: kind is 'js'; expected forward_kl or reverse_kl"):
        kk.recipes.clipped_divergence_rows(LOGITS, LOGITS, kind="js")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["trrd_loss", "calibrl_loss"])
def test_options_are_those_of_policy_loss_and_are_checked(name: str) -> None:
    rows, ids = torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64)
    other = {"trrd_loss": "teacher_logprobs", "calibrl_loss": "expert_logprobs"}[name]
    given: dict[str, Any] = {"old_logprobs": torch.zeros(2, 2), other: torch.zeros(2, 2)}
    if name == "calibrl_loss":
        given["correct"] = torch.ones(2, dtype=torch.int64)
    function = getattr(kk.recipes, name)
    function(rows, ids, torch.ones(2), **given)
    for options, message in (
        ({"aggregation": "token_mean"}, f"{name}: aggregation is 'token_mean'; expected token-mean"),
        ({"clip_low": -1.0}, f"{name}: clip_low is -1.0; expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            function(rows, ids, torch.ones(2), **given, **options)
    packed = {key: x[0] for key, x in given.items() if key != "correct"} | {"aggregation": "seq-mean-token-mean"}
    if name == "trrd_loss":
        with pytest.raises(ValueError, match=r"trrd_loss: aggregation is .*, which needs sequences"):
            function(rows[0], ids[0], torch.ones(2), **packed)
