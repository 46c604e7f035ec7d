"""TRL's fused LM head and its divergence, patched, against TRL's own: values and gradients from hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import tiny
from transformers import Gemma2Config, Gemma2ForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import distillation_trainer, utils

from kldiv_kernels.adapters.trl import patched_trl

ROWS, VOCAB = (2, 7), 41


def head(width: int, dtype: torch.dtype = torch.float32, columns: int = VOCAB) -> list[Tensor]:
    """Hidden states, weight and bias."""
    hidden, weight = torch.randn(*ROWS, width), 2 / width**0.5 * torch.randn(columns, width)
    return [x.to(dtype).requires_grad_() for x in (hidden, weight, torch.randn(columns))]


def flat(output: Any) -> list[Tensor | None]:
    return list(output)


def logprobs(leaves: list[Tensor], *how: Any) -> tuple[list[Tensor | None], list[Tensor]]:
    """What `apply` returns, and gradients of it with another weight for each token and output."""
    hidden, weight, bias = leaves
    function = utils._ChunkedLogProbFunction
    targets = torch.arange(14) % 5
    values = flat(function.apply(hidden.reshape(14, -1), weight, bias, targets, *how))
    total = sum(
        (x * torch.linspace(1 + number, 2, 14)).sum()
        for number, x in enumerate(values)
        if x is not None and x.requires_grad
    )
    assert isinstance(total, Tensor)
    return values, list(torch.autograd.grad(total, leaves))


def assert_near(found: list[Tensor], expected: list[Tensor], allowed: float = 1e-5) -> None:
    for x, y in zip(found, expected, strict=True):
        assert y.abs().max() > 1e-3
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= allowed * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("how", "outputs"),
    [
        ((0.7, 16, None, 1.0), ("log_probs",)),
        ((1.0, 16, None, 0.4), ("log_probs", "entropy")),
        ((0.7, 16, 3.0, 1.5), ("entropy", "log_sum_sq_probs", "is_top1")),
    ],
)
def test_log_probabilities(how: tuple[Any, ...], outputs: tuple[str, ...], dtype: torch.dtype) -> None:
    leaves = head(6, dtype)
    # The first of equal logits is the likeliest: numbers of few bits, of which the sums are exact in any order.
    with torch.no_grad():
        for x in leaves:
            x.mul_(4).round_().div_(4)
        leaves[1][3], leaves[2][1], leaves[2][3] = leaves[1][1], 3.0, 3.0
        leaves[0][0] = leaves[1][1]
    theirs, gradients = logprobs(leaves, *how, outputs)
    with patched_trl():
        assert utils._ChunkedLogProbFunction is chunked_logprob.ChunkedLogProbFunction
        ours, found = logprobs(leaves, *how, outputs)
    for x, y in zip(ours, theirs, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert (x.dtype, x.shape, x.requires_grad) == (y.dtype, y.shape, y.requires_grad)
            assert torch.equal(x, y) if x.dtype == torch.bool else torch.allclose(x, y, atol=1e-5)
    assert ours[4] is None or (ours[4][1] and not ours[4][3])
    assert_near(found, gradients)


def test_what_a_fused_model_returns() -> None:
    """With masks, counts and TRL's own reading of the configuration; patched after the head was added."""
    torch.manual_seed(2)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    config = Gemma2Config(vocab_size=tiny.VOCAB, num_key_value_heads=2, final_logit_softcapping=4.0, **size)
    model = Gemma2ForCausalLM(config)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy", "is_top1"))
    batch = tiny.batch(4)

    def run() -> tuple[Any, list[Tensor]]:
        model.zero_grad()
        output = model(**batch, fused_lm_head=True, num_items_in_batch=torch.tensor(9))
        (output.loss + 0.1 * output.entropy.sum()).backward()
        return output, [x.grad.clone() for x in model.parameters() if x.grad.abs().max() > 1e-3]

    expected, gradients = run()
    with patched_trl():
        found, ours = run()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].float(), value.float(), atol=1e-5), name
    assert_near(ours, gradients, 1e-4)
    assert not found.log_probs[~found.label_mask].any()


def divergence(student: list[Tensor], teacher: list[Tensor], mask: Tensor, beta: float, **options: Any) -> Any:
    return distillation_trainer._chunked_divergence_loss(
        student[0], teacher[0], student[1], teacher[1], mask, beta, student_lm_head_bias=student[2],
        teacher_lm_head_bias=teacher[2], **options,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor(17), "temperature": 0.6},
        {"num_items_in_batch": 5, "student_final_logit_softcapping": 3.0, "teacher_logit_scale": 0.5},
        {"student_logit_scale": 1.5, "teacher_final_logit_softcapping": 4.0},
    ],
    ids=str,
)
def test_divergence(options: dict[str, Any], beta: float) -> None:
    # A mask of zeros and ones, and a teacher with more columns: TRL's takes the student's.
    student, teacher, mask = head(6), head(9, columns=VOCAB + 3), torch.randint(0, 2, ROWS)
    mask[0, 0] = 1
    theirs = divergence(student, teacher, mask, beta, **options)
    gradients = torch.autograd.grad(theirs[0], student)
    with patched_trl():
        ours = divergence(student, teacher, mask, beta, **options)
        found = torch.autograd.grad(ours[0], student, retain_graph=True)
        assert torch.autograd.grad(ours[0], teacher, allow_unused=True) == (None, None, None)
        with torch.no_grad():
            evaluated = divergence(student, teacher, mask, beta, **options)
        nothing = divergence(student, teacher, torch.zeros(ROWS), beta)
    assert theirs[0] > 0.01
    for x, y, z in zip(ours, theirs, evaluated, strict=True):
        assert x.dtype == y.dtype
        assert torch.allclose(x, y, rtol=1e-5)
        assert torch.allclose(z, y, rtol=1e-5)
    assert not ours[1].requires_grad
    assert_near(list(found), list(gradients))
    assert [x.item() for x in nothing] == [0, 0, 0]
    assert not any(x.any() for x in torch.autograd.grad(nothing[0], student))


def test_what_trl_computes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = chunked_logprob.ChunkedLogProbFunction
    forward = original.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append("forward")
        return forward(*args, **kwargs)

    hidden, weight, bias = head(6)
    rows, targets = hidden.reshape(14, -1), torch.zeros(14, dtype=torch.int64)
    zero = torch.nn.Parameter(weight.detach().clone())
    zero.ds_id = 1  # type: ignore[attr-defined]
    with patched_trl():
        monkeypatch.setattr(original, "forward", staticmethod(counted))
        function = utils._ChunkedLogProbFunction
        function.apply(rows, weight, bias, targets, 1.0, 16, None, 1.0, ("entropy",))
        assert not called
        function.apply(rows, weight, bias, targets, 1.0, 16, None, 1.0, ("mean_logits",))
        function.apply(rows, zero, bias, targets, 1.0, 16, None, 1.0, ("entropy",))
        function.apply(rows[:0], weight, bias, targets[:0], 1.0, 16, None, 1.0, ())
        function.apply(rows, weight, bias, targets, 1.0, 16, None, 0.0, ())
        function.apply(rows, weight, bias, targets, 1.0, 16)
    assert len(called) == 5


def test_bfloat16_is_nearer_to_the_exact_numbers() -> None:
    leaves, targets = head(64, torch.bfloat16), torch.arange(14)
    exact = [x.detach().double() for x in leaves]
    wanted = (exact[0] @ exact[1].t() + exact[2]).reshape(14, -1).log_softmax(-1)[torch.arange(14), targets]
    how = (leaves[0].reshape(14, -1), *leaves[1:], targets, 1.0, 16, None, 1.0, ())
    theirs = utils._ChunkedLogProbFunction.apply(*how)[0]
    with patched_trl():
        ours = utils._ChunkedLogProbFunction.apply(*how)[0]
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - wanted).abs().max() < 1e-5
    assert (ours - wanted).abs().max() < (theirs - wanted).abs().max()
