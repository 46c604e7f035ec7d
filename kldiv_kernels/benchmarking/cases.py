"""The cases: which loss, in which dtype, on how many rows and columns, and the speed that the project promises.

1u is one pass over one [N, V] logits tensor. A divergence and dlogits need 3u (read student and teacher, write
dlogits), a loss of one tensor 2u; no implementation can be faster than copying that many bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kldiv_kernels import registry
from kldiv_kernels.benchmarking.defaults import DEFAULT_ROWS, DEFAULT_VOCAB, LOGPROB_ENTROPY
from kldiv_kernels.planning import POLICY_LOSS, TOPK_LOSS

ENTROPY_COEFFICIENT = 0.01
# The clipped surrogate of GRPO over tokens, with the entropy as a metric.
GRPO = "grpo"
GRPO_CLIP = 0.2
# Forward KL from a teacher of which the likeliest tokens of each row are known, with the rest as one more outcome; and
# the same on the student's likeliest tokens, from the logits of both.
TOPK, TOPK_FROM_LOGITS = "topk", "topk_from_logits"
TOPK_K = 64
JS_BETA = 0.5
_OTHER_KINDS = (LOGPROB_ENTROPY, GRPO, TOPK, TOPK_FROM_LOGITS)

DEFAULT_DTYPES = (torch.bfloat16, torch.float32)
# Eight completions of 128 tokens.
GRPO_SEQUENCES, GRPO_ROWS = 8, 1024

_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "float32": torch.float32,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64"}

Against = Literal["compile", "eager", "trl", "logprob", "copy", "memory"]


@dataclass(frozen=True)
class Target:
    """`against` a peer: how many times faster at least; "copy": how many times the time of copying the floor's
    bytes at most; "logprob": how many times the time of our log-probability loss at most; "memory": how many u beyond
    the inputs at most."""

    against: Against
    bound: float

    @property
    def at_most(self) -> bool:
        return self.against in ("copy", "logprob", "memory")

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def text(self) -> str:
        unit = {
            "copy": "× the copy's time",
            "logprob": "× our log-probability loss's time",
            "memory": "× the logits in extra memory",
        }.get(self.against, f"× faster than {self.against}")
        return f"{'≤' if self.at_most else '≥'} {self.bound:g} {unit}"


# dlogits is 1u; the rest is O(N), a few pages of code and stacks.
_MEMORY = Target("memory", 1.05)
_DIVERGENCE = (Target("compile", 5), Target("eager", 20), Target("copy", 2.2))
_TARGETS: dict[tuple[str, torch.dtype], tuple[Target, ...]] = {
    ("forward_kl", torch.bfloat16): _DIVERGENCE,
    ("reverse_kl", torch.bfloat16): _DIVERGENCE,
    ("hellinger", torch.bfloat16): _DIVERGENCE,
    ("js", torch.bfloat16): (Target("compile", 7), Target("trl", 30), Target("copy", 4)),
    (LOGPROB_ENTROPY, torch.bfloat16): (Target("compile", 3), Target("trl", 12), Target("copy", 2.5)),
    (GRPO, torch.bfloat16): (Target("trl", 10),),
    (TOPK, torch.bfloat16): (Target("logprob", 1.3),),
    (TOPK_FROM_LOGITS, torch.bfloat16): (Target("trl", 8),),
    ("forward_kl", torch.float32): (Target("compile", 4), Target("eager", 10), Target("copy", 2)),
}


@dataclass(frozen=True)
class Inputs:
    """student [rows, vocab] requires grad; a teacher for divergences, labels [rows] otherwise.

    A policy loss has an advantage and the log-probability of its sampling policy a row as well, a top-k loss ids and
    log-probabilities [rows, k] of a teacher.
    """

    logits: Tensor
    reference: Tensor | None = None
    labels: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None


@dataclass(frozen=True)
class Case:
    kind: str
    dtype: torch.dtype
    rows: int = DEFAULT_ROWS
    vocab: int = DEFAULT_VOCAB

    @property
    def name(self) -> str:
        return f"{self.kind} {dtype_name(self.dtype)}"

    @property
    def is_divergence(self) -> bool:
        return self.kind not in (LOGPROB_ENTROPY, GRPO, TOPK)

    @property
    def k(self) -> int:
        return min(TOPK_K, max(1, self.vocab // 2))

    @property
    def planned(self) -> dict[str, Any]:
        """What `kldiv_kernels.plan` calls the case's loss."""
        if self.kind == LOGPROB_ENTROPY:
            return {"stats": ["logprob", "entropy"]}
        return {"kind": {GRPO: POLICY_LOSS, TOPK: TOPK_LOSS, TOPK_FROM_LOGITS: TOPK_LOSS}.get(self.kind, self.kind)}

    @property
    def sequences(self) -> int:
        """Into how many sequences a policy loss divides the rows."""
        return math.gcd(self.rows, GRPO_SEQUENCES)

    @property
    def unit_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def floor_units(self) -> int:
        return 3 if self.is_divergence else 2

    @property
    def floor_bytes(self) -> int:
        return self.floor_units * self.unit_bytes

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the project promises, at the shape for which it does."""
        if (self.rows, self.vocab) != (GRPO_ROWS if self.kind == GRPO else DEFAULT_ROWS, DEFAULT_VOCAB):
            return ()
        return (*_TARGETS.get((self.kind, self.dtype), ()), _MEMORY)

    def inputs(self, seed: int = 0, device: str = "cpu") -> Inputs:
        """randn × 3: about the spread of a language model's logits, so that no term is trivially 0."""
        generator = torch.Generator(device).manual_seed(seed)

        def rows() -> Tensor:
            shape = (self.rows, self.vocab)
            return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(3)

        logits = rows().requires_grad_()
        if self.is_divergence:
            return Inputs(logits, rows())
        if self.kind == TOPK:
            teacher = rows()
            ids = teacher.topk(self.k, dim=-1).indices
            logprobs = teacher.gather(-1, ids).float() - _logsumexp(teacher)[:, None]
            return Inputs(logits, labels=ids[:, 0].contiguous(), topk_ids=ids, topk_logprobs=logprobs)
        labels = torch.randint(self.vocab, (self.rows,), device=device, generator=generator)
        if self.kind == LOGPROB_ENTROPY:
            return Inputs(logits, labels=labels)
        advantages, moved = torch.randn((2, self.rows), device=device, generator=generator)
        # An earlier policy, so near that some ratios are clipped and some are not.
        sampled = logits.detach().gather(-1, labels[:, None]).squeeze(-1).float()
        old = sampled - _logsumexp(logits.detach()) + 0.2 * moved
        return Inputs(logits, labels=labels, advantages=advantages, old_logprobs=old)


def _logsumexp(logits: Tensor) -> Tensor:
    """In float32, without a copy of all rows."""
    return torch.stack([row.float().logsumexp(-1) for row in logits])


def dtype(name: str) -> torch.dtype:
    """The dtype of that name, short or long.

    >>> dtype("bf16")
    torch.bfloat16
    """
    if name not in _DTYPES:
        raise ValueError(f"{name!r} is no dtype; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    return _SHORT[dtype]


def known_kinds() -> list[str]:
    """Every divergence of the registry, the loss from log-probabilities and entropy, a policy loss, top-k losses."""
    return [*registry.divergence_names(), *_OTHER_KINDS]


def cases(kinds: tuple[str, ...], dtypes: tuple[torch.dtype, ...], rows: int, vocab: int) -> list[Case]:
    """kinds × dtypes, validated. Raises ValueError naming what is wrong."""
    for name, value in (("rows", rows), ("vocab", vocab)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    for kind in kinds:
        if kind not in _OTHER_KINDS:
            registry.get(kind, "kinds", known_kinds())
    return [Case(kind, dtype, rows, vocab) for dtype in dtypes for kind in kinds]
