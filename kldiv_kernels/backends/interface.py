"""What is asked of a backend, and what a backend is.

A backend turns a `Call` into per-token statistics, turns per-token coefficients into gradients of the logits,
and, when the coefficients are known beforehand, does both at once. Public functions validate above it: a
backend never sees a bad shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from kldiv_kernels import registry

# Why a backend on GPUs does not write a gradient in place.
READS_AGAIN = "it reads the logits of several labels, or of a row's tail, again"


@dataclass(frozen=True)
class Call:
    """What is asked of a backend. N rows are the leading dimensions of `logits` flattened.

    logits, reference [*, V], unit stride in V; labels [N, K] int64, -1 where absent; mask [N] bool;
    exclude [N] int64, -1 for none; token_parameters [4, N] float32 overrides
    parameters = (temperature, reference temperature, alpha, beta); columns from `vocab_size` on are padding.
    """

    logits: Tensor
    reference: Tensor | None
    labels: Tensor | None
    mask: Tensor | None
    exclude: Tensor | None
    token_parameters: Tensor | None
    parameters: tuple[float, float, float, float]
    stats: tuple[str, ...]
    vocab_size: int

    @property
    def rows(self) -> int:
        return self.logits.numel() // max(1, self.logits.shape[-1])

    @property
    def reads_labels_again(self) -> bool:
        """Whether GPUs read the logits at the labels once more, when all other columns have their gradient."""
        return "tail_logprob" in self.stats or self.labels_per_row > 1

    @property
    def labels_per_row(self) -> int:
        return 1 if self.labels is None else self.labels.shape[1]


def value_rows(stats: tuple[str, ...], labels_per_row: int) -> int:
    """Rows of the [rows, N] table of values: one a statistic, one a label for the labelled ones."""
    return sum(labels_per_row if registry.STATISTICS[name].per_label else 1 for name in stats)


class Backend(Protocol):
    """One way of computing; see the table of backends in the README."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot be used in this process, or None."""

    def unsupported(self, call: Call) -> str | None:
        """Why it does not serve this call, or None."""

    def state_rows(self, stats: tuple[str, ...]) -> int:
        """Floats a row that `forward` saves for `backward`."""

    def forward(self, call: Call, with_state: bool) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N] and state [state_rows, N] (or [0, N])."""

    def backward(
        self, call: Call, state: Tensor, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of sum(coefficients * values), in the logits' dtype and shape."""

    def refuses_in_place(self, call: Call, reference: bool) -> str | None:
        """Why it cannot write the gradient over the logits of this call, or None; `reference`: beside the other one."""

    def one_read(
        self, call: Call, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """forward and backward together. In place, here and below: the gradient of the logits takes their place, and
        is `call.logits` then; that of the reference does not."""


@runtime_checkable
class OneReadPolicy(Protocol):
    """A backend that goes from the values of a row to the gradient of its policy loss by itself."""

    def policy(
        self,
        call: Call,
        coefficients: Tensor,
        tokens: Tensor,
        term: str,
        kl: str,
        bounds: list[float],
        in_place: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N] and dlogits; the arguments are those of `sources.PolicyTokens`."""

    def policy_outcome(
        self,
        values: Tensor,
        coefficients: Tensor,
        tokens: Tensor,
        valid: Tensor,
        scale: Tensor,
        old: Tensor | None,
        sampling: Tensor | None,
        off_policy_weight: Tensor | None,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        anchored: bool,
        reference: bool,
        exact: bool,
        kl_coef: float,
        term: str,
        kl: str,
        bounds: list[float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """After `policy`: the loss of each token [N], the sums of the batch as in csrc/policy_outcome.h, the number of
        tokens. `values` are those for logprob, entropy and, with `exact`, an exact KL."""


@runtime_checkable
class OneReadTopK(Protocol):
    """A backend that goes from the log-probabilities of a row to the gradient of its top-k divergence by itself."""

    def topk(
        self, call: Call, teacher: Tensor, scale: Tensor, kind: str, alpha: float, beta: float, in_place: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values [value_rows, N], divergences [N] and dlogits of Σ scale · divergence, for statistics ("logprob",) or
        ("logprob", "tail_logprob"), of which `teacher` [N, value_rows] has the other side."""


@runtime_checkable
class Sharded(Protocol):
    """A backend that computes a row in processes which have some of its columns each (`parallel`).

    The call's logits and vocab_size are those of this process. Labels and excluded columns are counted from its first
    one; a label below -1 is a column of another process. What is exchanged has a layout of the backend's own.
    """

    def shard_state(self, call: Call, first_column: int) -> Tensor:
        """What these columns have to say before the softmaxes are known."""

    def shard_sums(self, call: Call, states: Tensor) -> Tensor | None:
        """Sums over these columns, of statistics that need the softmaxes; None where there are none. `states` are those
        of all processes, in the order of their columns, [processes, ...]; so are `sums` below."""

    def shard_finish(
        self, call: Call, states: Tensor, sums: Tensor | None, picked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Values [value_rows, N], and the state for `backward`. `picked` [2, N, K]: the logits at the labels."""
