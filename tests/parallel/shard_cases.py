"""What the ranks of a group do together with the columns of a vocabulary; each case is run by all of them.

Expected values are those of whole rows, in float64, by definition (oracle.py, public_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import oracle
import pytest
import torch
from checks import STATISTIC_NAMES, check_gradient, check_value
from public_calls import CALLS, Given, given
from ranks import same_everywhere, uneven
from small_divergences import near
from torch import Tensor, distributed

import kldiv_kernels as kk
from kldiv_kernels.parallel import agreement, shard, statistics
from kldiv_kernels.registry import STATISTICS


class Columns:
    """This rank's columns of whole rows."""

    def __init__(self, borders: list[int], rank: int) -> None:
        self.slice = slice(borders[rank], borders[rank + 1])
        self.options: dict[str, Any] = {
            "group": distributed.group.WORLD, "vocab_start": borders[rank], "vocab_size": borders[-1]
        }  # fmt: skip

    def of(self, whole: Tensor) -> Tensor:
        return whole[..., self.slice].detach().clone().requires_grad_()


def _rows(vocab: int) -> tuple[Tensor, Tensor]:
    """Student and teacher as users have them: masks of both kinds over whole shards, offsets, peaks, near rows."""
    student, teacher = 3 * torch.randn(9, vocab), 3 * torch.randn(9, vocab)
    student[1, vocab // 4 :] = -1e4
    teacher[1, vocab // 4 :] = -1e4
    student[2, : vocab // 2] = torch.finfo(torch.float32).min
    teacher[2, : vocab // 2] = torch.finfo(torch.float32).min
    student[3] += 1e4
    teacher[3] -= 1e4
    student[4, vocab // 3] += 60
    teacher[5] = student[5] + 1e-3 * torch.randn(vocab)
    student[6] = teacher[6]
    teacher[7, vocab // 2 :] = -torch.inf
    student[7, vocab // 2 :] = -torch.inf
    return student, teacher


def case_statistics_are_those_of_whole_rows(rank: int, world: int) -> None:
    for vocab, dtype, empty in (
        (211, torch.float32, True),
        (211, torch.bfloat16, False),
        (37_000, torch.float32, True),
    ):
        columns = Columns(uneven(vocab, world, empty=empty), rank)
        student, teacher = (x.to(dtype) for x in _rows(vocab))
        labels = torch.tensor([0, vocab - 1, vocab // 2, -100, 5, vocab // 3, 7, 9, vocab // 2 - 1])
        others = torch.where(labels < 0, labels, (labels + 3).clamp_max(vocab - 1))
        table = torch.stack([labels, labels, others, torch.full_like(labels, -100)], dim=-1)
        exclude = torch.tensor([1, -1, vocab - 1, -1, -1, -1, 3, -1, 2])
        mask = torch.tensor([True] * 8 + [False])
        temperature = torch.linspace(0.5, 2, 9)
        several: list[dict[str, Any]] = [
            {"labels": labels}, {"labels": table, "exclude": exclude, "mask": mask, "temperature": temperature}
        ]  # fmt: skip
        names = (
            STATISTIC_NAMES if vocab < 1000 else ["logprob", "tail_logprob", "entropy", "forward_kl", "js", "argmax"]
        )
        for options in several if names is STATISTIC_NAMES else several[:1]:
            given_labels = options["labels"]
            rest = {name: x for name, x in options.items() if name != "labels"}
            s, t = columns.of(student), columns.of(teacher)
            found = kk.token_stats(s, t, given_labels, stats=names, alpha=0.3, beta=0.3, **rest, **columns.options)
            for name in names:
                value = found[name]
                same_everywhere(value)
                cotangent = (torch.rand(value.shape) + 0.5) * torch.randn(value.shape).sign()
                expected = oracle.evaluate(
                    name, student, teacher, given_labels, cotangent=cotangent, alpha=0.3, beta=0.3, **rest
                )  # fmt: skip
                check_value(value, expected.value, dtype)
                if not STATISTICS[name].differentiable:
                    continue
                gradients = torch.autograd.grad(
                    (cotangent * value).sum(), [s, t], retain_graph=True, allow_unused=True, materialize_grads=True
                )  # fmt: skip
                for got, side, floor in zip(
                    gradients, (expected.student, expected.teacher), (expected.student_floor, expected.teacher_floor),
                    strict=True,
                ):  # fmt: skip
                    # A row's largest gradient may be another rank's.
                    whole = side.clone()
                    whole[..., columns.slice] = got.double()
                    check_gradient(whole.to(dtype), side, floor)


def case_small_divergences_keep_their_digits(rank: int, world: int) -> None:
    student, teacher = near(2 * torch.randn(4, 5000) + 50)
    columns = Columns(uneven(5000, world), rank)
    for name in ("forward_kl", "reverse_kl", "hellinger", "js", "jeffreys"):
        value = kk.token_stats(columns.of(student), columns.of(teacher), stats=(name,), **columns.options)[name]
        expected = oracle.evaluate(name, student, teacher).value
        assert (expected < 1e-5).all()
        assert ((value.detach().double() - expected).abs() <= 1e-2 * expected).all()


def case_every_public_function(rank: int, world: int) -> None:
    whole = given(2, 5, vocab=29)
    columns = Columns(uneven(29, world, empty=True), rank)
    for name, call in CALLS.items():
        exact = whole.logits.double().requires_grad_()
        expected = call.definition(whole._replace(logits=exact))
        expected.sum().backward()
        assert exact.grad is not None
        leaf = columns.of(whole.logits)
        mine: Given = whole._replace(logits=leaf, teacher=columns.of(whole.teacher).detach())
        got = call.ours(mine, **columns.options)
        same_everywhere(got)
        torch.testing.assert_close(
            got.double(), expected.detach(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
        got.sum().backward()
        assert leaf.grad is not None
        error = (leaf.grad.double() - exact.grad[..., columns.slice]).abs()
        assert (error <= 1e-5 * exact.grad.abs().max()).all(), name


def case_of_a_layer_of_the_backend_reference(rank: int, world: int) -> None:
    """float64, and statistics of one's own, for which whole rows are gathered."""
    kk.register_statistic(
        "own", value=lambda logp, logq: (logp.exp() - logq.exp()) ** 2,
        grad_logq=lambda logp, logq: 2 * (logq.exp() - logp.exp()) * logq.exp(),
        grad_logp=lambda logp, logq: 2 * (logp.exp() - logq.exp()) * logp.exp(),
    )  # fmt: skip
    columns = Columns(uneven(31, world, empty=True), rank)
    student, teacher = 2 * torch.randn(3, 31, dtype=torch.float64), 2 * torch.randn(3, 31, dtype=torch.float64)
    exact = student.clone().requires_grad_()
    (exact.softmax(-1) - teacher.softmax(-1)).square().sum().backward()
    assert exact.grad is not None
    for dtype in (torch.float64, torch.float32):
        s, t = (columns.of(x.to(dtype)) for x in (student, teacher))
        loss = kk.divergence_loss(s, t, "own", reduction="sum", **columns.options)
        loss.backward()
        assert s.grad is not None
        torch.testing.assert_close(s.grad.double(), exact.grad[..., columns.slice], rtol=1e-4, atol=1e-6)
    kk.unregister_statistic("own")


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def case_no_rows(rank: int, world: int) -> None:
    """A batch that a filter has emptied."""
    columns = Columns(uneven(29, world), rank)
    for leading in ((0,), (2, 0)):
        logits, teacher = columns.of(torch.randn(*leading, 29)), columns.of(torch.randn(*leading, 29))
        labels = torch.zeros(leading, dtype=torch.int64)
        found = kk.token_stats(logits, teacher, labels, stats=("logprob", "js", "argmax"), **columns.options)
        assert found.js.shape == found.argmax.shape == leading
        loss = kk.js_divergence(logits, teacher, **columns.options) + found.logprob.sum()
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert logits.grad.shape == logits.shape


def case_columns_at_infinity_are_found_before_none(rank: int, world: int) -> None:
    """Of a rank with fewer than k columns, what stands for the others has no number."""
    logits = torch.randn(2, 8)
    logits[0, 2:] = -torch.inf
    borders = [0, *([1] * (world - 1)), 8] if world > 1 else [0, 8]
    columns = Columns(borders, rank)
    found = kk.topk(columns.of(logits), 5, **columns.options)
    assert torch.equal(found.ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :5])
    assert torch.equal(found.values, kk.topk(logits, 5).values)


def case_what_backward_keeps(rank: int, world: int) -> None:
    """A teacher of torch.inference_mode is taken; who writes to exclude before the backward pass is told."""
    columns = Columns(uneven(29, world), rank)
    logits, hidden, weight = torch.randn(3, 29), torch.randn(3, 4), torch.randn(29, 4)
    part = weight[columns.slice]
    with torch.inference_mode():
        teacher = torch.randn(3, 29)
        here = teacher[:, columns.slice].clone()
    mine, whole = columns.of(logits), logits.clone().requires_grad_()
    kk.js_divergence(mine, here, **columns.options).backward()
    kk.js_divergence(whole, teacher).backward()
    assert mine.grad is not None
    assert whole.grad is not None
    torch.testing.assert_close(mine.grad, whole.grad[:, columns.slice], rtol=1e-5, atol=1e-6)
    mine, whole = leaves(hidden, hidden)
    kk.linear_divergence_loss(mine, part, reference_logits=here, **columns.options).backward()
    kk.linear_divergence_loss(whole, weight, reference_logits=teacher).backward()
    torch.testing.assert_close(mine.grad, whole.grad, rtol=1e-5, atol=1e-6)
    if world == 1:
        return
    for call in (
        lambda x, exclude: kk.entropy(x, exclude=exclude, **columns.options),
        lambda x, exclude: (
            kk.linear_token_stats(
                hidden.requires_grad_(), part, stats=("entropy",), exclude=exclude, **columns.options
            ).entropy
        ),
    ):
        exclude = torch.tensor([3, -1, 28])
        value = call(columns.of(logits), exclude)
        exclude.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.sum().backward()


def case_padding_and_modules(rank: int, world: int) -> None:
    """Equal shards, the default, of a padded vocabulary; the last ranks may have nothing else."""
    width, vocab = 8, 8 * world - 8 if world > 1 else 5
    student, teacher = torch.randn(3, width * world), torch.randn(3, width * world)
    student[:, vocab:] = torch.nan
    columns = slice(rank * width, (rank + 1) * width)
    leaf = student[:, columns].clone().requires_grad_()
    module = kk.nn.JSDivLoss(0.3, group=distributed.group.WORLD, vocab_size=vocab)
    loss = module(leaf, teacher[:, columns])
    exact = student[:, :vocab].clone().requires_grad_()
    expected = kk.js_divergence(exact, teacher[:, :vocab], beta=0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    whole = torch.zeros(3, width * world)
    whole[:, :vocab] = exact.grad
    torch.testing.assert_close(leaf.grad, whole[:, columns], rtol=1e-5, atol=1e-7)


def case_exchanges_are_few_and_small(rank: int, world: int) -> None:
    """One of the columns' state, one of the sums; none in the backward pass, and no more than 64 floats a row."""
    sent: list[int] = []
    gather = shard.all_gather

    def counted(group: Any, mine: Tensor) -> Tensor:
        sent.append(mine.numel() * mine.element_size())
        return gather(group, mine)

    logits, teacher = torch.randn(50, 64 // world), torch.randn(50, 64 // world)
    group = distributed.group.WORLD
    leaf = logits.requires_grad_()
    calls: dict[str, tuple[Callable[[], Tensor], int]] = {
        "logprob": (lambda: kk.selective_log_softmax(leaf, torch.zeros(50, dtype=torch.long), group=group).sum(), 1),
        "forward_kl": (lambda: kk.forward_kl(leaf, teacher, group=group), 1),
        "js": (lambda: kk.js_divergence(leaf, teacher, group=group), 2),
    }
    for name, (call, exchanges) in calls.items():
        sent.clear()
        with mock.patch.object(statistics, "all_gather", counted), mock.patch.object(agreement, "agree", mock.Mock()):
            loss = call()
            assert len(sent) == (exchanges if world > 1 else 0), name
            loss.backward()
        assert len(sent) == (exchanges if world > 1 else 0), name
        assert sum(sent) <= 64 * 4 * 50, (name, sum(sent) / 200)


def case_one_process_is_no_group(rank: int, world: int) -> None:
    """The bits of a call without a group."""
    alone = distributed.new_group([rank], use_local_synchronization=True)
    logits, teacher = torch.randn(4, 300), torch.randn(4, 300)
    for name in ("forward_kl", "js"):
        (leaf,), (plain,) = leaves(logits), leaves(logits)
        with_group, without = (
            kk.divergence_loss(leaf, teacher, name, group=alone), kk.divergence_loss(plain, teacher, name)
        )  # fmt: skip
        with_group.backward()
        without.backward()
        assert torch.equal(with_group, without)
        assert torch.equal(leaf.grad, plain.grad)


def case_what_is_wrong_is_said_on_all_ranks(rank: int, world: int) -> None:
    group = distributed.group.WORLD
    logits = torch.randn(4, 6)
    if world == 1:
        with pytest.raises(ValueError, match=r"^entropy: vocab_start|^token_stats: vocab_start is 3 in a group of one"):
            kk.entropy(logits, group=group, vocab_start=3, vocab_size=9)
        return
    odd = rank == world - 1

    def refused(call: Callable[[], Any], own: str, others: str) -> None:
        with pytest.raises((ValueError, TypeError, IndexError), match=own if odd else others):
            call()

    last = world - 1
    refused(
        lambda: kk.entropy(logits, temperature=-1.0 if odd else 1.0, group=group),
        r"^token_stats: temperature is -1.0", rf"rank {last} of group raised ValueError: token_stats: temperature",
    )  # fmt: skip
    shape = rf"^token_stats: rows is 3 on rank {last} of group; expected 4 as on rank 0"
    refused(lambda: kk.entropy(logits[:3] if odd else logits, group=group), shape, shape)
    gap = rf"^token_stats: vocab_start is {6 * last + 1} on rank {last} of group; expected {6 * last}"
    refused(lambda: kk.entropy(logits, group=group, vocab_start=6 * rank + odd, vocab_size=6 * world), gap, gap)
    short = rf"^token_stats: the ranks of group have {6 * world} columns; expected {6 * world + 1}"
    refused(lambda: kk.entropy(logits, group=group, vocab_start=6 * rank, vocab_size=6 * world + 1), short, short)
    label = torch.full((4,), 6 * world)
    outside = rf"labels\[0\] is {6 * world}; expected 0 to {6 * world - 1}"
    refused(lambda: kk.selective_log_softmax(logits, label, group=group), outside, outside)
    name = rf"^divergence_loss: stats is \['js'\] on rank {last} of group"
    refused(lambda: kk.divergence_loss(logits, logits, "js" if odd else "hellinger", group=group), name, name)
    with pytest.raises(ValueError, match=r"^divergence_loss: in_place is True, but the gradient of logits of a group"):
        kk.divergence_loss(logits * 1, logits, in_place=True, group=group)
    with pytest.raises(ValueError, match=r"^token_stats: vocab_start is 0, but group is None"):
        kk.entropy(logits, vocab_start=0)
    with pytest.raises(TypeError, match=r"^token_stats: group is str; expected a torch.distributed.ProcessGroup"):
        kk.entropy(logits, group="tp")
    # And the next call is none the worse.
    assert kk.entropy(logits, group=group).isfinite().all()
