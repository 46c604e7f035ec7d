"""verl's forward KL on a teacher's top k for Megatron, on several ranks: against float64, and beside verl's own."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rank_checks import Rows, standing_in
from ranks import same_everywhere, uneven
from torch import Tensor, distributed

from kldiv_kernels.adapters.verl import megatron

TOKENS, WIDTH, K = 11, 19, 5


def _settings(clamp: float | None) -> Any:
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp))


def _teacher(vocab: int) -> tuple[Tensor, Tensor]:
    top = torch.randn(1, TOKENS, vocab).mul(2).log_softmax(-1).topk(K, dim=-1)
    return top.values, top.indices


def case_forward_kl_topk_of_megatron(rank: int, world: int) -> None:
    group = distributed.group.WORLD
    nobody_first = [0, 0, *(i * WIDTH for i in range(2, world + 1))]
    for borders in ([i * WIDTH for i in range(world + 1)], uneven(WIDTH * world, world), nobody_first):
        vocab, even = borders[-1], borders[1] == WIDTH
        columns = {} if even else {"vocab_start": borders[rank], "vocab_size": vocab}
        log_p, ids = _teacher(vocab)
        # A teacher that gives less than K tokens fills up with those of no mass.
        log_p[0, 2, 3:] = -torch.inf
        for clamp in (None, -2.5):
            rows = Rows(2 * torch.randn(1, TOKENS, vocab), borders[rank], borders[rank + 1])
            out = megatron.compute_forward_kl_topk(
                rows.mine, log_p, ids, _settings(clamp), "bshd", group=group, **columns
            )
            bound = -torch.inf if clamp is None else clamp
            p = log_p.double().clamp(min=bound)
            q = rows.exact.log_softmax(-1).gather(-1, ids).clamp(min=bound)
            assert clamp is None or ((p == clamp).any() and (q == clamp).any())
            terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
            rows.check(out["distillation_losses"], terms.sum(-1))
            torch.testing.assert_close(out["student_mass"].double(), q.detach().exp().sum(-1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(out["teacher_mass"].double(), p.exp().sum(-1), rtol=1e-5, atol=1e-6)
            top = rows.exact.detach().topk(K, dim=-1).indices
            shared = (ids[..., None] == top[..., None, :]).any(-1)
            assert torch.equal(out["overlap_count"], shared.sum(-1))
            advantage = torch.where(shared, -terms, 0.0).sum(-1) / shared.sum(-1).clamp_min(1)
            torch.testing.assert_close(
                out["overlap_token_advantage"].double(), advantage.detach(), rtol=1e-5, atol=1e-6
            )
            for name, value in out.items():
                same_everywhere(value.float())
                assert value.requires_grad == (name == "distillation_losses")


def case_what_is_wrong_is_said_on_all_ranks_of_megatron(rank: int, world: int) -> None:
    """What fails before anything is exchanged too: the others would wait for ever."""
    log_p, ids = _teacher(WIDTH * world)
    odd = rank == world - 1
    given = log_p[:, :3] if odd else log_p
    own = r"^compute_forward_kl_topk: teacher_topk_log_probs has shape \[1, 3, 5\]"
    with pytest.raises(ValueError, match=own if odd else rf"rank {world - 1} of group raised ValueError"):
        megatron.compute_forward_kl_topk(
            torch.randn(1, TOKENS, WIDTH), given, ids, _settings(None), "bshd", group=distributed.group.WORLD
        )


def _around_verls_file() -> dict[str, ModuleType]:
    """What it takes of Megatron, which needs a GPU (its group, and two lines of arithmetic), and of verl: two names."""
    group = distributed.group.WORLD
    parts: dict[str, dict[str, Any]] = {
        "megatron": {},
        "megatron.core": {},
        "megatron.core.parallel_state": {
            "get_tensor_model_parallel_group": lambda: group,
            "get_tensor_model_parallel_rank": lambda: distributed.get_rank(group),
            "get_tensor_model_parallel_world_size": lambda: distributed.get_world_size(group),
        },
        "megatron.core.fusions": {},
        "megatron.core.fusions.fused_cross_entropy": {
            "calculate_logits_max": lambda logits: (logits.float(), logits.float().amax(-1))
        },
        "megatron.core.tensor_parallel": {},
        "megatron.core.tensor_parallel.utils": {
            "VocabUtility": SimpleNamespace(
                vocab_range_from_per_partition_vocab_size=lambda width, rank, _: (rank * width, (rank + 1) * width)
            )
        },
        "verl": {},
        "verl.models": {},
        "verl.models.mcore": {},
        "verl.models.mcore.util": dict.fromkeys(
            ("preprocess_thd_engine", "preprocess_bshd_engine"),
            lambda nested, pre_process: (nested.values()[None], None, None),
        ),
        "verl.workers": {},
        "verl.workers.config": dict.fromkeys(("DistillationConfig", "DistillationLossConfig")),
    }
    modules = {name: ModuleType(name) for name in parts}
    for name, module in modules.items():
        vars(module).update(parts[name])
        if name.rpartition(".")[0] in modules:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    return modules


def case_beside_verls_own_for_megatron(rank: int, world: int) -> None:
    """Of nested tensors, with Megatron's group."""
    verl = find_spec("verl")
    if verl is None or verl.origin is None:
        return  # The test that asks for this case is skipped.
    file = spec_from_file_location(
        "verls_losses", Path(verl.origin).parent / "trainer" / "distillation" / "megatron" / "losses.py"
    )
    assert file is not None
    assert file.loader is not None
    with standing_in(_around_verls_file()):
        module = module_from_spec(file)
        file.loader.exec_module(module)
        theirs = module.compute_forward_kl_topk
        for clamp in (None, -2.5):
            rows = Rows(3 * torch.randn(1, TOKENS, WIDTH * world), rank * WIDTH, (rank + 1) * WIDTH)
            nested = [
                torch.nested.nested_tensor([x[0, :4], x[0, 4:]], layout=torch.jagged) for x in _teacher(WIDTH * world)
            ]
            given = (rows.mine, *nested, _settings(clamp), "thd")
            ours, expected = megatron.compute_forward_kl_topk(*given), theirs(*given)
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(ours[name].float(), value.float(), rtol=1e-5, atol=1e-6)
            upstream = torch.rand(1, TOKENS) + 0.5
            first, second = (
                torch.autograd.grad(x["distillation_losses"], rows.mine, upstream)[0] for x in (ours, expected)
            )
            assert second.abs().max() > 1e-2
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def case_what_megatrons_arguments_cannot_be(rank: int, world: int) -> None:
    group, logits = distributed.group.WORLD, torch.randn(1, TOKENS, WIDTH)
    log_p, ids = _teacher(WIDTH * world)
    call = megatron.compute_forward_kl_topk
    with pytest.raises(ValueError, match="data_format is 'sbhd'; expected thd or bshd"):
        call(logits, log_p, ids, None, "sbhd", group=group)
    with pytest.raises(ImportError, match=r"^compute_forward_kl_topk: group is None, and megatron.*cannot be imported"):
        call(logits, log_p, ids, None, "thd")
    nested = torch.nested.nested_tensor([log_p[0]], layout=torch.jagged)
    with pytest.raises(ImportError, match=r"^compute_forward_kl_topk: the teacher's tensors are nested, and verl"):
        call(logits, nested, ids, None, "thd", group=group)
    with pytest.raises(ValueError, match=r"^compute_forward_kl_topk: teacher_topk_ids has shape \[1, 3, 5\]"):
        call(logits, log_p, ids[:, :3], None, "thd", group=group)
    with pytest.raises(IndexError, match=r"^compute_forward_kl_topk: teacher_topk_ids\[0, 0, 0\] is"):
        call(logits, log_p, ids + WIDTH * world, None, "thd", group=group)
