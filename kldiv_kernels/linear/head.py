"""The last layer of a language model, from hidden states to logits, and what is asked of one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MEND = "give its weight (kk.Head) if that is all it does, or compute the logits and use the function without linear_"


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh(z/softcap), z = logit_scale · (hidden @ weightᵀ + bias); without `softcap`, z itself.

    Args:
        weight: [V, H], or an `nn.Linear` without anything added to it, whose bias is taken with it.
        bias: [V], or None (default).
        logit_scale: what Cohere and Granite multiply their logits by. Default 1.
        softcap: the bound of Gemma's logits (`final_logit_softcapping`). Default None.

    >>> import torch, kldiv_kernels as kk
    >>> head = kk.Head(torch.eye(4), softcap=30.0)
    >>> kk.linear_token_stats(torch.zeros(1, 4), head, stats=("entropy",)).entropy.exp()
    tensor([4.])
    """

    weight: Tensor | nn.Linear
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Side:
    """Hidden states [N, H] and the head that they go through; softcap 0: none. `compute`: the dtype of the factors."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float
    compute: torch.dtype

    @property
    def columns(self) -> int:
        return self.weight.shape[0]


def hidden_checked(where: str, name: str, hidden: Tensor) -> None:
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{where}: {name} is {type(hidden).__name__}; expected a torch.Tensor [*, H]")
    if hasattr(hidden, "device_mesh"):
        raise TypeError(f"{where}: {name} is a DTensor; expected this rank's tensor (to_local())")
    if hidden.dtype not in _DTYPES:
        raise TypeError(f"{where}: {name} has dtype {hidden.dtype}; expected float32, bfloat16, float16 or float64")
    if hidden.dim() < 1:
        raise ValueError(f"{where}: {name} has shape {list(hidden.shape)}; expected [*, H]")


def side_of(
    where: str, hidden: Tensor, head: Tensor | nn.Linear | Head, prefix: str = "", may_be_empty: bool = False
) -> Side:
    """The hidden states, flattened, with their head; raises naming the argument. A shard of a head may be empty."""
    name = f"{prefix}hidden"
    hidden_checked(where, name, hidden)
    head = taken(where, f"{prefix}head", head)
    weight = _weight_checked(where, f"{prefix}head", head.weight, hidden, name, may_be_empty)
    bias = head.bias
    if bias is not None:
        bias = _full(where, f"the bias of {prefix}head", bias)
        if bias.shape != weight.shape[:1] or bias.device != weight.device or not bias.is_floating_point():
            raise ValueError(
                f"{where}: the bias of {prefix}head has shape {list(bias.shape)}, {bias.dtype} on {bias.device}; "
                f"expected {[weight.shape[0]]} floats on {weight.device}"
            )
    compute, device = torch.promote_types(hidden.dtype, weight.dtype), weight.device.type
    if compute != torch.float64 and torch.is_autocast_enabled(device):
        compute = torch.get_autocast_dtype(device)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return Side(rows, weight, bias, float(head.logit_scale), head.softcap or 0.0, compute)


def taken(where: str, name: str, head: Any) -> Head:
    """The head by its weight; raises naming the argument."""
    if isinstance(head, Tensor):
        return Head(head)
    if isinstance(head, nn.Module):
        linear = _plain(where, name, head)
        return Head(linear.weight, linear.bias)
    if not isinstance(head, Head):
        raise TypeError(
            f"{where}: {name} is {type(head).__name__}; expected a weight [V, H], torch.nn.Linear or kk.Head"
        )
    scale, softcap = head.logit_scale, head.softcap
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"{where}: logit_scale of {name} is {scale!r}; expected a number above 0")
    if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not softcap > 0):
        raise ValueError(f"{where}: softcap of {name} is {softcap!r}; expected a number above 0, or None")
    if not isinstance(head.weight, nn.Module):
        return head
    linear = _plain(where, name, head.weight)
    if head.bias is not None:
        raise ValueError(f"{where}: bias of {name} is given beside an nn.Linear, which has its own; expected None")
    return Head(linear.weight, linear.bias, scale, softcap)


def _plain(where: str, name: str, module: nn.Module) -> nn.Linear:
    """The module, if hidden @ weightᵀ + bias is all that it does: what else it did would be lost without a word."""
    # What `fully_shard` makes of an nn.Linear is a class of its own that has both as bases.
    bases = type(module).__bases__
    sharded = nn.Linear in bases and any(base.__name__ == "FSDPModule" for base in bases)
    if type(module) is not nn.Linear and not sharded:
        raise TypeError(f"{where}: {name} is {type(module).__name__}; expected torch.nn.Linear itself: {_MEND}")
    hooks = [hook for name in _HOOKS for hook in getattr(module, name, {}).values()]
    # Those of `parallelize_module` say how DTensors come and go.
    hooks = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor")]
    if (hooks and not sharded) or "forward" in module.__dict__:
        raise ValueError(f"{where}: {name} has hooks, which only its own forward() would run: {_MEND}")
    if parametrize.is_parametrized(module):
        raise ValueError(f"{where}: {name} is parametrised; {_MEND}")
    assert isinstance(module, nn.Linear)
    return module


def _weight_checked(where: str, name: str, weight: Any, hidden: Tensor, of: str, may_be_empty: bool) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{where}: the weight of {name} is {type(weight).__name__}; expected a torch.Tensor [V, H]")
    if weight.device.type == "meta":
        raise ValueError(f"{where}: the weight of {name} is on the meta device; expected one with values")
    if weight.dtype not in _DTYPES or weight.is_quantized:
        raise TypeError(
            f"{where}: the weight of {name} has dtype {weight.dtype} (quantised?); expected float32, bfloat16, float16 "
            f"or float64: {_MEND}"
        )
    if weight.numel() == 0 and not (may_be_empty and weight.dim() == 2 and weight.shape[1] > 0):
        raise ValueError(
            f"{where}: the weight of {name} has shape {list(weight.shape)}; expected [V, H]. A shard of ZeRO-3 is "
            f"empty outside of its module: gather it first (deepspeed.zero.GatheredParameters)"
        )
    if weight.dim() != 2:
        raise ValueError(f"{where}: the weight of {name} has shape {list(weight.shape)}; expected [V, H]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{where}: {of} has shape {list(hidden.shape)}, the weight of {name} {list(weight.shape)}; expected the "
            f"same last dimension"
        )
    if weight.device != hidden.device:
        raise ValueError(f"{where}: the weight of {name} is on {weight.device}; expected {hidden.device} like {of}")
    return _full(where, f"the weight of {name}", weight)


def _full(where: str, name: str, tensor: Tensor) -> Tensor:
    """A parameter that is a DTensor as one tensor, gathered here, once a call."""
    if not hasattr(tensor, "device_mesh"):
        return tensor
    from kldiv_kernels.linear.sharded import gathered

    return gathered(where, name, tensor)
