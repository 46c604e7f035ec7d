"""What papers 26, 30, 48, 56, 68, 82 say of their losses, as identities and exact expectations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from recipe_case import S, T, batch, double, gradient_of, same
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

import kldiv_kernels as kk
from kldiv_kernels import recipes

BATCH = batch(sequences=4, tokens=6, vocab=11, seed=34)
LOGITS, TEACHER, LABELS, MASK = (BATCH[name] for name in ("logits", "teacher_logits", "token_ids", "mask"))
GROUPS = torch.tensor([5, 5, 5, 2, 2, 9])
SCORES, ADVANTAGES = double(0.4, -0.3, 1.0, 0.2, 0.9, 0.3), double(0.5, -1.0, 0.5, 2.0, -2.0, 0.0)


def pld(logits: Tensor, teacher: Tensor = TEACHER, **options: Any) -> Tensor:
    return recipes.pld_loss(logits, teacher, LABELS, mask=MASK, **options)


def test_the_gradient_of_pld() -> None:
    """Σ_k α_k(softmax of what is left − one-hot of the place), of a row; it sums to 0."""
    s, t = double(*S).requires_grad_(), double(*T)
    gradient = gradient_of(recipes.pld_loss(s[None], t[None], torch.tensor([3]), weight_temperature=1.0), s)
    wanted, left = torch.zeros(4).double(), torch.ones(4, dtype=torch.bool)
    for place in (3, 1, 0, 2):
        share = torch.where(left, s.detach(), -torch.inf).softmax(-1)
        wanted = wanted + t.softmax(-1)[place] * (share - torch.eye(4).double()[place])
        left[place] = False
    same(gradient, wanted)
    same(gradient.sum(), double(0.0)[0])


@pytest.mark.parametrize("k", [None, 4])
def test_pld_changes_with_no_shift_and_starts_as_cross_entropy(k: int | None) -> None:
    logits = LOGITS.clone().requires_grad_()
    found = pld(logits, k=k)
    same(pld(logits + torch.randn(4, 6, 1), k=k), found)
    # A teacher that is sure of the label leaves the first place alone.
    sure = torch.zeros_like(LOGITS).scatter(-1, LABELS[..., None], 500.0)
    one = pld(logits, sure, k=k, weight_temperature=1.0)
    same(one, cross_entropy(logits[MASK], LABELS[MASK]))


def test_all_places_and_the_first_of_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(7, 900).requires_grad_(), 3 * torch.randn(7, 900)
    labels = torch.where(torch.arange(7) % 2 == 0, teacher.argmax(-1), 4)
    labels[3] = -100
    for k in (1, 5, 900):
        found = recipes.pld_loss(logits, teacher, labels, k=k, weight_temperature=1.0)
        exact = torch.zeros(()).double()
        for row in range(7):
            if row == 3:
                continue
            order = teacher[row].clone()
            order[labels[row]] = torch.inf
            places = order.argsort(descending=True)
            s, a = logits[row, places].double(), teacher[row].double().softmax(-1)[places]
            behind = s.flip(0).logcumsumexp(0).flip(0)
            exact = exact + (a * (behind - s))[:k].sum() / 6
        assert (found - exact).abs() < 1e-5
        gradient, wanted = gradient_of(found, logits), gradient_of(exact, logits)
        assert (gradient - wanted).abs().max() <= 2e-5 * wanted.abs().max()
        assert (gradient[3] == 0).all()
    whole = recipes.pld_loss(logits, teacher, labels, weight_temperature=1.0)
    torch.testing.assert_close(whole, recipes.pld_loss(logits, teacher, labels, weight_temperature=1.0, k=900))


def test_pld_in_bfloat16_and_with_padding() -> None:
    logits, teacher = (x.bfloat16() for x in (LOGITS, TEACHER))
    exact = logits.float(), teacher.float(), LABELS.clamp_max(8)
    whole = recipes.pld_loss(*exact, vocab_size=9)
    torch.testing.assert_close(whole, recipes.pld_loss(*exact, vocab_size=9, k=9))
    for k in (None, 9):
        found = recipes.pld_loss(logits, teacher, LABELS.clamp_max(8), vocab_size=9, k=k)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        cut = recipes.pld_loss(logits[..., :9], teacher[..., :9], LABELS.clamp_max(8), k=k)
        torch.testing.assert_close(found, cut, rtol=1e-5, atol=1e-5)


def crd(scores: Tensor, advantages: Tensor = ADVANTAGES, **options: Any) -> Tensor:
    return recipes.centered_reward_loss(scores, advantages, GROUPS, **options)


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_what_all_samples_of_a_prompt_have_changes_nothing(form: Any) -> None:
    scores = SCORES.clone().requires_grad_()
    shift = torch.where(GROUPS == 5, 7.0, -3.0).double()
    there, here = crd(scores + shift, ADVANTAGES + shift / 10, form=form), crd(scores, form=form)
    same(there, here)
    same(gradient_of(there, scores), gradient_of(here, scores))


def test_crd_has_nothing_to_do_where_scores_are_rewards() -> None:
    for beta in (0.5, 2.0):
        scores = (ADVANTAGES / 10 / beta + torch.where(GROUPS == 2, 4.0, 1.0)).requires_grad_()
        assert crd(scores, beta=beta) < 1e-20
        assert gradient_of(crd(scores, beta=beta), scores).abs().max() < 1e-12
    alone = recipes.centered_reward_loss(SCORES[:1], ADVANTAGES[:1], GROUPS[:1])
    assert alone == 0


def adpo(logprobs: Tensor, anchor: Tensor, targets: Tensor, groups: Tensor = GROUPS, **options: Any) -> Tensor:
    return recipes.adpo_loss(logprobs, anchor, targets, groups, **options)


def test_adpo_at_its_anchor() -> None:
    logprobs = SCORES.clone().requires_grad_()
    targets = recipes.reward_targets(ADVANTAGES, GROUPS)
    count = torch.tensor([3, 3, 3, 2, 2, 1]).double()
    slopes = gradient_of(adpo(logprobs, SCORES, targets, tau=0.5), logprobs)
    same(slopes, (1 / count - targets) / 0.5 / 3)
    shifted = adpo(logprobs + torch.where(GROUPS == 5, 9.0, -2.0), SCORES - 1, targets)
    same(shifted, adpo(logprobs, SCORES, targets))
    away = gradient_of(adpo(logprobs, SCORES.flip(0), targets), logprobs)
    for group in (5, 2, 9):
        same(away[group == GROUPS].sum(), double(0.0)[0])


def test_adpo_of_two_candidates_is_dpo() -> None:
    logprobs, anchor, groups = SCORES[:4].clone().requires_grad_(), ADVANTAGES[:4], torch.tensor([0, 0, 1, 1])
    delta = (logprobs - anchor).reshape(2, 2)
    margin = 0.3 * (delta[:, 0] - delta[:, 1])
    for q in (1.0, 0.8):
        found = adpo(logprobs, anchor, double(q, 1 - q, q, 1 - q), groups, tau=1 / 0.3)
        wanted = -(q * logsigmoid(margin) + (1 - q) * logsigmoid(-margin)).mean()
        same(found, wanted)
        same(gradient_of(found, logprobs), gradient_of(wanted, logprobs))
    # Without an anchor and with τ = 1: cross-entropy of the teacher's distribution.
    s, t, one = double(*S).requires_grad_(), double(*T), torch.zeros(4, dtype=torch.int64)
    found = adpo(s, torch.zeros(4).double(), t.softmax(-1), one, tau=1.0)
    same(found, kk.soft_cross_entropy(s[None], t[None]))
    assert adpo(torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64)) == 0


def test_the_temperature_of_adpo() -> None:
    """Of a sure policy from τ for the best to 1.5 τ for the worst; of an unsure one 1.5 τ."""
    rewards, groups = double(0, 1, 0.5, 3, 3), torch.tensor([0, 0, 0, 1, 1])
    sure = recipes.adaptive_tau(torch.zeros(5).double(), rewards, groups, vocab_size=50, tau=1.0)
    same(sure, double(1.5, 1.0, 1.25, 1.5, 1.5))
    unsure = recipes.adaptive_tau(double(*[-math.log(50)] * 5), rewards, groups, vocab_size=50, tau=1.0)
    same(unsure, torch.full((5,), 1.5).double())


def test_the_gradient_of_mirror_prox_is_that_of_its_step() -> None:
    """Over four answers of one token, each as often as the policy writes it."""
    logits = double(*S).requires_grad_()
    q, reference, target = (x.log_softmax(-1) for x in (logits, double(*T), double(0.5, 0, 0, -0.5)))
    beaten = double(0.9, 0.3, 0.6, 0.1)
    for eta in (0.4, math.inf):
        gradient = torch.zeros(4).double()
        for y, share in enumerate(q.exp().tolist()):
            one = (x[y].reshape(1, 1) for x in (q, reference, target))
            loss = recipes.mirror_prox_loss(*one, beaten[y : y + 1], beta=0.7, eta=eta)
            gradient = gradient + share * gradient_of(loss, logits)
        p = q.exp()
        step = (p * beaten).sum() + 0.7 * (p * (q - reference)).sum()
        if eta != math.inf:
            step = step + 0.7 / eta * (p * (q - target)).sum()
        same(gradient, gradient_of(step, logits))


def test_ipo_of_policies_that_play() -> None:
    """All pairs of four answers, drawn alike: the tabular gradient, and no loss at the solution."""
    logits = double(*S).requires_grad_()
    reference, preferred = double(*T).log_softmax(-1), double(0.9, 0.3, 0.6, 0.1)
    first, second = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)

    def loss(h: Tensor, p: Tensor = preferred) -> Tensor:
        return recipes.online_ipo_loss(h[first], h[second], p[first], p[second], beta=0.5)

    h = logits.log_softmax(-1) - reference
    r = h - preferred / 0.5
    same(gradient_of(loss(h), logits), 4 / 4 * (r - r.mean()).detach())
    solution = (reference + preferred / 0.5).log_softmax(-1) - reference
    assert loss(solution) < 1e-20
    same(loss(h, torch.full((4,), 0.5).double()), ((h[first] - h[second]) ** 2).mean())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_extragradient(name: str) -> None:
    """The second gradient against the opponents of the point ahead, from the weights and the state of the beginning."""
    torch.manual_seed(0)
    model, options = nn.Linear(3, 3, bias=False), {"lr": 0.1}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    x = torch.randn(5, 3)

    def loss(opponents: Tensor, of: nn.Module = model) -> Tensor:
        return (of(x) * opponents).sum() + of(x).square().sum()

    seen = []
    for _ in range(3):
        before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        found = recipes.extragradient_step(optimizer, lambda: seen.append(model(x).detach()) or seen[-1], loss)  # type: ignore[func-returns-value]
        here, ahead = seen[-2:]
        same(here, before(x).detach(), 1e-6)
        by_hand = copy.deepcopy(before)
        other = getattr(torch.optim, name)(by_hand.parameters(), **options)
        other.load_state_dict(copy.deepcopy(state))
        loss(here, by_hand).backward()
        other.step()
        torch.testing.assert_close(ahead, by_hand(x).detach())
        by_hand = copy.deepcopy(before)
        other = getattr(torch.optim, name)(by_hand.parameters(), **options)
        other.load_state_dict(state)
        value = loss(ahead, by_hand)
        value.backward()
        other.step()
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(model.weight, by_hand.weight)
        assert not torch.equal(model.weight, before.weight)


def test_the_extragradient_ends_a_game_that_a_gradient_circles() -> None:
    def played(extra: bool) -> float:
        x = nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = torch.optim.SGD([x], lr=0.3)

        def opponents() -> Tensor:
            return torch.stack([x[1], -x[0]]).detach()

        def loss(other: Tensor) -> Tensor:
            return (x * other).sum()

        for _ in range(100):
            if extra:
                recipes.extragradient_step(optimizer, opponents, loss)
                continue
            optimizer.zero_grad()
            loss(opponents()).backward()
            optimizer.step()
        return x.detach().norm().item()

    assert played(extra=True) < 0.05
    assert played(extra=False) > 10


def test_inpo_begins_where_ipo_does() -> None:
    own = double(-3.0, -5.0).requires_grad_()
    numbers = [double(-4.0, -4.5), double(-3.5, -6.0), double(-4.4, -4.0), double(-1.0, -2.0), double(-9.0, -3.0)]
    rejected, chosen_reference, rejected_reference = numbers[:3]
    found = recipes.inpo_loss(own, *numbers, eta=0.2, tau=0.2)
    delta = (own - chosen_reference) - (rejected - rejected_reference)
    same(found, (delta - 1 / 0.4).square().mean())
    alike = recipes.inpo_loss(own, rejected, own.detach(), rejected, own.detach(), rejected, eta=0.2, tau=0.1)
    same(alike, double((1 / 0.4) ** 2)[0])
    same(gradient_of(alike, own), double(-1 / 0.2, -1 / 0.2) / 2)


def test_what_is_wrong_is_named() -> None:
    zero = torch.zeros(6).double()
    tokens = torch.zeros(6, 2)
    for call, message in (
        (lambda: recipes.pld_loss(LOGITS, TEACHER[:1], LABELS), r"teacher_logits has shape \[1, 6, 11\]; expected"),
        (lambda: recipes.pld_loss(LOGITS, TEACHER, LABELS[:1]), r"labels has shape \[1, 6\]; expected \[4, 6\], one a"),
        (lambda: recipes.pld_loss(LOGITS, TEACHER, LABELS, k=12), "k"),
        (lambda: crd(SCORES, form="l1"), "centered_reward_loss: form is 'l1'; expected mse or bce"),
        (lambda: crd(SCORES, zero[:1]), r"advantages has shape \[1\]; expected \[6\] like scores"),
        (lambda: recipes.velocity_anchor(tokens, tokens[:1]), r"reference_velocities has shape \[1, 2\]; expected"),
        (lambda: recipes.velocity_anchor(tokens, tokens, zero[:1]), r"advantages has shape \[1\]; expected \[6\]"),
        (lambda: recipes.velocity_anchor(tokens, tokens, zero, kl_coef=0.0), "kl_coef is 0.0; advantages weigh it"),
        (lambda: adpo(zero, zero, zero, tau=zero[:1]), r"tau has shape \[1\]; expected \[6\] like sequence_logprobs"),
        (lambda: recipes.reward_targets(zero, GROUPS, temperature=0.0), "reward_targets: temperature is 0.0; expected"),
        (lambda: recipes.mirror_prox_loss(tokens, tokens, tokens, zero, beta=0.1, eta=0.0), "eta is 0.0; expected a"),
        (lambda: recipes.online_ipo_loss(zero, zero, zero, zero, beta=0.0), "online_ipo_loss: beta is 0.0; expected a"),
        (lambda: recipes.inpo_loss(*[zero] * 6, eta=0.1, tau=0.2), "tau is 0.2, eta 0.1; expected 0 < tau ≤ eta"),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
