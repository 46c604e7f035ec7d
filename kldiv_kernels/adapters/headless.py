"""A causal language model taken apart into hidden states and head, so that its logits are never there at once.

    whole       model(...) = base_model(...) -> hidden [batch, tokens, H] -> head -> logits [batch, tokens, V]
    headless    model(...) = base_model(...) -> hidden, kept; on goes [batch, 0, H] -> head -> [batch, 0, V]

The model itself is called, so that whatever wraps it has its part: DDP, which looks through the output for the
parameters of this step, the head's among them; autocast; hooks. A hook on its base_model keeps the hidden states.

A head that the loss cannot stand for, or a forward that does more than apply it, would train the wrong thing without a
word. So each model is tried at the start: `base_model` is made to answer with numbers of which the logits are large,
and what the model makes of them has to be what `kldiv_kernels.Head` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from kldiv_kernels.linear import Head, HiddenStates, hidden_states
from kldiv_kernels.sources import Source
from kldiv_kernels.stats import statistics_of

_TOKENS = 4
# Logits as large as these show a softcap of 30 that was missed, and any scale.
_LARGEST = 20.0
# Of the probabilities, in total variation, from rounding such logits: in TF32, which a user may allow, and in bfloat16,
# of which 14 architectures had at most 0.022. A softcap of 30 that is missed makes 0.1.
_DIFFERENCE, _DIFFERENCE_ROUNDED = 0.01, 0.05


def source(
    where: str,
    student: tuple[nn.Module, Any],
    teacher: Any,
    inputs: Mapping[str, Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Source:
    """Hidden states and heads of the student, and of a teacher without gradient, on the same inputs.

    student: what is called, and the model that it is or wraps.
    """
    module, model = student
    hidden, theirs, their_head = hidden_states_of(module, model, inputs), None, None
    if teacher is not None:
        their_head = head_of(teacher)
        with torch.no_grad():
            theirs = hidden_states_of(teacher, teacher, inputs)
    # The heads are multiplied with in the dtype of the models' other layers.
    with autocast():
        return hidden_states(where, hidden, head_of(model), theirs, their_head)


def head_of(model: Any) -> Head:
    """The head, with the scale or the softcap that the configuration names. Raises ValueError where there is none."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ValueError("it has no output embeddings")
    config = model.config.get_text_config()
    scale, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    if scale is None:
        scale = 1.0 if divisor is None else 1.0 / divisor
    return Head(layer, logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def hidden_states_of(module: nn.Module, model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What goes into the head of `model`, [batch, tokens, H], in a call of `module`."""
    kept: list[Tensor] = []

    def keep(output: Any) -> None:
        kept.append(output.last_hidden_state)
        output.last_hidden_state = kept[0][:, :0]

    with _backbone(model, keep):
        module(**inputs, use_cache=False)
    return kept[0]


def why_not_in(trainer: Trainer) -> str | None:
    """What there is around the models in this run that a head outside of their forward would go past; None: nothing."""
    sizes = trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()
    around = {
        "FSDP, which gathers a head within the model's forward only": trainer.is_fsdp_enabled,
        "DeepSpeed, which gathers a head within the model's forward only": trainer.is_deepspeed_enabled,
        "tensor or context parallelism, where a rank has a part of the head or of a sequence": max(sizes) > 1,
        "DataParallel, whose copies of the model keep no hidden states": trainer.args.n_gpu > 1,
        "torch.compile, which traces the model without hooks": trainer.args.torch_compile,
    }
    return next((f"the run has {name}" for name, there in around.items() if there), None)


def why_not(**models: nn.Module | None) -> str | None:
    """Why the logits of one of the models have to be there, or None. To be asked under the run's autocast."""
    for name, model in models.items():
        reason = None if model is None else _why_not_of(model)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _why_not_of(model: nn.Module) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return f"it is a {type(model).__name__}; expected a transformers.PreTrainedModel"
    if model.base_model is model:
        return f"{type(model).__name__} has no base_model"
    if model._forward_hooks:
        return "it has forward hooks, which would see no logits"
    try:
        with torch.no_grad(), _in_evaluation(model):
            difference, allowed = _difference(model)
    # Whatever a forward may raise that wants other inputs than token ids, or has another output.
    except Exception as error:
        return str(error) or repr(error)
    if difference <= allowed:
        return None
    return (
        f"the forward of {type(model).__name__} does more than its head: probabilities differ by {difference:.2g}, "
        f"where rounding makes at most {allowed:g}"
    )


def _difference(model: PreTrainedModel) -> tuple[float, float]:
    """Between the model's probabilities and those of its head, of hidden states of our own; and what is allowed."""
    head, where = head_of(model), type(model).__name__
    given: list[Tensor] = []

    def answer(output: Any) -> None:
        probe = _probe(hidden_states(where, output.last_hidden_state, head), output.last_hidden_state)
        given.append(probe)
        output.last_hidden_state = probe

    ids = torch.arange(_TOKENS, device=model.device)[None]
    with _backbone(model, answer):
        logits = model(input_ids=ids, use_cache=False).logits
    if len(given) != 1:
        raise ValueError(f"a forward of {where} calls its base_model {len(given)} times; expected once")
    made = hidden_states(where, given[0], head, reference_logits=logits)
    stats = statistics_of(where, made, None, stats=("tvd",))
    narrowest = min(x.dtype.itemsize for x in (given[0], made.student.weight, logits))
    rounded = narrowest < 4 or torch.is_autocast_enabled(logits.device.type)
    return stats.tvd.max().item(), _DIFFERENCE_ROUNDED if rounded else _DIFFERENCE


def _probe(made: HiddenStates, like: Tensor) -> Tensor:
    """Hidden states whose logits reach `_LARGEST` before a softcap."""
    side = made.student
    probe = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(side.weight)
    logits = side.scale * nn.functional.linear(probe, side.weight, side.bias)
    return (probe * (_LARGEST / logits.abs().max().clamp_min(1e-6))).to(like.dtype)


@contextmanager
def _backbone(core: Any, change: Callable[[Any], None]) -> Iterator[None]:
    """`change` changes what the base_model hands on to the head."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        change(output)
        return output

    handle = core.base_model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, which would also take random numbers that a run without this check has for itself."""
    training = [module for module in model.modules() if module.training]
    model.eval()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module in training:
            module.training = True
