"""The trainer from hidden states and heads: the numbers that logits give, without them, and where they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kldiv_kernels.adapters import headless
from kldiv_kernels.trainer.command import distill

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@contextmanager
def logits_made() -> Iterator[list[int]]:
    """Of how many tokens each call of a head makes them."""
    tokens: list[int] = []

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features >= tiny.VOCAB:
            tokens.append(output.shape[:-1].numel())

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        yield tokens
    finally:
        handle.remove()


def found_by(trainer: Any, batch: dict[str, Tensor]) -> tuple[float, list[Tensor], dict[str, float]]:
    """Loss, gradients of the student and held-out numbers."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(30))
    loss.backward()
    evaluation = {name: value for name, value in trainer.evaluate().items() if name in ("eval_loss", "eval_kl")}
    return loss.item(), [x.grad.clone() for x in trainer.model.parameters()], evaluation


def assert_the_same(student: Any, teacher: Any, folder: Path, **options: Any) -> None:
    batch = tiny.batch(6)
    student.requires_grad_()
    whole, fused = (
        tiny.trainer(folder, student=student, teacher=teacher, fused_linear=fused, **options) for fused in (False, None)
    )
    assert (whole.fused_linear, fused.fused_linear) == (False, True)
    loss, gradients, evaluation = found_by(whole, batch)
    with logits_made() as tokens:
        found = found_by(fused, batch)
    assert tokens
    assert not any(tokens), "logits were made whole"
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[2] == pytest.approx(evaluation, rel=1e-5)
    assert "eval_kl" in evaluation
    for x, y in zip(found[1], gradients, strict=True):
        assert y.any()
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()
    _, outputs = fused.compute_loss(student, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ce_weight": 1.0},
        {"ce_weight": 0.3, "kind": "js", "beta": 0.2},
        {"ce_weight": 0.3, "temperature": 2.0, "temperature_squared": True},
    ],
    ids=str,
)
def test_loss_gradients_and_evaluation_are_those_of_logits(options: dict[str, Any], tmp_path: Path) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2, hidden=24, vocab=tiny.VOCAB + 8)
    assert_the_same(student, teacher, tmp_path, **options)


def test_heads_with_a_scale_or_a_softcap(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=tiny.VOCAB, head_dim=8, final_logit_softcapping=5.0, **SIZES))
    granite = GraniteForCausalLM(GraniteConfig(vocab_size=tiny.VOCAB + 2, logits_scaling=4.0, **SIZES))
    cohere = Cohere2ForCausalLM(Cohere2Config(vocab_size=tiny.VOCAB, logit_scale=0.25, **SIZES))
    assert_the_same(gemma, granite, tmp_path)
    assert_the_same(granite, cohere, tmp_path)
    assert_the_same(cohere, gemma, tmp_path)


def test_in_mixed_precision_the_head_is_multiplied_in_it(tmp_path: Path) -> None:
    found = {}
    for bf16 in (False, True):
        for fused in (False, True):
            trainer = tiny.trainer(tmp_path, bf16=bf16, fused_linear=fused, max_steps=3, learning_rate=1e-2)
            trainer.train()
            found[bf16, fused] = trainer.evaluate()["eval_kl"]
    assert found[False, True] == pytest.approx(found[False, False], rel=1e-3)
    assert found[True, True] == pytest.approx(found[True, False], rel=0.05)
    assert found[True, True] != found[False, True]


class _More(LlamaForCausalLM):
    """Whose logits are not only its head's."""

    def forward(self, input_ids: Any = None, labels: Any = None, **inputs: Any) -> Any:
        output = super().forward(input_ids, **inputs)
        output.logits = output.logits + torch.linspace(-0.2, 0.2, tiny.VOCAB)
        return output


class _Adapter(nn.Module):
    """As PEFT puts one over a head."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.5 * self.base(hidden)


def _more() -> Any:
    return _More(tiny.llama(1).config)


def _adapted() -> Any:
    model = tiny.llama(1)
    model.lm_head = _Adapter(model.lm_head)
    return model


def _hooked_head() -> Any:
    model = tiny.llama(1)
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def _hooked() -> Any:
    model = tiny.llama(1)
    model.register_forward_hook(lambda module, inputs, output: None)
    return model


def _opt() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=tiny.VOCAB, max_position_embeddings=64, **sizes))


def _hyperclova() -> Any:
    return HyperCLOVAXForCausalLM(HyperCLOVAXConfig(vocab_size=tiny.VOCAB, logits_scaling=4.0, **SIZES))


REFUSED = [
    (_more, "model: the forward of _More does more than its head: probabilities differ by 0"),
    (_hyperclova, "the forward of HyperCLOVAXForCausalLM does more than its head"),
    (_adapted, "head is _Adapter; expected torch.nn.Linear itself"),
    (_hooked_head, "head has hooks, which only its own forward"),
    (_hooked, "it has forward hooks, which would see no logits"),
    (_opt, "a forward of OPTForCausalLM calls its base_model 0 times; expected once"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSED, ids=[build.__name__ for build, _ in REFUSED])
def test_where_a_head_is_not_plain_logits_are_made_and_the_reason_is_told(
    build: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(4)
    student = build()
    with caplog.at_level(logging.WARNING):
        trainer = tiny.trainer(tmp_path, student=student)
    assert not trainer.fused_linear
    assert "all logits are kept in memory (fused_linear is off): " in caplog.text
    assert reason in caplog.text
    assert found_by(trainer, tiny.batch(6))[0] > 0
    with pytest.raises(ValueError, match=r"fused_linear is True, which is impossible here: model: "):
        tiny.trainer(tmp_path, student=student, fused_linear=True)
    with pytest.raises(ValueError, match=r"impossible here: teacher_model: "):
        tiny.trainer(tmp_path, teacher=student, fused_linear=True)


def test_the_trial_leaves_no_trace() -> None:
    model = tiny.llama(1, dropout=0.5).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert headless.why_not(model=model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == before
    assert not model.model._forward_hooks
    assert all(x.grad is None for x in model.parameters())
    assert "expected a transformers.PreTrainedModel" in str(headless.why_not(model=nn.Linear(2, 2)))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert headless.why_not(student=t5) == "student: T5ForConditionalGeneration has no base_model"


def test_what_stands_around_the_models() -> None:
    def reason(sizes: tuple[int, int, int] = (1, 1, 1), **around: Any) -> str | None:
        given = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False, "n_gpu": 1, "torch_compile": False} | around
        args = SimpleNamespace(n_gpu=given.pop("n_gpu"), torch_compile=given.pop("torch_compile"))
        names = ("get_tp_size", "get_cp_size", "get_sp_size")
        getters = {name: lambda size=size: size for name, size in zip(names, sizes, strict=True)}
        trainer: Any = SimpleNamespace(args=args, **given, **getters)
        return headless.why_not_in(trainer)

    assert reason() is None
    assert "FSDP" in str(reason(is_fsdp_enabled=True))
    assert "DeepSpeed" in str(reason(is_deepspeed_enabled=True))
    assert "DataParallel" in str(reason(n_gpu=2))
    assert "torch.compile" in str(reason(torch_compile=True))
    for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert "parallelism" in str(reason(sizes))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.stay_offline(monkeypatch)
    models = tiny.pair(tmp_path / "models")
    given = {
        "--student": str(models / "student"), "--teacher": str(models / "teacher"), "--data": str(models / "text.txt"),
        "--output": str(tmp_path / "run"), "--steps": "1", "--batch-size": "2", "--block-size": "16",
    }  # fmt: skip
    with logits_made() as tokens:
        code, printed = commands.run(distill, given, "--no-fused-linear")
    assert code == 0, printed
    assert any(tokens)
    with logits_made() as tokens:
        code, printed = commands.run(distill, given | {"--steps": "2"}, "--resume", "--fused-linear")
    assert code == 0, printed
    # Those of the trial at the start.
    assert max(tokens) == 4
    _opt().save_pretrained(tmp_path / "models" / "student")
    code, printed = commands.run(distill, given | {"--output": str(tmp_path / "other")}, "--fused-linear")
    assert (code, "for --fused-linear: impossible here: student: a forward of OPTForCausalLM" in printed) == (
        2,
        True,
    ), printed
    assert not (tmp_path / "other").exists()
