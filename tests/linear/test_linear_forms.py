"""Policy and top-k losses from hidden states equal those of the logits, and bad arguments are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import BACKENDS, check_value
from projected import Model, check_gradients, model
from torch import Tensor, nn

import kldiv_kernels as kk

COLUMNS = 60
# Token by token, by sequences, with an exact KL, and with what the pass finds first.
POLICIES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "entropy_coef": 0.05},
    "cispo": {"loss_type": "cispo", "clip_high": 0.3},
    "gspo": {"loss_type": "gspo"},
    "exact": {"loss_type": "dapo", "kl_coef": 0.1, "kl_estimator": "reverse_kl"},
    "sampled": {"loss_type": "dapo", "kl_coef": 0.1, "kl_estimator": "k3"},
    "cov": {"loss_type": "grpo", "entropy_quantile": 0.5},
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_losses(name: str, backend: str) -> None:
    student, teacher = model((3, 5), 16, COLUMNS), model((3, 5), 12, COLUMNS)
    options = {**POLICIES[name], "backend": backend, "temperature": 0.9, "mask": torch.rand(3, 5) < 0.8}
    tokens, advantages = torch.randint(COLUMNS, (3, 5)), torch.tensor([1.0, -0.5, 0.2])
    old = student.logits().detach().log_softmax(-1).gather(-1, tokens[..., None])[..., 0] + 0.2 * torch.randn(3, 5)
    exact, of_teacher = student.double(), {}
    reference: dict[str, Any] = {}
    if "kl_coef" in options:
        reference = {"reference_hidden": teacher.hidden, "reference_head": teacher.head}
        of_teacher = {"reference_logits": teacher.double().logits().detach()}
    out = kk.linear_policy_loss(
        student.hidden, student.head, tokens, advantages, old_logprobs=old, rows_per_chunk=4, **reference, **options
    )  # fmt: skip
    wanted = kk.policy_loss(
        exact.logits(), tokens, advantages.double(), old_logprobs=old.double(), **of_teacher,
        **(options | {"backend": "reference"}),
    )  # fmt: skip
    check_value(out.loss, wanted.loss.detach())
    check_value(out.per_token_loss, wanted.per_token_loss)
    check_value(out.entropy, wanted.entropy)
    assert out.metrics.keys() == wanted.metrics.keys()
    check_gradients(
        list(torch.autograd.grad(out.loss, student.leaves)), list(torch.autograd.grad(wanted.loss, exact.leaves))
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_losses(tail: str, backend: str) -> None:
    student, exact_teacher = model((3, 4), 16, COLUMNS), 2 * torch.randn(3, 4, COLUMNS)
    top = exact_teacher.log_softmax(-1).topk(5)
    mask = torch.rand(3, 4) < 0.7
    # A teacher without a rest makes reverse KL infinite.
    for kind in ("forward_kl", "hellinger" if tail == "renormalize_teacher" else "reverse_kl"):
        for reduction in ("mean", "none"):
            exact = student.double()
            options: dict[str, Any] = {"tail": tail, "mask": mask, "temperature": 1.2, "reduction": reduction}
            loss = kk.linear_topk_divergence_loss(
                student.hidden, student.head, top.indices, top.values, kind, backend=backend, rows_per_chunk=5,
                **options,
            )  # fmt: skip
            wanted = kk.topk_divergence_loss(exact.logits(), top.indices, top.values, kind, **options)
            check_value(loss, wanted.detach())
            check_gradients(
                list(torch.autograd.grad(loss.sum(), student.leaves)),
                list(torch.autograd.grad(wanted.sum(), exact.leaves)),
            )


def test_labels_of_a_causal_model() -> None:
    student = model((2, 6), 8, COLUMNS)
    labels = torch.randint(COLUMNS, (2, 6))
    labels[0, :3] = -100
    got = kk.linear_token_stats(student.hidden, student.head, labels, shift=True)
    wanted = kk.token_stats(student.logits(), labels=labels, shift=True)
    check_value(got.logprob, wanted.logprob.detach())
    target = torch.randn(2, 6, COLUMNS)
    loss = kk.linear_divergence_loss(
        student.hidden, student.head, reference_logits=target, labels=labels, shift=True, exclude=labels.clamp_min(0)
    )
    check_value(
        loss, kk.forward_kl(student.logits(), target, labels=labels, shift=True, exclude=labels.clamp_min(0)).detach()
    )


def test_plain_layers_are_taken_and_their_modules_too() -> None:
    head, hidden, target = nn.Linear(8, COLUMNS), torch.randn(4, 8), torch.randn(4, COLUMNS)
    wanted = kk.forward_kl(head(hidden), target)
    for given in (head, kk.Head(head), kk.Head(head.weight, head.bias)):
        check_value(kk.linear_divergence_loss(hidden, given, reference_logits=target), wanted.detach())
    ids, logprobs = torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.25]] * 4).log()
    assert torch.equal(
        kk.nn.LinearDivergenceLoss("js", beta=0.3)(hidden, head, reference_logits=target),
        kk.linear_divergence_loss(hidden, head, kind="js", reference_logits=target, beta=0.3),
    )
    assert torch.equal(
        kk.nn.LinearTopKDivergenceLoss(tail="renormalize")(hidden, head, ids, logprobs),
        kk.linear_topk_divergence_loss(hidden, head, ids, logprobs, tail="renormalize"),
    )
    tokens, advantages = torch.tensor([1, 2, 3, 4]), torch.ones(4)
    assert torch.equal(
        kk.nn.LinearPolicyLoss(loss_type="dapo")(hidden, head, tokens, advantages).loss,
        kk.linear_policy_loss(hidden, head, tokens, advantages, loss_type="dapo").loss,
    )
    for module in (kk.nn.LinearDivergenceLoss, kk.nn.LinearPolicyLoss, kk.nn.LinearTopKDivergenceLoss):
        with pytest.raises(TypeError, match="tempurature is no option"):
            module(tempurature=2.0)


class _Lora(nn.Linear):
    pass


def _hooked() -> nn.Linear:
    head = nn.Linear(8, COLUMNS)
    head.register_forward_hook(lambda *_: None)
    return head


def _patched() -> nn.Linear:
    head = nn.Linear(8, COLUMNS)
    head.forward = lambda x: x  # type: ignore[method-assign]
    return head


HEADS: list[tuple[Any, type[Exception], str]] = [
    (_Lora(8, COLUMNS), TypeError, "head is _Lora; expected torch.nn.Linear itself"),
    (nn.Sequential(), TypeError, "head is Sequential; expected torch.nn.Linear itself"),
    (_hooked(), ValueError, "head has hooks, which only its own forward"),
    (_patched(), ValueError, "head has hooks, which only its own forward"),
    (nn.utils.parametrizations.weight_norm(nn.Linear(8, COLUMNS)), TypeError, "head is ParametrizedLinear"),
    (3, TypeError, "head is int; expected a weight"),
    (torch.zeros(COLUMNS, 9), ValueError, r"hidden has shape \[4, 8\], the weight of head \[60, 9\]"),
    (torch.zeros(8), ValueError, r"the weight of head has shape \[8\]; expected \[V, H\]"),
    (torch.zeros(0), ValueError, r"the weight of head has shape \[0\]; expected \[V, H\]. A shard"),
    (torch.zeros(COLUMNS, 8, dtype=torch.int8), TypeError, r"the weight of head has dtype torch.int8 \(quantised\?\)"),
    (torch.zeros(COLUMNS, 8, device="meta"), ValueError, "the weight of head is on the meta device"),
    (kk.Head(torch.zeros(COLUMNS, 8), torch.zeros(3)), ValueError, r"the bias of head has shape \[3\]"),
    (kk.Head(torch.zeros(COLUMNS, 8), logit_scale=0.0), ValueError, "logit_scale of head is 0.0"),
    (kk.Head(torch.zeros(COLUMNS, 8), softcap=-1.0), ValueError, "softcap of head is -1.0"),
    (kk.Head(nn.Linear(8, COLUMNS), torch.zeros(COLUMNS)), ValueError, "bias of head is given beside an nn.Linear"),
]


@pytest.mark.parametrize(("head", "error", "says"), HEADS, ids=[says[:30] for *_, says in HEADS])
def test_what_is_no_plain_head_is_refused(head: Any, error: type[Exception], says: str) -> None:
    hidden = torch.randn(4, 8)
    with pytest.raises(error, match=f"linear_token_stats: {says}"):
        kk.linear_token_stats(hidden, head, stats=["entropy"])
    with pytest.raises(
        error, match=says.replace("head", "reference_head").replace("hidden has", "reference_hidden has")
    ):
        kk.linear_divergence_loss(hidden, torch.randn(COLUMNS, 8), hidden, head)


CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, "reference_hidden is None; expected the teacher's hidden states and head, or reference_logits"),
    ({"reference_hidden": torch.zeros(4, 8)}, ValueError, "reference_head is None"),
    ({"reference_head": torch.zeros(60, 8), "reference_logits": torch.zeros(4, 60)}, ValueError,
     "reference_head is given without reference_hidden"),
    ({"reference_hidden": torch.zeros(4, 8), "reference_head": torch.zeros(60, 8),
      "reference_logits": torch.zeros(4, 60)}, ValueError, "reference_hidden and reference_logits are both given"),
    ({"reference_hidden": torch.zeros(3, 8), "reference_head": torch.zeros(60, 8)}, ValueError,
     r"reference_hidden has shape \[3, 8\]; expected \[4, 'H'\] like hidden"),
    ({"reference_logits": torch.zeros(4, 61)}, ValueError, r"reference_logits has shape \[4, 61\]; expected \[4, 60\]"),
    ({"reference_logits": torch.zeros(4, 60), "rows_per_chunk": 0}, ValueError, "rows_per_chunk is 0; expected 1"),
    ({"reference_logits": torch.zeros(4, 60), "logits_dtype": torch.float16}, ValueError,
     "logits_dtype is torch.float16; expected torch.float32"),
    ({"reference_logits": torch.zeros(4, 60), "bta": 1}, TypeError, "bta is no argument of it; did you mean beta?"),
    ({"reference_logits": torch.zeros(4, 60), "in_place": True}, TypeError, "in_place is no argument of it"),
    ({"reference_logits": torch.zeros(4, 60), "mask": torch.ones(3)}, ValueError, r"mask has shape \[3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "says"), CALLS, ids=[says[:40] for *_, says in CALLS])
def test_bad_arguments_are_named_before_anything_is_multiplied(
    given: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiplied(*_: Tensor, **__: Tensor) -> None:
        raise AssertionError("multiplied")

    monkeypatch.setattr(torch, "mm", multiplied)
    with pytest.raises(error, match=f"linear_divergence_loss: {says}"):
        kk.linear_divergence_loss(torch.zeros(4, 8), torch.zeros(60, 8), **given)


def test_hidden_states_are_checked() -> None:
    for hidden, says in (([1.0], "hidden is list"), (torch.zeros(4, 8, dtype=torch.int64), "hidden has dtype")):
        with pytest.raises(TypeError, match=f"linear_token_stats: {says}"):
            kk.linear_token_stats(hidden, torch.zeros(60, 8))  # type: ignore[arg-type]
    nobody = Model(torch.zeros(0, 8).requires_grad_(), torch.zeros(60, 8).requires_grad_())
    loss = kk.linear_divergence_loss(nobody.hidden, nobody.head, reference_logits=torch.zeros(0, 60))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, nobody.leaves)[1].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_by_its_projection(backend: str) -> None:
    for dtype, softcap, scale in ((torch.float32, None, 1.0), (torch.bfloat16, 5.0, 0.5)):
        student = model((3, 4), 16, COLUMNS, dtype, scale=0.7)
        frozen = kk.Head(student.weight.detach(), student.head.bias.detach(), 0.7)  # type: ignore[union-attr]
        teacher = model((3, 4), 12, COLUMNS + 2, dtype, softcap=softcap, scale=scale)
        mask, temperature = torch.rand(3, 4) < 0.7, torch.rand(3, 4) + 0.5
        exact, theirs = student.double(), teacher.double().logits().detach()
        for given in (
            {"reference_hidden": teacher.hidden, "reference_head": teacher.head},
            {"reference_logits": theirs.float()},
        ):
            known = kk.teacher_projection(
                frozen, temperature=temperature, mask=mask, vocab_size=COLUMNS, rows_per_chunk=5, backend=backend,
                **given,
            )  # fmt: skip
            assert not known.projection.requires_grad
            for reduction in ("mean", "none"):
                options: dict[str, Any] = {"mask": mask, "temperature": 1.2, "reduction": reduction}
                loss = kk.linear_divergence_loss(
                    student.hidden, frozen, kind="forward_kl", reference_projection=known, backend=backend, **options
                )
                wanted = kk.forward_kl(
                    exact.logits(), theirs, vocab_size=COLUMNS, reference_temperature=temperature.double(), **options
                )
                check_value(loss, wanted.detach())
                got = torch.autograd.grad(loss.sum(), [student.hidden])
                check_gradients(list(got), list(torch.autograd.grad(wanted.sum(), [exact.hidden])))


def test_what_a_projection_is_not_for() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(COLUMNS, 8)
    known = kk.teacher_projection(weight, torch.randn(4, COLUMNS))
    calls: list[tuple[dict[str, Any], str]] = [
        ({"kind": "js"}, "kind is 'js'; expected 'forward_kl'"),
        ({"head": weight.clone().requires_grad_()}, "head requires grad"),
        ({"head": kk.Head(weight, softcap=3.0)}, "softcap of head is 3.0"),
        ({"reference_logits": torch.zeros(4, COLUMNS)}, "given beside another reference"),
        ({"reference_temperature": 2.0}, "reference_temperature is given beside reference_projection"),
        ({"vocab_size": 7}, f"vocab_size is 7; expected {COLUMNS}"),
        ({"hidden": torch.randn(3, 8)}, r"reference_projection has shape \[4, 8\]; expected \[3, 8\]"),
    ]
    for given, says in calls:
        arguments: dict[str, Any] = {"hidden": hidden, "head": weight, "reference_projection": known, **given}
        with pytest.raises(ValueError, match=f"linear_divergence_loss: .*{says}"):
            kk.linear_divergence_loss(**arguments)
    with pytest.raises(ValueError, match="teacher_projection: reference_logits is None"):
        kk.teacher_projection(weight)
    with pytest.raises(TypeError, match="teacher_projection: head is int"):
        kk.teacher_projection(3, torch.zeros(4, COLUMNS))  # type: ignore[arg-type]
