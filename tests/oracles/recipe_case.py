"""A case of a recipe: what goes in, and what comes out by the paper's numbers or by a definition in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kldiv_kernels as kk

# Of the facts: student, teacher and a third model over four tokens, and the sampled one.
S, T, B, Y = [2.0, 0.5, -1.0, 0.0], [1.0, 1.5, -0.5, 0.0], [0.5, 0.0, 0.0, -0.5], 1


@dataclass(frozen=True, eq=False)
class Case:
    """`recipe` is the function's name. `tensors` are its tensors by name: float64, int64 or bool.

    value, gradients: golden numbers (by the name of a tensor); or expected(**tensors, **options): the definition, plain
    PyTorch in float64 from softmax on, whose gradients are autograd's. trained: the tensors that get gradients. roles:
    two tensors that must not be swapped. reads: where it is not what the registry says of the paper.
    """

    recipe: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    value: float | list[Any] | None = None
    gradients: dict[str, list[Any]] = field(default_factory=dict)
    expected: Callable[..., Tensor] | None = None
    trained: tuple[str, ...] = ("logits",)
    roles: tuple[str, str] | None = None
    reads: str | None = None
    name: str = ""

    @property
    def id(self) -> str:
        return f"{self.recipe}-{self.name}" if self.name else self.recipe


def row(values: list[float]) -> Tensor:
    """A row of the facts as [1, 1, V]."""
    return torch.tensor([[values]], dtype=torch.float64)


def batch(sequences: int = 3, tokens: int = 5, vocab: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a batch as trainers have them, log-probabilities of real softmaxes, with a mask that leaves some out.

    logits, teacher_logits, old_logits, base_logits [B, T, V]; token_ids, mask, *_logprobs of those [B, T]; advantages,
    groups, rewards, correct [B]. Pick the ones that a recipe takes.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = 1.5 * randn(sequences, tokens, vocab)
    out = {
        "logits": logits,
        "teacher_logits": logits + randn(sequences, tokens, vocab),
        "old_logits": logits + 0.2 * randn(sequences, tokens, vocab),
        "base_logits": logits + 0.5 * randn(sequences, tokens, vocab),
    }
    ids = torch.randint(0, vocab, (sequences, tokens), generator=generator)
    mask = torch.ones(sequences, tokens, dtype=torch.bool)
    # Sequences of several lengths, one with a hole; at least two tokens each.
    for sequence in range(sequences):
        mask[sequence, tokens - sequence % (tokens - 1) :] = False
    mask[0, 1] = False
    out |= {"token_ids": ids, "mask": mask}
    for name in ("teacher", "old", "base"):
        out[f"{name}_logprobs"] = logprob(out[f"{name}_logits"], ids)
    out["advantages"] = randn(sequences)
    out["groups"] = torch.arange(sequences) // 2
    out["rewards"] = torch.randint(0, 2, (sequences,), generator=generator).double()
    out["rewards"][:2] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    out["correct"] = out["rewards"] > 0
    return out


def pick(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def logprob(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def evaluate(
    case: Case, dtype: torch.dtype, backend: str, tensors: dict[str, Tensor] | None = None, *, grad: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value (a PolicyLoss's loss) and the gradients of what is trained, of the sum times a ramp if it is no scalar.

    The tensors may be others than the case's.
    """
    function = getattr(kk.recipes, case.recipe)
    given = {
        name: x.detach().to(dtype).requires_grad_(grad and name in case.trained) if x.is_floating_point() else x
        for name, x in (case.tensors if tensors is None else tensors).items()
    }
    options = dict(case.options)
    if "backend" in inspect.signature(function).parameters:
        options["backend"] = backend
    return _with_gradients(function(**given, **options), given, case)


def definition(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients by the case's definition, in float64."""
    assert case.expected is not None
    given = {
        name: x.detach().clone().requires_grad_(name in case.trained) if x.is_floating_point() else x
        for name, x in case.tensors.items()
    }
    return _with_gradients(case.expected(**given, **case.options), given, case)


def _with_gradients(out: Any, given: dict[str, Tensor], case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    value = out.loss if isinstance(out, kk.PolicyLoss) else out
    if isinstance(value, tuple):
        value = torch.cat([x.reshape(-1) for x in value])
    if not value.requires_grad:
        # Of a mask: the difference of two bool tensors is an error.
        return value.double() if value.dtype == torch.bool else value, {}
    ramp = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    names = [name for name in case.trained if name in given]
    found = torch.autograd.grad((value * ramp).sum(), [given[name] for name in names], allow_unused=True)
    zeros = [torch.zeros_like(given[name]) if x is None else x for name, x in zip(names, found, strict=True)]
    return value.detach(), dict(zip(names, zeros, strict=True))


def with_masked(tensors: dict[str, Tensor], fill: float) -> dict[str, Tensor]:
    """`fill` in every floating-point tensor where the mask is False."""
    mask = tensors["mask"]
    out = dict(tensors)
    for name, x in tensors.items():
        if x.is_floating_point() and x.shape[: mask.dim()] == mask.shape:
            out[name] = torch.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())), x, fill)
    return out


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(got: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tolerance, atol=tolerance)


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x, retain_graph=True)[0]
