"""What is multiplied and what is not, and the ways in which people train: upstream, graphs, autocast, compile."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from checks import BACKENDS
from projected import Model, check_gradients, model
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

import kldiv_kernels as kk
from kldiv_kernels.linear import hidden_states

COLUMNS = 60


@contextlib.contextmanager
def _products() -> Iterator[Counter[tuple[int, ...]]]:
    """Counts matrix products by the shape of their result."""
    count: Counter[tuple[int, ...]] = Counter()
    with profile(record_shapes=True) as seen:
        yield count
    for event in seen.function_events or ():
        if event.name in ("aten::mm", "aten::addmm_", "aten::addmm"):
            first = 0 if event.name == "aten::mm" else 1
            left, right = event.input_shapes[first : first + 2]
            count[left[0], right[1]] += 1


def _loss(student: Model, teacher: Model, **options: Any) -> Tensor:
    return kk.linear_divergence_loss(student.hidden, student.head, teacher.hidden, teacher.head, **options)


def _frozen(tensor: Tensor) -> Tensor:
    return tensor.detach()


def test_frozen_parts_cost_no_multiplication() -> None:
    student, teacher = model((6,), 5, COLUMNS, bias=False), model((6,), 7, COLUMNS, bias=False)
    hidden, weight, theirs, their_weight = (
        student.hidden,
        student.weight,
        _frozen(teacher.hidden),
        _frozen(teacher.weight),
    )
    logits, of_hidden, of_weight = (6, COLUMNS), (6, 5), (COLUMNS, 5)

    def counted(hidden: Tensor, weight: Tensor, backward: bool = True, **how: Any) -> Counter[tuple[int, ...]]:
        with _products() as products:
            loss = kk.linear_divergence_loss(hidden, weight, theirs, their_weight, **how)
            if backward and loss.requires_grad:
                loss.sum().backward()
        return products

    assert counted(hidden, weight) == {logits: 2, of_hidden: 1, of_weight: 1}
    assert counted(hidden, _frozen(weight)) == {logits: 2, of_hidden: 1}
    assert counted(_frozen(hidden), weight) == {logits: 2, of_weight: 1}
    assert counted(_frozen(hidden), _frozen(weight)) == {logits: 2}
    # Gradients wait where a coefficient is not known: the logits are made once more.
    assert counted(hidden, weight, reduction="none") == {logits: 4, of_hidden: 1, of_weight: 1}
    with torch.no_grad():
        assert counted(hidden, weight) == {logits: 2}
    # Rows that the mask leaves out are not there; where it leaves none there is nothing to multiply.
    mask = torch.tensor([True, False, True, True, False, False])
    assert counted(hidden, weight, mask=mask) == {(3, COLUMNS): 2, (3, 5): 1, of_weight: 1}
    assert counted(hidden, weight, mask=torch.zeros(6, dtype=torch.bool)) == {}
    with _products() as products:
        kk.linear_token_stats(hidden, weight, reference_hidden=theirs, reference_head=their_weight, stats=["entropy"])
    assert products == {logits: 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_kept_graphs_accumulation_and_no_second_derivative(backend: str) -> None:
    student, teacher = model((6,), 5, COLUMNS), model((6,), 7, COLUMNS)
    leaves = [*student.leaves, *teacher.leaves]
    for reduction in ("mean", "none"):
        plain = torch.autograd.grad(_loss(student, teacher, reduction=reduction, backend=backend).sum(), leaves)
        loss = _loss(student, teacher, reduction=reduction, backend=backend)
        for _ in range(2):
            got = torch.autograd.grad(3 * loss.sum(), leaves, retain_graph=True)
            check_gradients(list(got), [3 * x.double() for x in plain])
        got = torch.autograd.grad(-0.5 * loss.sum(), leaves)
        check_gradients(list(got), [-0.5 * x.double() for x in plain])
        again = _loss(student, teacher, reduction=reduction, backend=backend).sum()
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(again, leaves, create_graph=True)
        for _ in range(2):
            _loss(student, teacher, reduction=reduction, backend=backend).sum().backward()
        check_gradients([x.grad for x in leaves if x.grad is not None], [2 * x.double() for x in plain])
        for x in leaves:
            x.grad = None


def test_a_head_that_is_the_embedding_too_and_checkpoints() -> None:
    embedding = nn.Embedding(COLUMNS, 8)
    head = nn.Linear(8, COLUMNS, bias=False)
    head.weight = embedding.weight
    tokens, target = torch.randint(COLUMNS, (5,)), torch.randn(5, COLUMNS)

    def through_logits() -> Tensor:
        return kk.forward_kl(head(embedding(tokens).tanh()), target)

    def through_hidden() -> Tensor:
        return kk.linear_divergence_loss(embedding(tokens).tanh(), head, reference_logits=target)

    def checkpointed() -> Tensor:
        found: Tensor = checkpoint(through_hidden, use_reentrant=False)
        return found

    (wanted,) = torch.autograd.grad(through_logits(), [embedding.weight])
    for loss in (through_hidden, checkpointed):
        (got,) = torch.autograd.grad(loss(), [embedding.weight])
        check_gradients([got], [wanted.double()])


def test_autocast_and_master_weights() -> None:
    """Factors are rounded to autocast's dtype, once; the gradients are those of the float32 leaves, in float32."""
    student, teacher = model((6,), 32, 600, size=3), model((6,), 32, 600, size=3)
    leaves = [*student.leaves, *teacher.leaves]
    low = [Model(*(x.detach().bfloat16().requires_grad_() for x in side.leaves)) for side in (student, teacher)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(student, teacher)
        seen = kk.linear_token_stats(student.hidden, student.head, stats=["entropy"]).entropy
    got = torch.autograd.grad(loss, leaves)
    assert all(x.dtype == torch.float32 for x in got)
    # The biases are added in float32.
    mixed = [Model(x.hidden, x.weight, y.bias) for x, y in zip(low, (student, teacher), strict=True)]
    wanted = _loss(*mixed)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert torch.equal(seen, kk.linear_token_stats(low[0].hidden, mixed[0].head, stats=["entropy"]).entropy)
    exact = torch.autograd.grad(wanted, [*mixed[0].leaves, *mixed[1].leaves])
    check_gradients(list(got), [x.double() for x in exact], allowed=6e-3)
    # Hidden states of one dtype and a weight of another are multiplied in the wider.
    wide = kk.linear_token_stats(low[0].hidden, student.weight, stats=["entropy"]).entropy
    assert torch.equal(wide, kk.linear_token_stats(low[0].hidden.float(), student.weight, stats=["entropy"]).entropy)


def test_float16_waits_for_the_loss_scale() -> None:
    student, teacher = model((4,), 16, 3000, torch.float16, size=1), model((4,), 16, 3000, size=1)
    scale = 2.0**14
    exact = student.double()
    wanted = (
        kk.forward_kl(exact.logits(), teacher.double().logits().detach(), backend="reference", reduction="sum") / 4096
    )
    scaled = scale * kk.linear_divergence_loss(
        student.hidden, student.head, _frozen(teacher.hidden), _frozen(teacher.weight), normalizer=4096,
        reference_logits=None,
    ) if teacher.bias is None else scale * kk.linear_divergence_loss(
        student.hidden, student.head, _frozen(teacher.hidden), kk.Head(_frozen(teacher.weight), _frozen(teacher.bias)),
        normalizer=4096,
    )  # fmt: skip
    got = torch.autograd.grad(scaled, student.leaves)
    check_gradients(
        [x.double() / scale for x in got], list(torch.autograd.grad(wanted, exact.leaves)), allowed=2e-3
    )  # fmt: skip
    # Under autocast the factors alone are float16.
    hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(5, 3)
    assert not hidden_states("test", hidden, weight).waits()
    with torch.autocast("cpu", torch.float16):
        assert hidden_states("test", hidden, weight).waits()
        assert not hidden_states("test", hidden.detach(), weight, hidden, weight.double()).waits()


def _forms(student: Model, teacher: Model) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    labels = torch.randint(COLUMNS, (2, 3))
    ids = torch.randn(2, 3, COLUMNS).topk(4).indices
    logprobs = torch.randn(2, 3, 6).log_softmax(-1)[..., :4]
    yield "statistics", lambda: kk.linear_token_stats(student.hidden, student.head, labels).logprob.sum()
    yield "loss", lambda: _loss(student, teacher, kind="js")
    yield (
        "policy",
        lambda: (
            kk.linear_policy_loss(
                student.hidden, student.head, labels, torch.tensor([1.0, -1.0]), entropy_coef=0.1
            ).loss
        ),
    )
    yield "topk", lambda: kk.linear_topk_divergence_loss(student.hidden, student.head, ids, logprobs)


def test_compiled_as_one_operator() -> None:
    student, teacher = model((2, 3), 5, COLUMNS), model((2, 3), 7, COLUMNS)
    for name, form in _forms(student, teacher):
        wanted = torch.autograd.grad(form(), student.leaves)
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(form, backend=backend, fullgraph=True)
        assert torch.equal(compiled(), form()), name
        assert len(graphs) == 1
        assert any("linear_" in str(node.target) for node in graphs[0].graph.nodes), name
        whole = torch.compile(form, backend="aot_eager", fullgraph=True)
        for got, of in zip(torch.autograd.grad(whole(), student.leaves), wanted, strict=True):
            assert torch.equal(got, of), name


def test_the_operators_are_what_they_say() -> None:
    from kldiv_kernels import inputs
    from kldiv_kernels.linear.source import hidden_states
    from kldiv_kernels.registry import STATISTICS

    student, teacher = model((5,), 4, 30), model((5,), 6, 30)
    source = hidden_states("test", student.hidden, student.head, teacher.hidden, teacher.head, rows_per_chunk=2)
    call = inputs.prepare(
        "test", source.logits, source.reference, torch.randint(28, (5,)),
        stats=[STATISTICS[name] for name in ("logprob", "js")], temperature=1.0, reference_temperature=None, alpha=0.5,
        beta=0.5, mask=torch.tensor([1, 0, 1, 1, 1]), ignore_index=-100, vocab_size=28, exclude=None,
    )  # fmt: skip
    operators = torch.ops.kldiv_kernels
    torch.library.opcheck(operators.linear_statistics.default, source._arguments(call, "reference"))
    detached = source._detached(call, "reference")
    for wanted in ([True] * 6, [True, False, False, False, False, True]):
        torch.library.opcheck(operators.linear_one_read.default, (*detached, torch.rand(2, 5), wanted))


def test_transforms_are_refused() -> None:
    student = model((3,), 4, 30)
    with pytest.raises(NotImplementedError, match=r"linear_token_stats: torch\.func transforms are for logits"):
        torch.func.grad(lambda h: kk.linear_token_stats(h, student.weight, stats=["entropy"]).entropy.sum())(
            student.hidden.detach()
        )
