"""What papers 5, 23, 54, 55, 59, 66, 70, 92 say of their losses of pairs, as identities and exact expectations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recipe_case import S, T, batch, double, gradient_of, logprob, same
from torch import Tensor
from torch.nn.functional import logsigmoid

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(sequences=6, seed=33)
LOGITS, LABELS, MASK, REFERENCE = (BATCH[name] for name in ("logits", "token_ids", "mask", "teacher_logits"))
EVERY = torch.ones(6, 5, dtype=torch.int64)
LOG_2 = double(math.log(2))[0]


def dpo(logits: Tensor, labels: Tensor = LABELS, beta: float = 0.1, mask: Tensor = MASK) -> Tensor:
    delta = ((logprob(logits, labels) - logprob(REFERENCE[: len(logits)], labels)) * mask).sum(-1)
    chosen, rejected = delta.chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


def alike(one: Tensor, other: Tensor, logits: Tensor) -> None:
    same(one, other)
    same(gradient_of(one, logits), gradient_of(other, logits))
    assert gradient_of(one, logits).abs().max() > 1e-4


def test_each_is_dpo_without_its_own_part() -> None:
    logits = LOGITS.clone().requires_grad_()
    given: tuple[Tensor, ...] = (logits, REFERENCE, LABELS)
    ones, zeros = torch.ones(6, 5).double(), torch.zeros(6, 5).double()
    free = {"ratio_l1": 0.0, "kl_l1": 0.0, "mask": MASK}
    wanted = dpo(logits)
    alike(recipes.tdpo_loss(*given, alpha=0.0, mask=MASK), wanted, logits)
    alike(recipes.sparsepo_loss(*given, ones, zeros, **free), wanted, logits)
    alike(recipes.rrpo_loss(*given, EVERY, alpha=0.0, mask=MASK), wanted, logits)
    alike(recipes.hypo_loss(*given, zeros, ones, kl_coef=0.0, mask=MASK), wanted, logits)
    alike(recipes.sparsepo_loss(*given, ones, ones, **free), recipes.tdpo_loss(*given, version=1, mask=MASK), logits)


def test_the_two_versions_of_tdpo() -> None:
    """Of one value at α = 1; the second pulls the divergence of the preferred answer nowhere."""
    logits = LOGITS.clone().requires_grad_()
    first, second = (
        recipes.tdpo_loss(logits, REFERENCE, LABELS, version=version, mask=MASK, **options)  # type: ignore[arg-type]
        for version, options in ((1, {}), (2, {"alpha": 1.0}))
    )
    same(first, second)
    apart = gradient_of(first, logits) - gradient_of(second, logits)
    assert apart[3:].abs().max() < 1e-12
    assert apart[:3].abs().max() > 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_at_the_reference(version: Any) -> None:
    logits = REFERENCE.clone().requires_grad_()
    found = recipes.tdpo_loss(logits, REFERENCE, LABELS, version=version, mask=MASK)
    same(found, LOG_2)
    alike(found, dpo(logits), logits)
    same(recipes.rrpo_loss(logits, REFERENCE, LABELS, EVERY, alpha=5.0, mask=MASK), LOG_2)


def test_rrpo_looks_at_phrases_alone() -> None:
    phrases = EVERY.clone()
    phrases[:, ::2] = 0
    logits = LOGITS.clone()
    # Rows of rejected answers without a phrase are not read.
    logits[3:, ::2] = torch.nan
    logits.requires_grad_()
    loss = recipes.rrpo_loss(logits, REFERENCE, LABELS, phrases, alpha=0.0, mask=MASK)
    gradient = gradient_of(loss, logits)
    assert loss.isfinite()
    assert (gradient[:, ::2] == 0).all()
    assert gradient[:, 1::2].abs().max() > 1e-4


def test_a_pair_without_tokens_does_not_count() -> None:
    logits = LOGITS.clone().requires_grad_()
    kept, phrases = MASK.clone(), EVERY
    kept[2], kept[5], kept[4] = False, False, False
    places = [0, 1, 3, 4]
    ones = torch.ones(6, 5).double()
    for function, others in (
        (recipes.tdpo_loss, ()), (recipes.rrpo_loss, (phrases,)), (recipes.sparsepo_loss, (ones, ones)),
    ):  # fmt: skip
        found = function(logits, REFERENCE, LABELS, *others, mask=kept)  # type: ignore[operator]
        fewer = (x[places] for x in (logits, REFERENCE, LABELS, *others))
        alike(found, function(*fewer, mask=kept[places]), logits)  # type: ignore[operator]


def test_online_the_score_has_the_gradient_of_the_kl() -> None:
    """Answers of one token, each as often as the policy writes it."""
    logits = double(*S).requires_grad_()
    own, reference = logits.log_softmax(-1), double(*T).log_softmax(-1)
    pair = torch.zeros(2, 1, 4).double()
    gradient = torch.zeros(4).double()
    for y, share in enumerate(own.exp().tolist()):
        loss = recipes.hypo_loss(
            pair, pair, torch.tensor([[0], [1]]), own[y].reshape(1, 1), reference[y].reshape(1, 1), kl_coef=0.7
        )
        gradient = gradient + share * gradient_of(loss, logits)
    exact = 0.7 * kk.token_stats(logits[None], double(*T)[None], stats=("reverse_kl",)).reverse_kl[0]
    same(gradient, gradient_of(exact, logits))
    assert gradient.abs().max() > 0.1
    online = torch.randn(3, 4).double().requires_grad_()
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]) > 0
    at_reference = recipes.hypo_loss(
        pair, pair, torch.tensor([[0], [1]]), online, online.detach(), online_mask=kept, kl_coef=9.0
    )
    same(at_reference, LOG_2)
    assert gradient_of(at_reference, online).abs().max() == 0
    # An answer without tokens is none.
    whole, fewer = (
        recipes.hypo_loss(
            pair, pair, torch.tensor([[0], [1]]), online[:n], online[:n].detach() - 1, online_mask=kept[:n]
        )
        for n in (3, 2)
    )
    alike(whole, fewer, online)


L_W, L_L = double(0.3, -2.0, 4.0), double(-0.4, 1.0, 3.5)


def test_the_links_of_f_dpo() -> None:
    chosen, rejected = (x.clone().requires_grad_() for x in (L_W, L_L))

    def of(divergence: Any, *pair: Tensor, **options: Any) -> Tensor:
        return recipes.f_dpo_loss(*(pair or (chosen, rejected)), divergence=divergence, beta=0.3, **options)

    wanted = -logsigmoid(0.3 * (chosen - rejected)).mean()
    alike(of("reverse_kl"), wanted, chosen)
    same(of("alpha", alpha=1e-9), wanted, 1e-6)
    same(of("alpha", alpha=1.0), of("forward_kl"))
    for divergence in ("reverse_kl", "forward_kl", "js"):
        # Swapped, the argument of σ has the other sign: the two probabilities sum to 1.
        there, back = of(divergence, L_W[:1], L_L[:1]), of(divergence, L_L[:1], L_W[:1])
        same((-there).exp() + (-back).exp(), double(1.0)[0])
    far = torch.tensor([-300.0]).requires_grad_()
    for divergence, options in (("forward_kl", {}), ("js", {}), ("alpha", {"alpha": 0.7})):
        loss = of(divergence, far, torch.zeros(1), log_ratio_clamp=20.0, **options)
        assert loss.isfinite()
        assert gradient_of(loss, far) == 0
    loss = of("js", far, torch.zeros(1))
    assert loss.isfinite()
    assert gradient_of(loss, far).isfinite()


def test_losses_of_equal_answers() -> None:
    chosen, rejected = (L_W.clone().requires_grad_() for _ in range(2))
    for loss, slope in (
        (recipes.genarm_loss(chosen, rejected, beta=0.2), -0.1),
        (recipes.xpo_loss(chosen, rejected, L_L, alpha=0.0, beta=0.2), -0.1),
        (recipes.diffusion_dpo_loss(chosen, rejected, L_L, L_L, beta=0.4), 0.1),
    ):
        same(loss, LOG_2)
        same(gradient_of(loss, chosen), torch.full_like(chosen, slope / 3))
        same(gradient_of(loss, rejected), torch.full_like(chosen, -slope / 3))


def test_xpo_pushes_the_references_samples_down() -> None:
    samples = double(-3, -4, -5, -6).requires_grad_()
    loss = recipes.xpo_loss(L_W, L_L, samples, alpha=0.2)
    same(gradient_of(loss, samples), torch.full_like(samples, 0.05))
    same(recipes.xpo_loss(L_W, L_L, samples, alpha=0.0), recipes.f_dpo_loss(L_W, L_L, beta=0.1))


def test_the_trained_mask_of_sparsepo() -> None:
    torch.manual_seed(0)
    trained = recipes.SparseMask(hidden_size=16, layers=3, dropout=0.0).double()
    hidden = [torch.randn(6, 5, 16).double().requires_grad_() for _ in range(3)]
    weights = trained(hidden)
    assert weights.shape == (6, 5)
    by_hand = torch.zeros(6, 5).double()
    for layer, h, share in zip(trained.of_layer, hidden, trained.mixer.weight[0], strict=True):
        normed = torch.nn.functional.layer_norm(h, (16,), trained.norm.weight, trained.norm.bias)
        by_hand = by_hand + share * (normed @ layer.weight[0] + layer.bias).clamp(min=0)
    same(weights, by_hand.clamp(min=0))
    # Enough of a penalty on the weights makes them smaller.
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    sizes = []
    for _ in range(30):
        weights = trained(hidden)
        loss = recipes.sparsepo_loss(LOGITS, REFERENCE, LABELS, weights, weights, ratio_l1=1.0, kl_l1=1.0, mask=MASK)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sizes.append(weights.sum().item())
    assert sizes[-1] < 0.5 * sizes[0]
    assert all(h.grad is None for h in hidden)
    with pytest.raises(ValueError, match="SparseMask: hidden_states has 2 layers; expected 3"):
        trained(hidden[:2])


def test_the_weights_of_mapo_do_not_depend_on_the_scale() -> None:
    x = BATCH["old_logits"][..., 0]
    same(recipes.mapo_weights(x, MASK), recipes.mapo_weights(3 * x - 7, MASK))
    assert (recipes.mapo_weights(torch.ones_like(x), MASK) == MASK).all()
    assert recipes.mapo_weights(x[:, :0], MASK[:, :0]).shape == (6, 0)
    assert (recipes.mapo_weights(x, MASK & False) == 0).all()


def test_what_is_wrong_is_named() -> None:
    given = (LOGITS, REFERENCE, LABELS)
    for call, message in (
        (lambda: recipes.tdpo_loss(*given, version=3), "tdpo_loss: version is 3; expected 1 or 2"),
        (lambda: recipes.tdpo_loss(*given, version=1, alpha=0.5), "alpha is 0.5; version 1 has none, expected None"),
        (lambda: recipes.tdpo_loss(LOGITS[:5], REFERENCE[:5], LABELS[:5]), r"logits has shape \[5, 5, 7\]; expected"),
        (lambda: recipes.rrpo_loss(LOGITS[:5], REFERENCE[:5], LABELS[:5], EVERY[:5]), r"logits has shape \[5, 5, 7\]"),
        (lambda: recipes.f_dpo_loss(L_W, L_L, beta=0.1, divergence="tvd"), "divergence is 'tvd'; expected reverse_kl"),
        (lambda: recipes.f_dpo_loss(L_W, L_L, beta=0.1, alpha=0.3), "alpha is 0.3 with divergence 'reverse_kl'; exp"),
        (lambda: recipes.f_dpo_loss(L_W, L_L, beta=0.1, divergence="alpha"), "alpha is None with divergence 'alpha'"),
        (lambda: recipes.f_dpo_loss(L_W, L_L[:1], beta=0.1), r"rejected_log_ratios has shape \[1\]; expected \[3\]"),
        (lambda: recipes.genarm_loss(L_W, L_L[:1]), r"rejected_logprobs has shape \[1\]; expected \[3\] like chosen"),
        (lambda: recipes.xpo_loss(L_W, L_L, L_L, link="hinge"), "link is 'hinge'; expected logistic or ipo"),
        (lambda: recipes.diffusion_dpo_loss(L_W, L_L, L_W, L_L[:1], beta=1.0), r"reference_rejected_errors has shape"),
        (lambda: recipes.reward_weighted_loss(L_W, L_L[:1]), r"rewards has shape \[1\]; expected \[3\] like errors"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
