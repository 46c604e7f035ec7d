"""Parts of sequences on four ranks: their losses and gradients add up to those of one process.

Nothing compares a rank with itself: each has the whole batch, and takes the one-process loss of it in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import policy_oracle as oracle
import pytest
import torch
from packed_policy import PADDING, arguments_of, pack, tensors_of
from policy_oracle import TERMS
from torch import Tensor, distributed

import kldiv_kernels as kk
from kldiv_kernels.policy import PolicyLoss

RANKS = 4
AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "token-sum")
FORMS = ("rows", "cu_seqlens", "sequence_ids")
# Columns of [5, 6]: the second rank has none.
COLUMNS = (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 6))
# Tokens of each sequence on each rank: uneven, some without one.
LENGTHS = ((3, 3, 3, 0, 1), (0, 0, 0, 0, 0), (1, 1, 1, 0, 0), (2, 2, 2, 0, 0))
SELECTIONS: tuple[dict[str, Any], ...] = (
    {"cov_selection": "kl", "cov_fraction": 0.3}, {"entropy_quantile": 0.4, "entropy_coef": 0.2}
)  # fmt: skip


def case_every_loss_type_and_aggregation(rank: int, world: int) -> None:
    """Each type with one aggregation; test_policy_packed.py has all of them, on one rank."""
    for i, name in enumerate(TERMS):
        count_empty = i % 3 > 0
        options = arguments_of(name, AGGREGATIONS[i % 4], count_empty)
        # sequence_ids know of no sequence without a token.
        form = FORMS[i // 4 % (2 if count_empty else 3)]
        with _named(name, form, options):
            _compare(rank, form, options)


def case_gradients_of_one_read(rank: int, world: int) -> None:
    """In single precision too, for which the losses of tokens have their gradients before the pass."""
    for i, name in enumerate(("gspo", "gmpo", "vespo", "topr", "grpo", "luspo")):
        # A count of sequences that all forms know.
        options = {"kl_coef": 0.1, "entropy_coef": 0.2, "kl_bias_correction": False, "normalizer": 7.0}
        options |= oracle.arguments_of(name)
        for form in (FORMS[i % 3], FORMS[(i + 1) % 3]):
            with _named(name, form, options):
                _compare(rank, form, options, backend="cpu", dtype=torch.float32)


def case_selections_over_the_batch(rank: int, world: int) -> None:
    for selection in SELECTIONS:
        _compare(rank, "rows", {"loss_type": "dapo", "kl_bias_correction": False, **selection})


def case_vocabulary_and_sequences_on_a_grid(rank: int, world: int) -> None:
    """Two ranks have the columns of a token, and two others those of the sequence's other tokens."""
    half, side = divmod(rank, 2)
    columns = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][half]
    tokens = [distributed.new_group([0, 2]), distributed.new_group([1, 3])][side]
    batch, own, part = oracle.batch(), (slice(0, 5), slice(5, 9))[side], pack(((4, 4, 4, 0, 1), (2, 2, 2, 0, 0))[half])
    places = part.places + 4 * half * (part.sequence_ids >= 0)
    here = functools.partial(_taken, places)
    tensors = tensors_of(batch)
    del tensors["reference_logprobs"]
    shard = {"group": columns, "vocab_start": own.start, "vocab_size": 9}
    hidden, weight = torch.randn(5, 6, 9, dtype=torch.float64), torch.randn(9, 9, dtype=torch.float64)
    for name, kl, backend, dtype in (
        ("gspo", "reverse_kl", "cpu", torch.float32), ("gmpo", "k3", "cpu", torch.float32),
        ("vespo", "js", "reference", torch.float64), ("grpo", "k3", "cpu", torch.float32),
        ("dapo", "k2", "reference", torch.float64),
    ):  # fmt: skip
        options = {"kl_coef": 0.1, "kl_estimator": kl, "entropy_coef": 0.2} | oracle.arguments_of(name)
        if name == "dapo":
            options |= {"entropy_quantile": 0.5, "importance_level": "sequence"}
        groups = {"sequence_group": tokens} | ({"batch_group": tokens} if name == "dapo" else {})
        tolerance = 1e-11 if dtype == torch.float64 else 2e-5
        rows = [x.clone().requires_grad_() for x in (batch.logits, hidden, weight)]
        expected = kk.policy_loss(
            rows[0], batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, **tensors, **options
        )  # fmt: skip
        expected.loss.backward()
        of_hidden = kk.policy_loss(
            rows[1] @ rows[2].T, batch.token_ids, batch.advantages, reference_logits=batch.reference_logits, **tensors,
            **options,
        )  # fmt: skip
        of_hidden.loss.backward()
        given: dict[str, Any] = {key: x if x.dtype == torch.bool else x.to(dtype) for key, x in tensors.items()}
        given = {key: here(x) for key, x in given.items()} | options | shard | groups | {"backend": backend}
        given |= {"cu_seqlens": part.cu_seqlens, "reference_logits": here(batch.reference_logits)[:, own].to(dtype)}
        leaves = [x.to(dtype).clone().requires_grad_() for x in (here(batch.logits)[:, own], here(hidden), weight[own])]
        ids, advantages = here(batch.token_ids), here(batch.advantages).to(dtype)
        out = kk.policy_loss(leaves[0], ids, advantages, **given)
        linear = kk.linear_policy_loss(leaves[1], leaves[2], ids, advantages, **given)
        with _named(name, kl, options):
            for found, wanted in ((out, expected), (linear, of_hidden)):
                _add_up(found, wanted, tokens, tolerance)
                found.loss.backward()
            wanted_here = [here(x.grad) for x in rows[:2]] + [rows[2].grad[own]]
            wanted_here[0] = wanted_here[0][:, own]
            got = [x.grad.double() for x in leaves]
            distributed.all_reduce(got[2], group=tokens)
            for x, y in zip(got, wanted_here, strict=True):
                if x is not got[2]:
                    assert not x[-PADDING:].any()
                    x, y = x[:-PADDING], y[:-PADDING]
                assert y.abs().max() > 1e-3
                assert (x - y).abs().max() <= tolerance * 4 * y.abs().max()


def case_one_rank_is_no_group(rank: int, world: int) -> None:
    """It sends nothing, and changes no bit."""
    group = distributed.new_group([rank], use_local_synchronization=True)
    batch = oracle.batch()
    given = (batch.logits, batch.token_ids, batch.advantages)
    tensors: dict[str, Any] = {**tensors_of(batch), "entropy_quantile": 0.5}
    with _counted() as sent:
        alone = kk.policy_loss(*given, sequence_group=group, batch_group=group, **tensors)
    assert torch.equal(alone.loss, kk.policy_loss(*given, **tensors).loss)
    assert not sent


def case_what_is_wrong_is_said_on_all_ranks(rank: int, world: int) -> None:
    group, odd = distributed.group.WORLD, rank == world - 1
    logits, ids = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)

    def refused(message: str, others: str = "", **options: Any) -> None:
        given = {"logits": logits, "token_ids": ids, "advantages": torch.zeros(2), "sequence_group": group} | options
        with pytest.raises((ValueError, TypeError), match=message if odd or not others else others):
            kk.policy_loss(**given)

    refused(r"batch_group is None; entropy_quantile = 0.5 looks at the whole batch", entropy_quantile=0.5)
    refused(r"batch_group is given, but no option looks at the whole batch", batch_group=group)
    refused(
        r"^policy_loss: token_ids has shape \[1, 3\]",
        rf"^policy_loss: rank {world - 1} of sequence_group raised ValueError: policy_loss: token_ids has shape",
        token_ids=ids[:1] if odd else ids,
    )
    number = rf"^policy_loss: number of sequences is 1 on rank {world - 1} of sequence_group; expected 2 as on rank 0"
    fewer = {"logits": logits[:1], "token_ids": ids[:1], "advantages": torch.zeros(1)} if odd else {}
    refused(number, **fewer)
    options = rf"options is loss_type = gmpo, .* on rank {world - 1} of sequence_group; expected loss_type = gspo"
    refused(options, loss_type="gmpo" if odd else "gspo", kl_coef=0.0)
    # As many packed tokens as sequences, on one rank: the same advantages would be one a token there.
    tokens_here = 2 if odd else 3
    refused(
        rf"^policy_loss: advantages is one a token on rank {world - 1} of sequence_group; expected one a sequence",
        logits=torch.zeros(tokens_here, 5), token_ids=torch.zeros(tokens_here, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2, 2]),
    )  # fmt: skip
    half, side = divmod(rank, 2)
    columns = [distributed.new_group([0, 1]), distributed.new_group([2, 3])][half]
    tokens = [distributed.new_group([0, 2]), distributed.new_group([1, 3])][side]
    # The last rank fails; of the others each is told by one that it shares a group with.
    label = torch.where(torch.tensor(odd), 99, ids)
    refused(r"99", r"raised", token_ids=label, group=columns, sequence_group=tokens)
    outsiders = distributed.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match=r"sequence_group does not have this rank in it"):
            kk.policy_loss(logits, ids, torch.zeros(2), sequence_group=outsiders)
    # And the next call is none the worse.
    assert kk.policy_loss(logits, ids, torch.ones(2), loss_type="gspo", sequence_group=group).loss.isfinite()


def _compare(
    rank: int, form: str, options: dict[str, Any], backend: str = "reference", dtype: torch.dtype = torch.float64
) -> None:
    batch = oracle.batch()
    tensors = tensors_of(batch)
    whole = batch.logits.clone().requires_grad_()
    wanted = kk.policy_loss(whole, batch.token_ids, batch.advantages, backend="reference", **tensors, **options)
    (expected,) = torch.autograd.grad(wanted.loss, whole)
    assert expected.abs().max() > 1e-3

    own = COLUMNS[rank]
    how: dict[str, Any] = {}
    here = (lambda x: x[:, own]) if form == "rows" else None
    if form != "rows":
        part = pack(LENGTHS[rank])
        how = {form: getattr(part, form)}
        here = functools.partial(_taken, part.places + own.start * (part.sequence_ids >= 0))
    assert here is not None
    rounded = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in tensors.items()}
    looks = options.get("entropy_quantile", 1) < 1 or "cov_selection" in options
    logits = here(batch.logits).to(dtype).detach().clone().requires_grad_()
    with _counted() as forward:
        out = kk.policy_loss(
            logits, here(batch.token_ids), here(batch.advantages).to(dtype), backend=backend,
            sequence_group=distributed.group.WORLD, batch_group=distributed.group.WORLD if looks else None, **how,
            **{name: here(x) for name, x in rounded.items()}, **options,
        )  # fmt: skip
    with _counted() as backward:
        (gradient,) = torch.autograd.grad(out.loss, logits)
    if not looks and form != "sequence_ids":
        assert len(forward) == 1
        assert forward[0] <= 5 * 5
    assert len(backward) == _backward_flows(options), (forward, backward)

    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    _add_up(out, wanted, distributed.group.WORLD, tolerance)
    mine = here(expected)
    if form != "rows":
        assert not gradient[-PADDING:].any()
        gradient, mine = gradient[:-PADDING], mine[:-PADDING]
    assert gradient.shape == mine.shape
    if gradient.numel():
        assert (gradient.double() - mine).abs().max() <= tolerance * expected.abs().max()


def _add_up(found: PolicyLoss, wanted: PolicyLoss, group: Any, tolerance: float) -> None:
    total = found.loss.detach().double().clone()
    distributed.all_reduce(total, group=group)
    assert total.item() == pytest.approx(wanted.loss.item(), rel=tolerance, abs=tolerance)


def _backward_flows(options: dict[str, Any]) -> bool:
    """Whether a gradient flows through a sum over the sequence."""
    level = options.get("importance_level", {"gspo": "sequence", "topr": "sequence_sum"}.get(options["loss_type"]))
    on_sequence = level not in (None, "token")
    return options["loss_type"] == "gmpo" or (
        on_sequence and (options["loss_type"] != "topr" or options["kl_bias_correction"])
    )


def _taken(places: Tensor, x: Tensor) -> Tensor:
    return x.flatten(0, 1)[places]


@contextmanager
def _named(*what: object) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


@contextmanager
def _counted() -> Iterator[list[int]]:
    """How many numbers each all_reduce inside has."""
    plain, found = distributed.all_reduce, list[int]()

    def all_reduce(x: Tensor, **options: object) -> object:
        found.append(x.numel())
        return plain(x, **options)

    distributed.all_reduce = all_reduce
    try:
        yield found
    finally:
        distributed.all_reduce = plain
