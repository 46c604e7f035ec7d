"""Autograd of the operators, for reverse mode: by backward(), by torch.func, and a refusal for forward mode.

`register` gives an operator of the dispatcher its backward. PyTorch transforms no such operator, so under torch.func
(`grad`, `vjp`, `jacrev`, `vmap`) `Statistics` and `StatisticsBackward` stand for two of them: samples are more rows.
The other operators find a gradient before anyone asks for it, which no transform can follow: every loss is then made of
`statistics`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kldiv_kernels._ops import add_op_namespace_prefix
from kldiv_kernels._ops import ops as operators
from kldiv_kernels.tracing import untraced

# (gradient, upstream scalar) -> their product, in the gradient's memory (`backends.scale_in_place`).
Scale = Callable[[Tensor, Tensor], Tensor]
# The leading arguments of an operator that are tensors, or None (`ops._CALL_SCHEMA`).
_TENSORS = 6
# Of the samples that torch.autograd.grad(is_grads_batched=True) makes, which are not torch.func's.
_BATCHED = torch._C._dispatch_key_parse("Batched")
DOUBLE_BACKWARD = (
    "kldiv_kernels: double backward is not supported: the gradient of a divergence with respect to the logits "
    "has no second derivative here; call backward() without create_graph=True"
)
_FORWARD_MODE = (
    "forward-mode differentiation (jvp, jacfwd, hessian, forward_ad) is not supported here; use reverse mode: "
    "backward(), torch.func.grad, vjp or jacrev"
)


def transformed() -> bool:
    """Whether torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def no_tangent(where: str, name: str, tensor: Tensor) -> None:
    """Raises where forward mode asks for a derivative by this tensor, which would be lost without a word.

    Under torch.func a tangent may be out of sight here; `Statistics.jvp` meets it.
    """
    if torch._C._are_functorch_transforms_active():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"{where}: {name} has a tangent; {_FORWARD_MODE}")


def register(prefix: str, scale: Scale) -> None:
    """Autograd of the three operators whose names start with this. `scale` multiplies a gradient in place."""
    statistics, backward = f"{prefix}statistics", f"{prefix}statistics_backward"
    for name, function, save in (
        (statistics, functools.partial(_statistics_gradient, _operator(backward)), _save_statistics),
        (backward, _no_double_backward, _save_nothing),
        (f"{prefix}loss", functools.partial(_loss_gradient, scale), _save_loss),
    ):
        torch.library.register_autograd(add_op_namespace_prefix(name), function, setup_context=save)


def register_given_gradients(scale: Scale) -> None:
    """Autograd of `with_gradients`."""
    torch.library.register_autograd(
        add_op_namespace_prefix("with_gradients"),
        functools.partial(_given_gradients, scale),
        setup_context=_save_gradients,
    )


def _operator(name: str) -> Any:
    return getattr(operators, name)


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors: an empty one for a gradient that nobody asked for."""
    return like.new_empty(0) if gradient is None else gradient


def weighted_sum(coefficients: Tensor, values: Tensor) -> Tensor:
    """Σ coefficients · values. A token of weight 0 takes no part, whatever its value is: 0 · inf is not NaN here."""
    return torch.where(coefficients == 0, torch.zeros_like(values), coefficients * values).sum()


def reduced(
    coefficients: Tensor, values: Tensor, dlogits: Tensor | None, dreference: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator `loss` returns: Σ coefficients · values, the values, and both gradients."""
    total = weighted_sum(coefficients, values)
    return total, values, or_empty(dlogits, logits), or_empty(dreference, logits)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Has autograd keep these for backward, so that it sees who writes to them.

    It does not take tensors of torch.inference_mode, such as a teacher's: nobody can have changed those.
    """
    ctx.of_inference = [x if x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(
        *(None if there is not None else x for x, there in zip(tensors, ctx.of_inference, strict=True))
    )


def kept(ctx: Any) -> list[Any]:
    """Those of `keep`."""
    return [saved if there is None else there for saved, there in zip(ctx.saved_tensors, ctx.of_inference, strict=True)]


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    keep(ctx, *inputs[:_TENSORS], output[1])
    ctx.rest = inputs[_TENSORS:-1]


def _statistics_gradient(backward: Callable[..., Any], ctx: Any, values: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * (5 + len(ctx.rest))
    if values is None:
        return None, None, *nothing
    if ctx.needs_input_grad[_TENSORS - 1]:
        # Seen by `inputs` but under torch.func, where a tensor does not always say that it requires grad.
        raise ValueError("kldiv_kernels: temperature, alpha or beta requires grad; gradients flow to the logits only")
    *tensors, state = kept(ctx)
    student, teacher = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if transformed():
        # torch.func over backward alone, of a graph that was made without.
        backward = _statistics_backward
    dlogits, dreference = backward(*tensors, *ctx.rest, state, values, student, teacher)
    return dlogits if student else None, dreference if teacher else None, *nothing


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, values, dlogits, dreference = output
    ctx.mark_non_differentiable(values, dlogits, dreference)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dlogits, dreference)
    ctx.inputs = len(inputs)


def _loss_gradient(scale: Scale, ctx: Any, loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * (ctx.inputs - 2)
    if loss is None:
        return None, None, *nothing
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    gradients = [
        _times_upstream(gradient, loss, scale) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    ]
    return *gradients, *nothing


def _times_upstream(gradient: Tensor, upstream: Tensor, scale: Scale) -> Tensor:
    """The gradient of the one-read form times the upstream scalar.

    In eager mode it is scaled in place, and not touched when the scalar is 1: the buffer is ours, and the graph
    is freed after this backward. While the graph is kept (retain_graph) or traced by torch.compile, and for several
    upstream scalars at once (vmap), it is copied.
    """
    if type(gradient) is not Tensor or _several(upstream) or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    return scale(gradient, upstream)


def _several(upstream: Tensor) -> bool:
    """Whether vmap is at work, torch.func's or that of torch.autograd.grad(is_grads_batched=True)."""
    return transformed() or torch._C._dispatch_keys(upstream).has(_BATCHED)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_double_backward(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(DOUBLE_BACKWARD)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2])


def _given_gradients(scale: Scale, ctx: Any, upstream: Tensor) -> tuple[None, list[Tensor], list[None]]:
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    gradients = [_times_upstream(gradient, upstream, scale) for gradient in ctx.saved_tensors]
    return None, gradients, [None] * len(gradients)


class InPlace(torch.autograd.Function):
    """0, with the gradients of a loss: `write` returns what it has found and the gradients of all tensors but the
    first, which it has left where that tensor was.

    The first tensor's place in the graph is known before it is written to. Of a view that was, PyTorch would make up
    another place, whose backward copies the gradient, or find none.
    """

    @staticmethod
    def forward(ctx: Any, scale: Scale, write: Callable[[], tuple[Tensor, Sequence[Tensor]]], *tensors: Tensor) -> Any:
        found, others = write()
        # Whoever kept the first tensor for a backward pass is told.
        torch.autograd.graph.increment_version(tensors[0])
        ctx.save_for_backward(tensors[0].detach(), *others)
        ctx.scale = scale
        ctx.mark_non_differentiable(found)
        double = tensors[0].dtype == torch.float64
        return torch.zeros((), dtype=torch.float64 if double else torch.float32, device=found.device), found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        return None, None, *(_times_upstream(gradient, upstream, ctx.scale) for gradient in ctx.saved_tensors)


class StatisticsBackward(torch.autograd.Function):
    """The operator `statistics_backward` under torch.func."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _operator("statistics_backward")(*arguments)

    setup_context = staticmethod(_save_nothing)
    backward = staticmethod(_no_double_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(f"kldiv_kernels: {_FORWARD_MODE}")

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        *call, state, coefficients, student, teacher = arguments
        samples = info.batch_size
        folded = _folded(samples, dims, call)
        tables = (_columns(x, dim, samples) for x, dim in zip((state, coefficients), dims[-4:], strict=False))
        gradients = _statistics_backward(*folded, *tables, student, teacher)
        out = []
        for gradient, like, dim, wanted in zip(gradients, call, dims, (student, teacher), strict=False):
            shape = [size for i, size in enumerate(like.shape) if i != dim] if wanted else []
            out.append((gradient.reshape(samples, *shape), 0) if wanted else (gradient, None))
        return tuple(zip(*out, strict=True))


# torch.compile cannot trace what torch.func does to these, and leaves such a call out of its graph.
@untraced
def _statistics_backward(*arguments: Any) -> Any:
    return StatisticsBackward.apply(*arguments)  # type: ignore[no-untyped-call]


class Statistics(torch.autograd.Function):
    """The operator `statistics` under torch.func."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _operator("statistics")(*arguments)

    setup_context = staticmethod(_save_statistics)
    backward = staticmethod(functools.partial(_statistics_gradient, _statistics_backward))
    jvp = StatisticsBackward.jvp

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        samples = info.batch_size
        tables = transformable_statistics(*_folded(samples, dims, arguments))
        return tuple(x.unflatten(1, (samples, x.shape[1] // samples)) for x in tables), (1, 1)


def _folded(samples: int, dims: tuple[Any, ...], arguments: Sequence[Any]) -> list[Any]:
    """The arguments of one call on the rows of all samples, sample by sample; `dims` are those of the samples."""
    logits, reference, labels, mask, exclude, token_parameters, *rest = arguments
    folded = [None if x is None else _rows(x, dim, samples) for x, dim in zip((logits, reference), dims, strict=False)]
    for x, dim in zip((labels, mask, exclude), dims[2:], strict=False):
        folded.append(None if x is None else _sample_first(x, dim, samples).flatten(0, 1))
    folded.append(None if token_parameters is None else _columns(token_parameters, dims[5], samples))
    return [*folded, *rest]


def _sample_first(tensor: Tensor, dim: int | None, samples: int) -> Tensor:
    return tensor.expand(samples, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _rows(logits: Tensor, dim: int | None, samples: int) -> Tensor:
    """[samples, N, V], unit stride in V; two leading dimensions are as many as every backend takes."""
    logits = _sample_first(logits, dim, samples)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits.reshape(samples, logits.shape[1:-1].numel(), logits.shape[-1])


def _columns(table: Tensor, dim: int | None, samples: int) -> Tensor:
    """[rows, samples · N] of a table [rows, N]."""
    return _sample_first(table, dim, samples).movedim(0, 1).flatten(1)


@untraced
def transformable_statistics(*arguments: Any) -> Any:
    return Statistics.apply(*arguments)  # type: ignore[no-untyped-call]
