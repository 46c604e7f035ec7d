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


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def case_linear_functions(rank: int, world: int) -> None:
    """Against the functions of whole logits, with gradients of everything; in several chunks, of uneven heads."""
    vocab, columns = 53, Columns(uneven(53, world, empty=True), rank)
    hidden, theirs = torch.randn(2, 6, 8), torch.randn(2, 6, 5)
    weight, bias, other = torch.randn(vocab, 8), torch.randn(vocab), torch.randn(vocab, 5)
    x = given(2, 6, vocab=vocab)
    calls: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "statistics": (
            lambda h, w, th, tw, o: kk.linear_token_stats(
                h, w, x.labels, reference_hidden=th, reference_head=tw, stats=("logprob", "js"), mask=x.mask, **o
            ).js.sum(),
            lambda s, t, o: kk.token_stats(s, t, x.labels, stats=("logprob", "js"), mask=x.mask, **o).js.sum(),
        ),
        "divergence": (
            lambda h, w, th, tw, o: kk.linear_divergence_loss(h, w, th, tw, "forward_kl", mask=x.mask, **o),
            lambda s, t, o: kk.forward_kl(s, t, mask=x.mask, **o),
        ),
        "policy": (
            lambda h, w, th, tw, o: kk.linear_policy_loss(
                h, w, x.labels, x.advantages, old_logprobs=x.old, reference_hidden=th, reference_head=tw, kl_coef=0.1,
                mask=x.mask, kl_estimator="reverse_kl", **o,
            ).loss,
            lambda s, t, o: kk.policy_loss(
                s, x.labels, x.advantages, old_logprobs=x.old, reference_logits=t, kl_coef=0.1, mask=x.mask,
                kl_estimator="reverse_kl", **o,
            ).loss,
        ),
        "top-k": (
            lambda h, w, th, tw, o: kk.linear_topk_divergence_loss(h, w, x.ids, x.topk_logprobs, "js", **o),
            lambda s, t, o: kk.topk_divergence_loss(s, x.ids, x.topk_logprobs, "js", **o),
        ),
    }  # fmt: skip
    for name, (ours, of_logits) in calls.items():
        for backend, dtype, softcap in (
            ("cpu", torch.float32, None),
            ("cpu", torch.float32, 5.0),
            ("reference", torch.float64, None),
        ):
            whole = _leaves(*(x.to(dtype) for x in (hidden, weight, bias, theirs, other)))
            h, w, b, th, tw = whole
            logits = h @ w.T + b
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            expected = of_logits(logits, th @ tw.T, {"backend": backend})
            wanted = torch.autograd.grad(expected, whole, allow_unused=True, materialize_grads=True)
            here = columns.slice
            mine = _leaves(*(y.to(dtype) for y in (hidden, weight[here], bias[here], theirs, other[here])))
            h, w, b, th, tw = mine
            head = kk.Head(w, b, softcap=softcap)
            got = ours(h, head, th, tw, {**columns.options, "rows_per_chunk": 5, "backend": backend})
            same_everywhere(got)
            tolerance = 1e-10 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
            found = torch.autograd.grad(got, mine, allow_unused=True, materialize_grads=True)
            for gradient, exact, whole_one in zip(found, wanted, (True, False, False, True, False), strict=True):
                part = exact if whole_one else exact[here]
                error = (gradient - part).abs().max() if part.numel() else torch.zeros(())
                assert error <= tolerance * exact.abs().max().clamp_min(1e-3), f"{name}, {backend}: {error}"
    # A layer in front that sums the gradient by itself.
    (h,) = _leaves(hidden)
    part = weight[columns.slice]
    loss = kk.linear_token_stats(h, part, stats=("entropy",), reduce_hidden_grad=False, **columns.options).entropy.sum()
    loss.backward()
    assert h.grad is not None
    distributed.all_reduce(h.grad)
    (exact,) = _leaves(hidden)
    kk.linear_token_stats(exact, weight, stats=("entropy",)).entropy.sum().backward()
    torch.testing.assert_close(h.grad, exact.grad, rtol=1e-5, atol=1e-5)


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
        (leaf,), (plain,) = _leaves(logits), _leaves(logits)
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
