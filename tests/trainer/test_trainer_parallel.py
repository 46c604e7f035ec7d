"""The normaliser: one step has one loss and one gradient, however its sequences are spread over batches and ranks.

The sequences have 1 to 11 targets, so that a mean of means, or a count that misses the shift, gives another value.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import start_ranks
from transformers import TrainerCallback

SEQUENCES = 8
LOSSES: dict[str, dict[str, Any]] = {
    "divergence": {"kind": "js", "beta": 0.3},
    "cross_entropy": {"ce_weight": 1.0},
    "mix": {"ce_weight": 0.4},
    "rows": {"kind": "js", "beta": 0.3, "ce_weight": 0.4},
}


# Where DDP does not look for parameters that a step leaves out.
CHECKPOINTING = {"gradient_checkpointing": True, "ddp_find_unused_parameters": False}


def sequences(loss: str, count: int = SEQUENCES) -> list[dict[str, Any]]:
    return tiny.with_rows(tiny.ragged(count)) if loss == "rows" else tiny.ragged(count)


class _Gradients(TrainerCallback):
    """The gradients of the first step, as the optimiser sees them."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.found:
            self.found = {
                name.removeprefix("module."): parameter.grad.clone() for name, parameter in model.named_parameters()
            }


def one_step(
    folder: Path, batch_size: int, accumulation: int, loss: str, **options: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Logged loss and gradients of one step over all of the sequences."""
    gradients = _Gradients()
    trainer = tiny.trainer(
        folder, rows=sequences(loss), callbacks=[gradients], per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation, max_steps=1, logging_steps=1, max_grad_norm=0.0, **LOSSES[loss],
        **options,
    )  # fmt: skip
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), gradients.found


def assert_same(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_the_sequences_would_show_a_wrong_normaliser(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **LOSSES["mix"])
    whole = trainer.compute_loss(trainer.model, tiny.batch(SEQUENCES)).item()
    rows = [{name: value[row : row + 1] for name, value in tiny.batch(SEQUENCES).items()} for row in range(SEQUENCES)]
    mean_of_means = sum(trainer.compute_loss(trainer.model, row).item() for row in rows) / SEQUENCES
    assert abs(mean_of_means / whole - 1) > 0.02
    unshifted = (tiny.batch(SEQUENCES)["labels"] != -100).sum() / (tiny.batch(SEQUENCES)["labels"][:, 1:] != -100).sum()
    assert unshifted > 1.02


@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_gives_the_loss_and_gradients_of_the_whole_batch(loss: str, tmp_path: Path) -> None:
    whole = one_step(tmp_path, SEQUENCES, 1, loss)
    for batch_size, accumulation in ((1, SEQUENCES), (2, SEQUENCES // 2)):
        assert_same(one_step(tmp_path, batch_size, accumulation, loss), whole)


def test_the_first_step_sees_the_mean_over_its_targets(tmp_path: Path) -> None:
    """Ties the tests above to a value: they compare the trainer with itself."""
    student = tiny.llama(1)
    trainer = tiny.trainer(tmp_path, student=student, **LOSSES["mix"])
    expected = trainer.compute_loss(student, tiny.batch(SEQUENCES)).item()
    assert one_step(tmp_path, 1, SEQUENCES, "mix")[0] == pytest.approx(expected, rel=1e-5)


def _rank(rank: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    for loss in LOSSES:
        for accumulation in (1, 2):
            found = one_step(folder, SEQUENCES // 2 // accumulation, accumulation, loss, ddp_backend="gloo")
            assert torch.distributed.get_world_size() == 2
            torch.save(found, folder / f"{loss}-{accumulation}-{rank}.pt")
    for fused in (False, True):
        found = one_step(folder, SEQUENCES // 2, 1, "mix", ddp_backend="gloo", fused_linear=fused, **CHECKPOINTING)
        torch.save(found, folder / f"checkpointing-{fused}-{rank}.pt")
    for loss in ("mix", "rows"):
        trainer = tiny.trainer(folder, rows=sequences(loss, 5), ddp_backend="gloo", per_device_eval_batch_size=2)
        torch.save(trainer.evaluate(), folder / f"evaluation-{loss}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_loss_gradients_and_evaluation_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_ranks(_rank, (port, tmp_path))
    for loss in LOSSES:
        whole = one_step(tmp_path, SEQUENCES, 1, loss)
        for accumulation in (1, 2):
            for rank in (0, 1):
                assert_same(torch.load(tmp_path / f"{loss}-{accumulation}-{rank}.pt"), whole)
    for fused in (False, True):
        assert_same(torch.load(tmp_path / f"checkpointing-{fused}-0.pt"), one_step(tmp_path, SEQUENCES, 1, "mix"))
    # Five sequences on two ranks: one is padded with a sequence that must not count twice.
    for loss, kl in (("mix", "eval_kl"), ("rows", "eval_topk_kl")):
        expected = tiny.trainer(tmp_path, rows=sequences(loss, 5)).evaluate()
        for rank in (0, 1):
            found = torch.load(tmp_path / f"evaluation-{loss}-{rank}.pt")
            for name in ("eval_loss", kl):
                assert found[name] == pytest.approx(expected[name], rel=1e-5), name
