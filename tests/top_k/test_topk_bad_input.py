"""What the top-k functions refuse, and what they say about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kldiv_kernels as kk


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("js", {"beta": 2.0}, "beta is 2.0; expected between 0 and 1 for js"),
        ("renyi", {"alpha": 1.0}, "alpha is 1.0; expected above 0, finite and not 1"),
        ("alpha_beta", {"alpha": -0.5, "beta": 0.5}, "alpha + beta is 0.0; expected not 0"),
        ("skew_kl", {"alpha": torch.tensor([0.5, 1.5])}, "alpha is 1.5; expected between 0 and 1"),
    ],
)
def test_alpha_and_beta_are_those_of_the_kind(kind: str, options: dict[str, Any], message: str, gradient: bool) -> None:
    logits = torch.zeros(2, 8, requires_grad=gradient)
    with pytest.raises(ValueError, match="topk_divergence_loss: ") as caught:
        kk.topk_divergence_loss(logits, IDS, LOGPROBS, kind, **options)
    assert message in str(caught.value)


IDS, LOGPROBS = torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.25).log()
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "id": ({"topk_ids": torch.tensor([[0, 1], [2, 8]])}, ValueError, "topk_ids[1, 1] is 8; expected 0 to 7, or -1"),
    "negative id": ({"topk_ids": torch.tensor([[0, -2], [2, 3]])}, ValueError, "topk_ids[0, 1] is -2; expected 0 to 7"),
    "twice": ({"topk_ids": torch.tensor([[0, 1], [3, 3]])}, ValueError, "topk_ids[1, 1] is 3; which occurs before"),
    "ids dtype": ({"topk_ids": IDS.float()}, TypeError, "topk_ids has dtype torch.float32; expected int64 or int32"),
    "ids type": ({"topk_ids": [[0]]}, TypeError, "topk_ids is list; expected a torch.Tensor"),
    "ids shape": ({"topk_ids": IDS[:1]}, ValueError, "topk_ids has shape [1, 2]; expected [2, 'K']"),
    "more than there are": (
        {"topk_ids": torch.arange(9).expand(2, 9)}, ValueError, "topk_ids has K = 9; expected at most 8",
    ),
    "logprobs shape": (
        {"topk_logprobs": LOGPROBS[:, :1]}, ValueError, "topk_logprobs has shape [2, 1]; expected [2, 2] like topk_ids",
    ),
    "logprobs dtype": ({"topk_logprobs": IDS}, TypeError, "topk_logprobs has dtype torch.int64; expected float32"),
    "above 0": (
        {"topk_logprobs": torch.tensor([[-1.0, -1.0], [0.5, -1.0]])}, ValueError,
        "topk_logprobs[1, 0] is 0.5; expected at most 0",
    ),
    "NaN": (
        {"topk_logprobs": torch.tensor([[-1.0, torch.nan], [-1.0, -1.0]])}, ValueError,
        "topk_logprobs[0, 1] is nan; expected at most 0",
    ),
    "more than 1": (
        {"topk_logprobs": torch.full((2, 2), 0.7).log()}, ValueError,
        "the sum of exp(topk_logprobs)[0] is 1.4; expected at most 1",
    ),
    "kind": ({"kind": "entropy"}, ValueError, "topk_divergence_loss: kind: unknown statistic 'entropy'"),
    "tail": ({"tail": "drop"}, ValueError, "tail is 'drop'; expected bucket, renormalize, renormalize_teacher or none"),
    "raw": ({"kind": "js", "tail": "none"}, ValueError, "kind is 'js'; expected forward_kl, reverse_kl, jeffreys"),
    "no tail to give": (
        {"tail": "renormalize", "tail_logprob": torch.zeros(2)}, ValueError, "tail_logprob is given, but tail is",
    ),
    "no ids to renormalize": (
        {"tail": "renormalize", "topk_ids": torch.tensor([[3, 1], [-1, -1]])}, ValueError,
        "topk_divergence_loss: the sum of exp(topk_logprobs)[1] is 0; expected more than 0 with tail='renormalize'",
    ),
    "no mass to renormalize": (
        {"tail": "renormalize_teacher", "topk_logprobs": torch.full((2, 2), -torch.inf)}, ValueError,
        "the sum of exp(topk_logprobs)[0] is 0; expected more than 0 with tail='renormalize_teacher'",
    ),
    "reduction": ({"reduction": "max"}, ValueError, "reduction is 'max'; expected mean, sum or none"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, error, message = BAD[name]
    arguments = {"logits": torch.zeros(2, 8), "topk_ids": IDS, "topk_logprobs": LOGPROBS, **options}
    with pytest.raises(error) as caught:
        kk.topk_divergence_loss(**arguments)
    assert message in str(caught.value)


def test_unchecked_values_are_not_looked_at() -> None:
    rounded = torch.full((2, 2), 0.7).log()
    assert kk.topk_divergence_loss(torch.zeros(2, 8), IDS, rounded, check=False).isfinite()


@pytest.mark.parametrize("tail", ["renormalize", "renormalize_teacher"])
@pytest.mark.parametrize("left_out", ["mask", "labels", "weight"])
def test_a_token_that_does_not_count_needs_no_mass(tail: Any, left_out: str) -> None:
    out = {"labels": torch.tensor([5, -100])}.get(left_out, torch.tensor([1, 0]))
    logits = torch.tensor([[2.0, -1e4, 0, 1, 1, 1, 1, 1]]).repeat(2, 1)
    losses, gradients = [], []
    for rows, options in ((2, {left_out: out}), (1, {})):
        x = logits[:rows].clone().requires_grad_()
        ids = torch.tensor([[3, 0], [-1, -1]])[:rows]
        losses.append(kk.topk_divergence_loss(x, ids, LOGPROBS[:rows], "js", tail=tail, reduction="sum", **options))
        losses[-1].backward()
        gradients.append(x.grad)
    assert losses[0] > 0
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0][:1], gradients[1])
    assert not gradients[0][1].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kk.topk(x, 9), "topk: k is 9; expected 1 to 8"),
        (lambda x: kk.topk(x, 2, vocab_size=9), "topk: vocab_size is 9; expected 1 to 8"),
        (lambda x: kk.topk_divergence_from_logits(x, x, k=0), "topk_divergence_from_logits: k is 0; expected 1 to 8"),
        (lambda x: kk.topk_divergence_from_logits(x, x, k=1, support="both"), "support is 'both'; expected teacher,"),
        (lambda x: kk.topk_token_stats(x, IDS, stats=("argmax",)), "stats has 'argmax'; expected topk_logprobs,"),
        (lambda x: kk.topk_token_stats(x, IDS, stats=("logprob",)), "labels is None; logprob needs one label a token"),
    ],
)
def test_bad_calls(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        call(torch.zeros(2, 8))


def test_k_is_an_int() -> None:
    for k, name in ((True, "bool"), (2.0, "float")):
        with pytest.raises(TypeError, match=f"topk: k is {name}; expected an int"):
            kk.topk(torch.zeros(2, 8), k)  # type: ignore[arg-type]
