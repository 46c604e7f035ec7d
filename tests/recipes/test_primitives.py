"""What recipes are built of: sums, selections, lists and mixtures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from recipe_case import batch, double, gradient_of, same
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.recipes import lists, mixtures, reductions, selection

INF, NAN = math.inf, math.nan
BATCH = batch(sequences=4, tokens=3, vocab=9, seed=2)
S, T = BATCH["logits"], BATCH["teacher_logits"]


def boolean(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


GROUPS = torch.tensor([7, -2, 7, 0, 0])
KEPT = boolean(1, 1, 1, 0, 0)
ALL_OF = [reductions.group_sum, reductions.group_mean, reductions.group_logsumexp, reductions.group_softmax]


def group_by_group(function: Callable[..., Tensor], x: Tensor, kept: Tensor) -> Tensor:
    out = []
    for i in range(len(x)):
        peers = x[(GROUPS[i] == GROUPS) & kept]
        if function is reductions.group_sum:
            out.append(peers.sum())
        elif function is reductions.group_mean:
            out.append(peers.sum() / max(len(peers), 1))
        elif function is reductions.group_logsumexp:
            out.append(peers.logsumexp(0) if len(peers) else double(-INF)[0])
        else:
            out.append(x[i].exp() / peers.exp().sum() if kept[i] else double(0.0)[0])
    return torch.stack(out)


@pytest.mark.parametrize("function", ALL_OF)
def test_groups(function: Callable[..., Tensor]) -> None:
    """With a group that has no member in the mask, where NaN stands; and in any order."""
    x = double(0.3, -1.0, 2.0, NAN, NAN).requires_grad_()
    clean = double(0.3, -1.0, 2.0, 0.0, 0.0).requires_grad_()
    got, wanted = function(x, GROUPS, KEPT), group_by_group(function, clean, KEPT)
    same(got, wanted)
    ramp = torch.where(wanted.isfinite(), torch.arange(1.0, 6.0).double(), 0.0)
    same(gradient_of((torch.where(ramp > 0, got, 0.0) * ramp).sum(), x),
         gradient_of((torch.where(ramp > 0, wanted, 0.0) * ramp).sum(), clean))  # fmt: skip
    order = torch.tensor([3, 0, 4, 2, 1])
    same(function(x[order], GROUPS[order], KEPT[order]), got[order])
    same(function(clean, GROUPS), group_by_group(function, clean, torch.ones_like(KEPT)))
    assert function(x[:0], GROUPS[:0]).shape == (0,)


def test_a_group_without_probability() -> None:
    x, groups = double(1.0, -INF, -INF).requires_grad_(), torch.tensor([0, 1, 1])
    total, shares = reductions.group_logsumexp(x, groups), reductions.group_softmax(x, groups)
    assert total.tolist() == [1.0, -INF, -INF]
    assert gradient_of(total.sum(), x).tolist() == [1.0, 0.0, 0.0]
    assert shares.tolist() == [1.0, 0.0, 0.0]
    assert gradient_of(shares.sum(), x).tolist() == [0.0, 0.0, 0.0]
    assert reductions.group_logsumexp(double(INF, 1.0), groups[:2] * 0)[0] == INF


def test_group_softmax_of_far_scores() -> None:
    got = reductions.group_softmax(torch.tensor([1000.0, -1000.0, 999.0, -1e30, 1.0]), torch.tensor([0, 0, 0, 1, 2]))
    same(got, double(1 / (1 + math.exp(-1)), 0.0, 1 / (1 + math.e), 1.0, 1.0), 1e-6)


def test_sequences_without_tokens_and_nan_where_masked() -> None:
    x = torch.tensor([[1.0, NAN, 3.0], [NAN, NAN, NAN]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    zeros = torch.zeros(2, 3).double()
    for function, wanted, slopes in (
        (reductions.sequence_sum, [4.0, 0.0], [[1.0, 0, 1.0], [0, 0, 0]]),
        (reductions.sequence_mean, [2.0, 0.0], [[0.5, 0, 0.5], [0, 0, 0]]),
        (reductions.batch_mean, 2.0, [[0.5, 0, 0.5], [0, 0, 0]]),
        (reductions.masked, [[1.0, 0, 3.0], [0, 0, 0]], [[1.0, 0, 1.0], [0, 0, 0]]),
        (reductions.reverse_cumsum, [[4.0, 3.0, 3.0], [0, 0, 0]], [[1.0, 0, 3.0], [0, 0, 0]]),
    ):
        got = function(x, mask)
        same(got, torch.tensor(wanted))
        same(gradient_of(got.sum(), x), torch.tensor(slopes))
        assert (function(x, zeros.bool()) == 0).all()
    same(reductions.sequence_mean(zeros + 2), double(2.0, 2.0))
    assert reductions.batch_mean(zeros[:, :0]) == 0
    assert (reductions.sequence_mean(zeros[:, :0]) == 0).all()


def test_segments() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, NAN], [NAN, 1.0, NAN, NAN]], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([[2, 0, 2, -1], [-1, 1, -1, -1]])
    same(reductions.segment_sum(x, segments, 3), torch.tensor([[2.0, 0, 5.0], [0, 1.0, 0]]))
    means = reductions.segment_mean(x, segments, 3)
    same(means, torch.tensor([[2.0, 0, 2.5], [0, 1.0, 0]]))
    same(gradient_of(means.sum(), x), torch.tensor([[0.5, 1, 0.5, 0], [0, 1.0, 0, 0]]))


def test_valid_labels_and_rows() -> None:
    labels, mask = torch.tensor([[3, -100, 2]]), boolean(1, 1, 0)[None]
    found, valid = reductions.valid_labels(labels, mask)
    assert found.tolist() == [[3, -1, -1]]
    assert valid.tolist() == [[True, False, False]]
    logits = torch.zeros(1, 3, 5)
    assert reductions.valid_rows(logits, labels, mask).tolist() == [[True, False, False]]
    assert reductions.valid_rows(logits, labels, None).tolist() == [[True, False, True]]
    assert reductions.valid_rows(logits, None, mask.long()).tolist() == [[True, True, False]]
    assert reductions.valid_rows(logits, None, None).all()


def test_a_policy_result() -> None:
    loss = torch.tensor([[1.0, NAN], [3.0, 5.0]], requires_grad=True)
    logprob, mask = torch.tensor([[-1.0, NAN], [-2.0, -3.0]]), boolean(1, 0, 1, 1).reshape(2, 2)
    out = reductions.policy_result(loss, logprob, mask, metrics={"ratio": logprob}, entropy=logprob)
    assert out.loss.item() == 3
    same(gradient_of(out.loss, loss), torch.tensor([[1.0, 0], [1, 1]]) / 3, 1e-6)
    assert out.metrics["tokens"] == 3
    assert out.metrics["ratio"] == -2
    assert out.logprob.tolist() == out.entropy.tolist() == [[-1.0, 0.0], [-2.0, -3.0]]
    by_sequence = reductions.policy_result(loss, logprob, mask, aggregation="seq-mean-token-mean")
    assert by_sequence.loss.item() == 2.5
    nothing = reductions.policy_result(loss, logprob, torch.zeros_like(mask), metrics={"ratio": logprob})
    assert nothing.loss == nothing.metrics["ratio"] == 0


def chosen(scores: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The first of equal scores, one by one."""
    places = sorted(mask.nonzero()[:, 0].tolist(), key=lambda i: (-scores[i].item(), i))
    out = torch.zeros_like(mask)
    out[places[: max(int(fraction * len(places)), 1)]] = True
    return out


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_highest_and_lowest(fraction: float) -> None:
    """With ties, infinite scores, NaN where masked, and a sequence without tokens."""
    scores = double(2.0, NAN, 5.0, 5.0, -INF, 2.0, 5.0, INF, NAN, -INF).reshape(2, 5)
    mask = boolean(1, 0, 1, 1, 1, 1, 1, 1, 0, 1).reshape(2, 5)
    flat, kept = scores.reshape(-1), mask.reshape(-1)
    assert torch.equal(selection.highest(scores, mask, fraction).reshape(-1), chosen(flat, kept, fraction))
    assert torch.equal(selection.lowest(scores, mask, fraction).reshape(-1), chosen(-flat, kept, fraction))
    rows = torch.stack([chosen(*row, fraction) for row in zip(scores, mask, strict=True)])
    assert torch.equal(selection.highest(scores, mask, fraction, per_sequence=True), rows)
    one = torch.stack([mask[0], torch.zeros_like(mask[1])])
    assert not selection.highest(scores, one, 1.0, per_sequence=True)[1].any()
    assert not selection.highest(scores, torch.zeros_like(mask), fraction).any()
    assert torch.equal(
        selection.highest(scores, mask, torch.tensor(fraction)), selection.highest(scores, mask, fraction)
    )


def test_a_score_that_is_no_number_is_seen() -> None:
    assert selection.highest(double(1.0, NAN, 3.0)[None], boolean(1, 1, 1)[None], 0.4).tolist() == [
        [False, True, False]
    ]


def test_prefix_share() -> None:
    x = double(NAN, 1.0, 1.0, 2.0, 4.0).expand(3, 5)
    mask = boolean(0, 1, 1, 1, 1).expand(3, 5).clone()
    mask[1, 2] = False
    mask[2] = False
    for share, wanted in ((0.0, [1, 1, 0]), (0.125, [1, 1, 0]), (0.26, [3, 2, 0]), (0.5, [3, 3, 0]), (1.0, [4, 3, 0])):
        found = selection.prefix_share(x, mask, share)
        assert found.sum(-1).tolist() == wanted
        assert not (found & ~mask).any()
    assert selection.prefix_share(torch.zeros(1, 5), mask[:1], 0.5).tolist() == [[False, True, False, False, False]]


def test_windows_and_first_tokens() -> None:
    turns = torch.tensor([[-1, 0, 1, 2, 2]])
    assert [selection.turn_window(turns, n).sum().item() for n in range(5)] == [0, 1, 2, 4, 4]
    mask = boolean(0, 1, 0, 1, 1)[None]
    assert selection.first_tokens(mask, 2).tolist() == [[False, True, False, True, False]]
    assert not selection.first_tokens(mask, 0).any()
    assert torch.equal(selection.first_tokens(mask, 9), mask)


def test_a_quantile_band() -> None:
    x = torch.tensor([[4.0, NAN, 1.0, 3.0], [7.0, 7.0, 7.0, 7.0], [NAN, 1.0, 2.0, 3.0]], dtype=torch.float64)
    mask = boolean(1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0).reshape(3, 4)
    low, high = selection.quantile_band(x.requires_grad_(), mask, 0.25, 0.5)
    same(torch.stack([low, high])[:, :2], torch.tensor([[2.0, 7.0], [3.0, 7.0]]))
    assert low[2].isnan()
    assert high[2].isnan()
    assert not low.requires_grad


def variance_between(x: Tensor, threshold: float) -> float:
    below, above = x[x < threshold], x[x >= threshold]
    if not len(below) or not len(above):
        return 0.0
    return len(below) * len(above) * (below.mean() - above.mean()).item() ** 2


@pytest.mark.parametrize("seed", range(8))
def test_otsu_beside_all_thresholds(seed: int) -> None:
    """Two or three heaps with gaps between them, in bins so fine that each number has one; NaN where masked."""
    torch.manual_seed(seed)
    heaps = ((0.0, 4.0), (9.0, 11.0), (15.0, 20.0))[: 2 + seed % 2]
    x = torch.cat([low + (high - low) * torch.rand(12, dtype=torch.float64) for low, high in heaps])
    best = max(variance_between(x, edge) for edge in x.tolist())
    with_others, mask = torch.cat([x, double(NAN, 400.0)]), torch.cat([torch.ones(len(x)), torch.zeros(2)]).bool()
    assert variance_between(x, selection.otsu_threshold(with_others, mask, 10_000).item()) == pytest.approx(best)
    # In few bins: the best of the cuts between them.
    low, width = x.amin(), (x.amax() - x.amin()) / 25
    bins = ((x - low) / width).floor().clamp_max(24)
    best = max(variance_between(bins, edge) for edge in range(1, 25))
    found = selection.otsu_threshold(x, torch.ones_like(x).bool(), 25)
    assert variance_between(bins, ((found - low) / width).item() - 1e-6) == pytest.approx(best, rel=1e-5)


def test_otsu_takes_one_of_two_equally_good_cuts() -> None:
    """Between them it would cut the heap in the middle."""
    x = torch.tensor([0.0, 10.0, 20.0])
    found = selection.otsu_threshold(x, torch.ones(3).bool(), 5)
    assert found.item() == pytest.approx(6.0)
    assert variance_between(x, found.item()) == variance_between(x, 15.0)


def test_otsu_without_two_sides() -> None:
    alike = torch.full((2, 3), 0.7)
    assert selection.otsu_threshold(alike, torch.ones(2, 3).bool()) == alike[0, 0]
    for empty in (alike * NAN, alike[:0]):
        assert selection.otsu_threshold(empty, torch.zeros_like(empty).bool()) == 0
    apart = torch.tensor([0.0, 0.0, 1.0])
    assert 0.4 < selection.otsu_threshold(apart, torch.ones(3).bool()).item() < 0.6


def orders(k: int) -> list[list[int]]:
    return [list(order) for order in itertools.permutations(range(k))]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_orders_of_a_list_share_a_probability_of_1(k: int) -> None:
    scores = torch.randn(3, k, dtype=torch.float64) * 2
    total = sum(lists.plackett_luce(scores[:, order]).neg().exp() for order in orders(k))
    same(total, torch.ones(3))
    # Those of the first two of a longer list, too.
    longer = torch.randn(5, dtype=torch.float64)
    pairs = [
        lists.plackett_luce(longer[[i, j]], tail_logprob=longer[[n for n in range(5) if n not in (i, j)]].logsumexp(0))
        for i in range(5) for j in range(5) if i != j
    ]  # fmt: skip
    same(torch.stack(pairs).neg().exp().sum(), double(1.0)[0])


def test_the_first_places_of_a_row_from_their_columns_and_the_tail() -> None:
    """By `topk_token_stats`: value and gradient are those of the whole row."""
    k, weights = 4, double(1.0, 0.5, 2.0, 0.25)
    order = T.argsort(-1, descending=True)
    s = S.clone().requires_grad_()
    whole = s.gather(-1, order)
    terms = torch.stack([whole[..., j:].logsumexp(-1) - whole[..., j] for j in range(k)], dim=-1)
    wanted = (weights * terms).sum(-1)
    stats = kk.topk_token_stats(s, order[..., :k])
    got = lists.plackett_luce(stats.topk_logprobs, weights, tail_logprob=stats.tail_logprob)
    same(got, wanted)
    same(gradient_of(got.sum(), s), gradient_of(wanted.sum(), s))
    # All of a row are a list without a tail.
    full = kk.topk_token_stats(s, order)
    assert (full.tail_logprob == -INF).all()
    closed = lists.plackett_luce(full.topk_logprobs, tail_logprob=full.tail_logprob)
    same(closed, lists.plackett_luce(whole))
    same(gradient_of(closed.sum(), s), gradient_of(lists.plackett_luce(whole).sum(), s))


def test_a_list_is_indifferent_to_a_shift_and_bears_far_scores_and_empty_places() -> None:
    scores = double(1.0, -3.0, 0.5)
    same(lists.plackett_luce(scores + 1e4), lists.plackett_luce(scores), 1e-8)
    far = torch.tensor([-2e3, -1e3, 0.0], requires_grad=True)
    loss = lists.plackett_luce(far)
    assert loss == 3000
    assert gradient_of(loss, far).tolist() == [-1.0, -1.0, 2.0]
    padded = torch.cat([scores, double(-INF, -INF)]).requires_grad_()
    for tail in (double(-INF)[0], double(0.3)[0]):
        loss = lists.plackett_luce(padded, double(1, 1, 1, 0, 0), tail_logprob=tail)
        same(loss, lists.plackett_luce(scores, tail_logprob=tail))
        assert gradient_of(loss, padded).isfinite().all()
    assert lists.plackett_luce(scores[:0]) == 0


def test_preference_losses() -> None:
    margin = double(-1e4, -2.0, 0.0, 3.0, 1e4).requires_grad_()
    sigmoid = torch.sigmoid(0.5 * margin[1:4])
    got = lists.preference_loss(margin, beta=0.5, label_smoothing=0.1)
    same(got[1:4], -0.9 * sigmoid.log() - 0.1 * (1 - sigmoid).log())
    assert got.isfinite().all()
    assert gradient_of(got.sum(), margin).isfinite().all()
    same(lists.preference_loss(margin, link="ipo", beta=0.25), (margin - 2).square())
    same(lists.preference_loss(margin, link="hinge", beta=0.5), (1 - 0.5 * margin).clamp_min(0))
    with pytest.raises(ValueError, match=r"^preference_loss: link is 'sigmoid'; expected logistic, ipo or hinge"):
        lists.preference_loss(margin, link="sigmoid", label_smoothing=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^preference_loss: label_smoothing is 0.1; link 'ipo' has none"):
        lists.preference_loss(margin, link="ipo", label_smoothing=0.1)


def test_mixed_logits() -> None:
    weight = torch.rand(4, 3, dtype=torch.float64)
    mixed = mixtures.mix_logits((weight, S), (1 - weight, T), (0.0, S * NAN))
    powers = S.softmax(-1) ** weight[..., None] * T.softmax(-1) ** (1 - weight[..., None])
    same(mixed.softmax(-1), powers / powers.sum(-1, keepdim=True))
    assert mixtures.mix_logits((2, S.bfloat16().requires_grad_())).dtype == torch.float32
    closed = torch.where(torch.arange(9) == 4, -INF, S)
    for pair in (((-0.5, closed), (1.5, T)), ((-0.5, closed), (1.5, closed)), ((1.5, T), (-0.5, closed))):
        assert (mixtures.mix_logits(*pair)[..., 4] == -INF).all()
    assert mixtures.mix_logits((0.0, closed), (1.0, T)).isfinite().all()
    with pytest.raises(ValueError, match=r"^mix_logits: there is no term"):
        mixtures.mix_logits()


def test_a_batch_marginal() -> None:
    mask = BATCH["mask"]
    s = torch.where(mask[..., None], S, NAN).requires_grad_()
    clean = S.clone().requires_grad_()
    got, wanted = mixtures.batch_marginal(s, mask, 0.5), (clean[mask] / 0.5).softmax(-1).mean(0)
    same(got, wanted)
    same(gradient_of(got.square().sum(), s), gradient_of(wanted.square().sum(), clean))
    same(mixtures.batch_marginal(S), S.softmax(-1).mean((0, 1)))
    assert (mixtures.batch_marginal(s, torch.zeros_like(mask)) == 0).all()


def test_the_divergence_of_gaussians() -> None:
    mean, log_variance, other_mean, other = (torch.randn(4, 3, dtype=torch.float64) for _ in range(4))
    normal = torch.distributions.Normal
    first, second = normal(mean, (log_variance / 2).exp()), normal(other_mean, (other / 2).exp())
    wanted = torch.distributions.kl_divergence(first, second).sum(-1)
    same(mixtures.gaussian_kl(mean, log_variance, other_mean, other), wanted)
    standard = normal(torch.zeros_like(mean), torch.ones_like(mean))
    same(mixtures.gaussian_kl(mean, log_variance), torch.distributions.kl_divergence(first, standard).sum(-1))
    assert (mixtures.gaussian_kl(mean, log_variance, mean, log_variance) == 0).all()
    same(mixtures.gaussian_kl(mean, log_variance, other_mean, log_variance),
         ((mean - other_mean).square() / 2 * (-log_variance).exp()).sum(-1))  # fmt: skip


def test_bfloat16_counts_beyond_256() -> None:
    x, one_group = torch.cat([torch.ones(700), torch.zeros(300)]).bfloat16(), torch.zeros(1000, dtype=torch.int64)
    assert reductions.group_sum(x, one_group)[0] == 700
    assert reductions.group_mean(x, one_group)[0].item() == pytest.approx(0.7)
    assert reductions.group_softmax(torch.zeros_like(x), one_group).sum().item() == pytest.approx(1.0)
    assert reductions.sequence_sum(x[None])[0] == reductions.reverse_cumsum(x[None])[0, 0] == 700
    assert reductions.sequence_mean(x[None], torch.ones(1, 1000))[0].item() == pytest.approx(0.7)
