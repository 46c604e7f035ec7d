"""GRPOTrainer on two processes: what looks at the whole batch looks at that of both, as TRL's quantile does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import start_ranks
from torch import Tensor, distributed

pytest.importorskip("trl")

import trl
from trl.trainer import grpo_trainer
from trl_runs import ROWS, TRAINING, assert_same_runs, make_models

from kldiv_kernels.adapters.trl import GRPOTrainer

OPTIONS = {
    "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "num_iterations": 2,
    "max_steps": 2, "epsilon": 0.05, "ddp_backend": "gloo", "eval_strategy": "no",
}  # fmt: skip
# Of a loss that is a sum over the tokens of all processes.
SELECTIONS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"top_entropy_quantile": 0.5}, {}),
    ({}, {"cov_selection": "kl", "cov_fraction": 0.4}),
)  # fmt: skip


def _reward(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text.split())) + 0.1 * (len(text) % 7) for text in completions]


def _trainer(kind: Any, models: Any, folder: Path, given: dict[str, Any] | None = None, **options: Any) -> Any:
    args = trl.GRPOConfig(output_dir=str(folder), **{**TRAINING, **OPTIONS, **options})
    more = {"policy_loss_options": given} if given else {}
    return kind(models.student, _reward, args=args, train_dataset=ROWS, processing_class=models.tokenizer, **more)


def _inputs(model: Any) -> dict[str, Any]:
    """A batch of four sequences as TRL would make it, with one that has no token."""
    torch.manual_seed(13)
    ids = torch.randint(1, tiny.VOCAB, (4, 9))
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[1, 4:], mask[2], mask[3, 3:] = 0, 0, 0
    with torch.no_grad():
        logits = model(ids).logits[:, 2:-1]
    old = logits.log_softmax(-1).gather(-1, ids[:, 3:, None])[..., 0] + 0.3 * torch.randn(4, 6)
    return {
        "prompt_ids": ids[:, :3], "prompt_mask": torch.ones(4, 3, dtype=torch.int64), "completion_ids": ids[:, 3:],
        "completion_mask": mask, "advantages": torch.tensor([1.0, -0.5, 0.3, -1.2]), "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def _loss_and_gradient(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in trainer.model.parameters())])


def _compare_with_one_process(trainer: Any, rank: int) -> None:
    """The processes' mean, which DDP takes, of shares with 10 and 3 tokens is what one process has of the whole."""
    inputs = _inputs(trainer.model)
    group = trainer._batch_group
    assert group is distributed.group.WORLD
    part = slice(0, 2) if rank == 0 else slice(2, 4)
    share = {name: x if x.dim() == 0 else x[part] for name, x in inputs.items()}
    together = _loss_and_gradient(trainer, share)
    trainer._batch_group = None
    # There the tokens are those of two processes, of each of which the normaliser has half.
    whole = _loss_and_gradient(trainer, inputs) / 2
    alone = _loss_and_gradient(trainer, share)
    for x in (together, alone):
        distributed.all_reduce(x)
        x /= 2
    assert whole[1:].abs().max() > 1e-3
    assert together[0].item() == pytest.approx(whole[0].item(), rel=1e-5)
    assert (together - whole)[1:].abs().max() < 1e-5 * whole[1:].abs().max()
    assert (alone - whole)[1:].abs().max() > 1e-2 * whole[1:].abs().max(), trainer._policy_options


def _rank(rank: int, folder: Path, models: Any) -> None:
    torch.set_num_threads(1)
    # accelerate asks for an address, also where the processes have met.
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for options, given in SELECTIONS:
        trainer = _trainer(GRPOTrainer, models, folder, given, loss_type="dapo", **options)
        assert trainer.accelerator.num_processes == 2
        _compare_with_one_process(trainer, rank)
    options = {"loss_type": "bnpo", "top_entropy_quantile": 0.3, "entropy_coef": 0.1}
    assert_same_runs(*(_trainer(kind, models, folder, **options) for kind in (grpo_trainer.GRPOTrainer, GRPOTrainer)))
    distributed.destroy_process_group()


def test_a_selection_is_over_both_processes(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    context = start_ranks(_rank, (tmp_path, models), join=False)
    while not context.join(timeout=300):
        pass
