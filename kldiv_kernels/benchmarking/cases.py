"""The cases: which loss, in which dtype, on how many rows and columns, and the speed that the project promises.

1u is one pass over one [N, V] logits tensor. A divergence and dlogits need 3u (read student and teacher, write
dlogits), a loss of one tensor 2u; no implementation can be faster than copying that many bytes. Losses from hidden
states are limited by their multiplications instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kldiv_kernels import registry
from kldiv_kernels.benchmarking.defaults import DEFAULT_HIDDEN, DEFAULT_ROWS, DEFAULT_VOCAB, LOGPROB_ENTROPY
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
# The same losses from hidden states and the model's head.
_LINEAR = "linear_"
LINEAR_KINDS = tuple(f"{_LINEAR}{loss}" for loss in ("forward_kl", "reverse_kl", "js", LOGPROB_ENTROPY, GRPO))
# And from logits whose columns are spread over processes.
PARALLEL = "parallel"
PARALLEL_RANKS = 2
PARALLEL_KINDS = tuple(f"{PARALLEL}_{loss}" for loss in ("forward_kl", "js", LOGPROB_ENTROPY, GRPO))
_OTHER_KINDS = (LOGPROB_ENTROPY, GRPO, TOPK, TOPK_FROM_LOGITS, *LINEAR_KINDS, *PARALLEL_KINDS)

DEFAULT_DTYPES = (torch.bfloat16, torch.float32)
# Eight completions of 128 tokens.
GRPO_SEQUENCES, GRPO_ROWS = 8, 1024
# What fills a chunk on a CPU.
LINEAR_ROWS = 1024

_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "float32": torch.float32,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip
_SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16", torch.float64: "fp64"}

Against = Literal["compile", "eager", "trl", "logprob", "gemms", "gather", "copy", "memory", "sent"]


@dataclass(frozen=True)
class Target:
    """`against` a peer: how many times faster at least; "copy": how many times the time of copying the floor's
    bytes at most; "logprob", "gemms": how many times the time of our log-probability loss, or of the multiplications
    alone, at most; "memory": how many u beyond the inputs at most; "sent": how many floats a row at most."""

    against: Against
    bound: float

    @property
    def at_most(self) -> bool:
        return self.against in ("copy", "logprob", "gemms", "memory", "sent")

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def text(self) -> str:
        unit = {
            "copy": "× the copy's time",
            "logprob": "× our log-probability loss's time",
            "gemms": "× the multiplications' time",
            "memory": "× the logits in extra memory",
            "sent": "floats a row sent by a process",
            "gather": "× faster than gathering the logits",
        }.get(self.against, f"× faster than {self.against}")
        return f"{'≤' if self.at_most else '≥'} {self.bound:g} {unit}"


# dlogits is 1u; the rest is O(N), a few pages of code and stacks.
_MEMORY = Target("memory", 1.05)
_SPREAD = (Target("gather", 1.5), Target("sent", 64))
_FROM_HIDDEN = (Target("gemms", 1.15), Target("trl", 1.5), Target("eager", 1.5))
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
    **{(kind, torch.bfloat16): _FROM_HIDDEN for kind in LINEAR_KINDS},
    **{(kind, torch.bfloat16): _SPREAD for kind in PARALLEL_KINDS},
}


@dataclass(frozen=True)
class Inputs:
    """student [rows, vocab] requires grad; a teacher for divergences, labels [rows] otherwise.

    A policy loss has an advantage and the log-probability of its sampling policy a row as well, a top-k loss ids and
    log-probabilities [rows, k] of a teacher. A loss from hidden states has those, [rows, hidden], as student and
    reference, and the heads' weights [vocab, hidden], of which the student's requires grad too.
    """

    student: Tensor
    reference: Tensor | None = None
    labels: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    weight: Tensor | None = None
    reference_weight: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """The student's, where the loss begins at logits."""
        assert self.weight is None
        return self.student

    def forget_gradients(self) -> None:
        for leaf in (self.student, self.weight):
            if leaf is not None:
                leaf.grad = None


@dataclass(frozen=True)
class Case:
    kind: str
    dtype: torch.dtype
    rows: int = DEFAULT_ROWS
    vocab: int = DEFAULT_VOCAB
    # Of a loss from hidden states.
    hidden: int = DEFAULT_HIDDEN

    @property
    def name(self) -> str:
        return f"{self.kind} {dtype_name(self.dtype)}"

    @property
    def from_hidden(self) -> bool:
        return self.kind in LINEAR_KINDS

    @property
    def loss(self) -> str:
        """The kind, wherever it begins and whoever has its logits."""
        return self.kind.removeprefix(_LINEAR) if self.from_hidden else self.kind.removeprefix(f"{PARALLEL}_")

    @property
    def ranks(self) -> int:
        """How many processes have a part of the columns each."""
        return PARALLEL_RANKS if self.kind in PARALLEL_KINDS else 1

    @property
    def is_divergence(self) -> bool:
        return self.loss not in (LOGPROB_ENTROPY, GRPO, TOPK)

    @property
    def k(self) -> int:
        return min(TOPK_K, max(1, self.vocab // 2))

    @property
    def planned(self) -> dict[str, Any]:
        """What `kldiv_kernels.plan` calls the case's loss."""
        where = {"hidden_size": self.hidden} if self.from_hidden else {}
        if self.loss == LOGPROB_ENTROPY:
            return {"stats": ["logprob", "entropy"], **where}
        names = {GRPO: POLICY_LOSS, TOPK: TOPK_LOSS, TOPK_FROM_LOGITS: TOPK_LOSS}
        return {"kind": names.get(self.loss, self.loss), **where}

    @property
    def sequences(self) -> int:
        """Into how many sequences a policy loss divides the rows."""
        return math.gcd(self.rows, GRPO_SEQUENCES)

    def in_sequences(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, advantages, log-probabilities of the sampling policy; as a trainer has them, [sequences, tokens]."""
        assert inputs.labels is not None
        assert inputs.advantages is not None
        assert inputs.old_logprobs is not None
        shape = (self.sequences, -1)
        return inputs.labels.view(shape), inputs.advantages.view(shape), inputs.old_logprobs.view(shape)

    @property
    def unit_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize

    @property
    def floor_units(self) -> int | None:
        """None from hidden states, whose logits need not be in memory at all, and of several processes."""
        return None if self.from_hidden or self.ranks > 1 else 3 if self.is_divergence else 2

    @property
    def floor_bytes(self) -> int | None:
        return None if self.floor_units is None else self.floor_units * self.unit_bytes

    @property
    def targets(self) -> tuple[Target, ...]:
        """What the project promises, at the shape for which it does."""
        promised = _TARGETS.get((self.kind, self.dtype), ())
        if self.from_hidden:
            here = (self.rows, self.vocab, self.hidden) == (LINEAR_ROWS, DEFAULT_VOCAB, DEFAULT_HIDDEN)
            return promised if here else ()
        if self.ranks > 1:
            return promised if (self.rows, self.vocab) == (DEFAULT_ROWS, DEFAULT_VOCAB) else ()
        if (self.rows, self.vocab) != (GRPO_ROWS if self.kind == GRPO else DEFAULT_ROWS, DEFAULT_VOCAB):
            return ()
        return (*promised, _MEMORY)

    def inputs(self, seed: int = 0, device: str = "cpu") -> Inputs:
        """Logits with a deviation of 3: about a language model's, so that no term is trivially 0."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, columns: int, deviation: float) -> Tensor:
            shape = (rows, columns)
            return torch.randn(shape, dtype=self.dtype, device=device, generator=generator).mul_(deviation)

        def side() -> tuple[Tensor, Tensor | None]:
            if not self.from_hidden:
                return normal(self.rows, self.vocab, 3), None
            return normal(self.rows, self.hidden, 1), normal(self.vocab, self.hidden, 3 / math.sqrt(self.hidden))

        student, weight = side()
        student.requires_grad_()
        if weight is not None:
            weight.requires_grad_()
        if self.is_divergence:
            reference, reference_weight = side()
            return Inputs(student, reference, weight=weight, reference_weight=reference_weight)
        if self.kind == TOPK:
            teacher, _ = side()
            ids = teacher.topk(self.k, dim=-1).indices
            logprobs = _logprobs(ids, teacher)
            return Inputs(student, labels=ids[:, 0].contiguous(), topk_ids=ids, topk_logprobs=logprobs)
        labels = torch.randint(self.vocab, (self.rows,), device=device, generator=generator)
        if self.loss == LOGPROB_ENTROPY:
            return Inputs(student, labels=labels, weight=weight)
        advantages, moved = torch.randn((2, self.rows), device=device, generator=generator)
        # An earlier policy, so near that some ratios are clipped and some are not.
        old = _logprobs(labels[:, None], student, weight).squeeze(-1) + 0.2 * moved
        return Inputs(student, labels=labels, advantages=advantages, old_logprobs=old, weight=weight)


@torch.no_grad()
def _logprobs(ids: Tensor, student: Tensor, weight: Tensor | None = None) -> Tensor:
    """Of ids [rows, k], in float32 without a copy of all rows; of logits, or of hidden states and a head's weight."""
    found = []
    for rows, chosen in zip(torch.split(student, 64), torch.split(ids, 64), strict=True):
        logits = (rows if weight is None else F.linear(rows, weight)).float()
        found.append(logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True))
    return torch.cat(found)


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
    """Every divergence of the registry, the loss from log-probabilities and entropy, a policy loss, top-k losses, and
    losses from hidden states and of several processes."""
    return [*registry.divergence_names(), *_OTHER_KINDS]


def cases(
    kinds: tuple[str, ...], dtypes: tuple[torch.dtype, ...], rows: int, vocab: int, hidden_size: int | None = None
) -> list[Case]:
    """kinds × dtypes, validated; hidden_size is for losses from hidden states, "parallel" is all of that name. Raises
    ValueError naming what is wrong."""
    kinds = tuple(one for kind in kinds for one in (PARALLEL_KINDS if kind == PARALLEL else (kind,)))
    for name, value in (("rows", rows), ("vocab", vocab), ("hidden_size", hidden_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    for kind in kinds:
        if kind not in _OTHER_KINDS:
            registry.get(kind, "kinds", known_kinds())
    if vocab % PARALLEL_RANKS and set(kinds) & set(PARALLEL_KINDS):
        raise ValueError(
            f"vocab is {vocab}; expected a multiple of {PARALLEL_RANKS}, the processes of {PARALLEL} kinds"
        )
    if hidden_size is not None and not set(kinds) & set(LINEAR_KINDS):
        raise ValueError(
            f"hidden_size is {hidden_size}, and no kind begins at hidden states; expected one of "
            f"{', '.join(LINEAR_KINDS)}"
        )
    return [Case(kind, dtype, rows, vocab, hidden_size or DEFAULT_HIDDEN) for dtype in dtypes for kind in kinds]
