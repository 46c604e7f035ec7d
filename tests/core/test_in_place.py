"""`in_place=True`: the gradient of the logits takes their place, with the bits that it has elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import policy_oracle
import pytest
import torch
from checks import BACKENDS, DIVERGENCES, INTERPRETED, parameters, taken
from in_place_calls import check, same, scaled_at_the_end, some
from torch import Tensor

import kldiv_kernels as kk
from kldiv_kernels.backends import Call, OneReadPolicy, OneReadTopK, get
from kldiv_kernels.policy.options import CLIPPED
from kldiv_kernels.registry import STATISTICS

DTYPES = (torch.float32, torch.bfloat16)
# Two leading dimensions; 136 columns, which the one-read kernels take, and eight of padding.
SHAPE, V, WIDTH = (2, 4), 136, 144
BY_TOKEN = [
    name for name, (loss_type, options, _) in policy_oracle.TERMS.items()
    if loss_type in (*CLIPPED, "cispo", "sapo", "reinforce", "dppo_tv", "dppo_kl")
    and loss_type != "gspo" and "importance_level" not in options
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences(backend: str, kind: str, dtype: torch.dtype, plan: None) -> None:
    """With all that a loss can be asked for, as it is, and with a gradient of the reference."""
    student, teacher = some(*SHAPE, WIDTH, dtype=dtype), some(*SHAPE, WIDTH, dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    labels = torch.tensor([[3, 5, 7, 9], [2, 4, -100, 8]])
    # Of the tokens that the rows predict, one is masked and one has no label; the last row has none.
    left_out = torch.tensor([[False, True, False, True], [False, True, False, True]])
    exclude = torch.randint(V, SHAPE)
    exclude[0, 1] = -1
    shared = {"mask": mask, "labels": labels, "weight": torch.rand(SHAPE) + 0.5, "vocab_size": V, "exclude": exclude}
    temperatures = torch.rand(SHAPE) + 0.6
    cases = parameters(STATISTICS[kind])
    for alpha, beta in cases[:1] if INTERPRETED else cases:
        fixed = {**taken(kind, alpha, beta), "backend": backend}

        def loss(x: Tensor, y: Tensor = teacher, fixed: Any = fixed, **more: Any) -> Tensor:
            return kk.divergence_loss(x, y, kind, **fixed, **more)

        got = check(lambda x, **more: loss(x, shift=True, temperature=0.8, **shared, **more), student)
        assert not got[left_out].any()
        assert not got[..., V:].any()
        assert not got[:, :-1].gather(-1, exclude[:, 1:, None].clamp_min(0))[exclude[:, 1:] >= 0].any()
        assert got[~left_out].any(-1).all() or (alpha, beta) != cases[0]
        # Odd widths, parameters for each token, and where it can be a gradient of the reference.
        ours, theirs = student[..., :57], teacher[..., :57]
        options = functools.partial(loss, temperature=temperatures, temperature_squared=True)
        if backend == "cuda":
            check(functools.partial(options, y=theirs), ours)
            with pytest.raises(ValueError, match="in_place is True, but it writes the gradient of the reference after"):
                options(ours.clone().requires_grad_() * 1, theirs.clone().requires_grad_(), in_place=True)
        else:
            check(options, ours, theirs)
        if not INTERPRETED:
            scaled_at_the_end(loss, student, lambda x: x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_other_names(backend: str) -> None:
    """A named loss, a module, float64 where a backend has it, one row alone and none."""
    student, teacher = some(5, V), some(5, V)
    got = check(lambda x, **more: kk.js_divergence(x, teacher, beta=0.3, backend=backend, **more), student)
    for module in (kk.nn.JSDivLoss(0.3, in_place=True, backend=backend), kk.nn.DivergenceLoss("js", beta=0.3)):
        leaf = student.clone().requires_grad_()
        logits = leaf * 1
        module(logits, teacher).backward()
        assert torch.equal(logits, got) == module.options.get("in_place", False)
        assert torch.allclose(leaf.grad, got)
    check(lambda x, **more: kk.tvd(x, teacher[0], backend=backend, **more), student[0])
    nothing = kk.tvd(student[:0].requires_grad_() * 1, teacher[:0], in_place=True, backend=backend)
    nothing.backward()
    assert nothing == 0
    if backend == "reference":
        check(lambda x, y, **more: kk.jeffreys(x, y, backend=backend, **more), student.double(), teacher)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BY_TOKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_losses(backend: str, name: str, dtype: torch.dtype, plan: None) -> None:
    batch = policy_oracle.batch(vocab=V)
    student, ids, advantages = batch.logits.to(dtype), batch.token_ids, batch.advantages.float()
    fixed = {
        **policy_oracle.arguments_of(name), "old_logprobs": batch.old.float(), "mask": batch.mask, "backend": backend
    }  # fmt: skip
    if not isinstance(get(backend), OneReadPolicy):
        with pytest.raises(ValueError, match=f"in_place is True, but the {backend} backend has no policy loss of one"):
            kk.policy_loss(student.requires_grad_() * 1, ids, advantages, in_place=True, **fixed)
        return
    exact = {"reference_logits": batch.reference_logits.to(dtype), "kl_coef": 0.3, "kl_estimator": "reverse_kl"}
    sampled = {"reference_logprobs": batch.reference.float(), "kl_coef": 0.3, "entropy_coef": 0.1}
    for options in ({}, exact, sampled):
        seen = []

        def loss(x: Tensor, options: Any = options, seen: Any = seen, **more: Any) -> Tensor:
            seen.append(kk.policy_loss(x, ids, advantages, **fixed, **options, **more))
            return seen[-1].loss

        got = check(loss, student)
        assert not got[~batch.mask].any()
        assert got[batch.mask].any()
        plain, out = seen
        assert plain.metrics.keys() == out.metrics.keys()
        for x, y in zip(plain.metrics.values(), out.metrics.values(), strict=True):
            assert same(x, y)
        for field in ("per_token_loss", "logprob", "entropy"):
            assert same(getattr(out, field), getattr(plain, field))
    of_a_batch = {key: fixed.pop(key) for key in ("old_logprobs", "mask", "normalizer") if key in fixed}
    logits = student.clone().requires_grad_() * 1
    loss = kk.nn.PolicyLoss(in_place=True, **fixed)(logits, ids, advantages, **of_a_batch).loss
    assert torch.equal(logits, torch.autograd.grad(loss, logits)[0])


def some_teacher(rows: tuple[int, ...], k: int, columns: int = V) -> dict[str, Tensor]:
    """k tokens a row of a teacher, one of them left out in a row; with a token twice in the last row."""
    ids = torch.rand(*rows, columns).argsort(-1)[..., :k]
    logprobs = some(*rows, k).log_softmax(-1) - 0.4
    ids.view(-1, k)[1, 0] = -1
    ids.view(-1, k)[-1, -1] = ids.view(-1, k)[-1, 0]
    return {"topk_ids": ids, "topk_logprobs": logprobs}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_teacher", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_losses(backend: str, tail: str, dtype: torch.dtype, plan: None) -> None:
    student = some(*SHAPE, WIDTH, dtype=dtype)
    given = some_teacher(SHAPE, 7)
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    options = {"mask": mask, "weight": torch.rand(SHAPE) + 0.5, "vocab_size": V, "check": False, "backend": backend}
    has = tail == "none" or isinstance(get(backend), OneReadTopK)
    for kind in ("forward_kl", "cross_entropy") if tail == "none" else ("forward_kl", "js", "tvd"):

        def loss(x: Tensor, kind: str = kind, **more: Any) -> Tensor:
            return kk.topk_divergence_loss(x, **{**given, **options, **more}, kind=kind, tail=tail)

        if backend in ("cuda", "triton") or not has:
            refused = "reads the logits of several labels" if has else f"the {backend} backend has no top-k loss of one"
            with pytest.raises(ValueError, match=f"in_place is True, but .*{refused}"):
                loss(student.clone().requires_grad_() * 1, in_place=True)
            continue
        # Nobody knows which of two log-probabilities of a token is meant, and the row is NaN.
        got = check(loss, student)
        assert got[1, -1, :V].isnan().all()
        assert got.flatten(0, 1)[:-1].isfinite().all()
        assert not got[~mask.bool()].any()
        assert not got[:, :-1, V:].any()
        assert got[mask.bool()].any(-1).all()
        check(lambda x, loss=loss, **more: loss(x, shift=True, temperature=0.7, **more), student)
        module = kk.nn.TopKDivergenceLoss(kind, tail=tail, in_place=True, vocab_size=V, check=False, backend=backend)
        logits = student.clone().requires_grad_() * 1
        module(logits, **given, mask=mask, weight=options["weight"]).backward()
        assert same(logits.detach(), got)
    if tail == "none":
        # One label a row, which a GPU's kernels have read when they write.
        one = {"topk_ids": given["topk_ids"][..., :1], "topk_logprobs": given["topk_logprobs"][..., :1]}
        assert check(lambda x, **more: loss(x, **one, **more), student).any()


@pytest.mark.parametrize("columns", [V, 8192 + 600])
@pytest.mark.parametrize(
    ("k", "stats"),
    [
        (40, ("logprob", "tail_logprob")), (40, ("logprob", "reference_logprob", "forward_kl")),
        (1, ("logprob", "reference_logprob")), (1, ("logprob", "entropy")),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_labels(
    backend: str, k: int, stats: tuple[str, ...], columns: int, plan: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the public functions, where a column that is several labels has the sum of their gradients; slices of a
    row, and on the model of a GPU many orders of its threads."""
    rows, width = 4, columns + 8
    torch.set_num_threads(2)
    labels = torch.randint(columns, (rows, k))
    labels[:, k - k // 4 :] = labels[:, : k // 4]
    labels[0], labels[1, k // 2 : k // 2 + k // 9] = torch.arange(k) % 5 + 3, -1
    mask, teacher = torch.arange(rows) != 2, some(rows, width)
    coefficients = some(sum(k if STATISTICS[name].per_label else 1 for name in stats), rows)
    coefficients[:, 3] = 0
    two = "reference_logprob" in stats

    def call_of(x: Tensor) -> Call:
        numbers = (0.8, 1.3, 0.5, 0.5)
        return Call(x, teacher if two else None, labels, mask, None, None, numbers, stats, columns)

    if backend == "cuda" and (k > 1 or two):
        assert get(backend).refuses_in_place(call_of(some(rows, width)), two) is not None
        return
    table, scale = some(rows, k + 1).log_softmax(-1), torch.tensor([1.0, -0.5, 1.0, 0.0])
    for dtype in DTYPES:
        student = some(rows, width, dtype=dtype)
        if k > 1:  # a tail without mass
            student[1, ~torch.isin(torch.arange(width), labels[1])] = -torch.inf
        forms: list[Callable[..., Any]] = [
            lambda call, *last: get(backend).one_read(call, coefficients, True, two, *last)
        ]
        if stats[1] == "tail_logprob" and isinstance(get(backend), OneReadTopK):
            forms.append(lambda call, *last: get(backend).topk(call, table, scale, "forward_kl", 0.5, 0.5, *last))
        for form in forms:
            plain = form(call_of(student))
            gradient = next(x for x in plain if x.shape == student.shape)
            assert gradient[:2].any(-1).all()
            assert not gradient[2:].any()
            for seed in range(20 if backend == "cuda" else 1):
                monkeypatch.setenv("KLDIV_HOST_SEED", str(seed))
                x = student.clone()
                got = form(call_of(x), True)
                assert same(x, gradient)
                assert any(y is not None and y.data_ptr() == x.data_ptr() for y in got)
                for y, z in zip(got, plain, strict=True):
                    assert y is z or same(y, z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend: str, dtype: torch.dtype) -> None:
    """The rest of what they are views of stays as it is, and hooks on a view are called."""
    whole, teacher = some(2, 3, WIDTH, dtype=dtype), some(2, 3, WIDTH, dtype=dtype)

    def loss(x: Tensor, **more: Any) -> Tensor:
        return kk.js_divergence(x, teacher.flatten()[: x.numel()].view(x.shape), backend=backend, **more)

    contiguous = {
        "rows": lambda x: x[1:], "flat": lambda x: x.view(-1, WIDTH), "one of several": lambda x: x.chunk(2)[1],
        "a row": lambda x: x[1, 2],
    }  # fmt: skip
    gaps = {
        "tokens": lambda x: x[:, 1:], "columns": lambda x: x[..., 8:V], "transposed": lambda x: x.transpose(0, 1),
        "every other": lambda x: x[:, ::2, 3:60],
    }  # fmt: skip
    for cut in contiguous.values():
        check(loss, whole, cut=cut)
        scaled_at_the_end(loss, whole, cut)
    for cut in gaps.values():
        if backend in ("cuda", "triton"):
            with pytest.raises(ValueError, match=r"in_place is True, but rows with strides .* have gaps"):
                loss(cut(whole.clone().requires_grad_() * 1), in_place=True)
        else:
            check(loss, whole, cut=cut)
            scaled_at_the_end(loss, whole, cut)
