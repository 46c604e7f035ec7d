"""The specification: plain PyTorch on any device and in any floating dtype.

Rows are taken in chunks so that the temporaries (about a dozen [chunk, V] tensors) stay near 1 GiB. float64 inputs are
computed in float64, all others in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kldiv_kernels.backends.interface import Call, value_rows
from kldiv_kernels.divergences import Elements, Statistic, Term
from kldiv_kernels.registry import STATISTICS

_CHUNK_ELEMENTS = 1 << 24
# A logit at or below this counts as -inf, so that masks of finfo.min and of -inf mean the same.
NO_MASS = -1e30


class ReferenceBackend:
    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, call: Call) -> str | None:
        return None

    def state_rows(self, stats: tuple[str, ...]) -> int:
        return 0

    def forward(self, call: Call, with_state: bool) -> tuple[Tensor, Tensor]:
        values, _, _ = _run(call, None, False, False)
        return values, values.new_empty((0, call.rows))

    def backward(
        self, call: Call, state: Tensor, coefficients: Tensor, student: bool, reference: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        _, dlogits, dreference = _run(call, coefficients, student, reference)
        return dlogits, dreference

    def refuses_in_place(self, call: Call, reference: bool) -> str | None:
        return None

    def one_read(
        self, call: Call, coefficients: Tensor, student: bool, reference: bool, in_place: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        values, dlogits, dreference = _run(call, coefficients, student, reference)
        if in_place and dlogits is not None:
            dlogits = call.logits.detach().copy_(dlogits)
        return values, dlogits, dreference


def _run(
    call: Call, coefficients: Tensor | None, student: bool, reference: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dtype = _compute_dtype(call)
    values = call.logits.new_zeros((value_rows(call.stats, call.labels_per_row), call.rows), dtype=dtype)
    # contiguous_format: a strided view's gradient has the view's shape and no holes.
    dlogits = torch.zeros_like(call.logits, memory_format=torch.contiguous_format) if student else None
    dreference = (
        torch.zeros_like(call.reference, memory_format=torch.contiguous_format)
        if reference and call.reference is not None
        else None
    )
    for index in _chunks(call):
        rows = _Rows.take(call, index, dtype)
        values[:, index] = rows.values()
        if coefficients is None:
            continue
        for gradient, of_student in ((dlogits, True), (dreference, False)):
            if gradient is not None:
                flat = gradient.view(-1, gradient.shape[-1])
                flat[index, : call.vocab_size] = rows.gradient(coefficients[:, index], of_student).to(flat.dtype)
    return values, dlogits, dreference


def _compute_dtype(call: Call) -> torch.dtype:
    dtypes = [call.logits.dtype] + ([] if call.reference is None else [call.reference.dtype])
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _chunks(call: Call) -> Iterator[Tensor]:
    """Row numbers of the rows that are read, a chunk at a time."""
    rows = torch.arange(call.rows, device=call.logits.device)
    if call.mask is not None:
        rows = rows[call.mask]
    chunk = max(1, _CHUNK_ELEMENTS // max(1, call.vocab_size))
    for start in range(0, rows.numel(), chunk):
        yield rows[start : start + chunk]


def _gather_rows(tensor: Tensor, index: Tensor, columns: int) -> Tensor:
    """Rows by their flat number, whatever the strides of the leading dimensions."""
    where = torch.unravel_index(index, tensor.shape[:-1]) if tensor.dim() > 1 else ()
    picked = tensor[where] if where else tensor.expand(index.numel(), -1)
    return picked[..., :columns]


@dataclass
class _Rows:
    """Some rows of a call, with their log-probabilities."""

    stats: tuple[Statistic, ...]
    lse_s: Tensor
    lse_t: Tensor
    # log softmax of the student's logits as they are, where a statistic asks for it.
    untempered: Tensor | None
    labels: Tensor | None
    exclude: Tensor | None
    temperature: Tensor
    reference_temperature: Tensor
    elements: Elements

    @staticmethod
    def take(call: Call, index: Tensor, dtype: torch.dtype) -> _Rows:
        if call.token_parameters is None:
            columns = torch.tensor(call.parameters, dtype=dtype, device=call.logits.device)[:, None]
            parameters = columns.expand(4, index.numel())
        else:
            parameters = call.token_parameters[:, index].to(dtype)
        temperature, reference_temperature, alpha, beta = (x[:, None] for x in parameters)
        exclude = None if call.exclude is None else call.exclude[index][:, None]
        s = _read(call.logits, index, call.vocab_size, exclude, dtype)
        t = s if call.reference is None else _read(call.reference, index, call.vocab_size, exclude, dtype)
        logq, max_s, sum_s, below_s = _log_softmax(s, temperature)
        logp, max_t, sum_t, below_t = _log_softmax(t, reference_temperature)
        nowhere = (s == -torch.inf) & (t == -torch.inf)
        # Each difference is nearly exact where the rows are close; a difference of two logsumexp would not be.
        shift = (sum_t.double().log() - sum_s.double().log()).to(dtype)
        log_ratio = torch.where(nowhere, torch.zeros_like(s), (below_t - below_s) - shift)
        lse_s, lse_t = max_s + sum_s.log(), max_t + sum_t.log()
        stats = tuple(STATISTICS[name] for name in call.stats)
        untempered = None if all(x.tempered for x in stats) else _log_softmax(s, torch.ones_like(temperature))[0]
        return _Rows(
            stats, lse_s, lse_t, untempered,
            None if call.labels is None else call.labels[index],
            exclude, temperature, reference_temperature,
            Elements(logp, logq, log_ratio, alpha, beta),
        )  # fmt: skip

    def values(self) -> Tensor:
        """[value_rows, rows]"""
        out = [self._value(statistic) for statistic in self.stats]
        return torch.cat(out, dim=1).T

    def _value(self, statistic: Statistic) -> Tensor:
        if statistic.kind == "label":
            assert self.labels is not None
            logs = self._logs(statistic)
            picked = logs.gather(1, self._columns())
            picked = torch.where(self.labels >= logs.shape[1], torch.full_like(picked, torch.nan), picked)
            return torch.where(self.labels < 0, torch.zeros_like(picked), picked)
        if statistic.kind == "tail":
            return self._tail().logsumexp(1, keepdim=True)
        if statistic.kind == "logsumexp":
            return self.lse_s
        if statistic.kind == "argmax":
            index = self.elements.logq.argmax(dim=1, keepdim=True).to(self.lse_s.dtype)
            return torch.where(self.lse_s.isfinite(), index, torch.full_like(index, -1))
        if statistic.kind == "max_logprob":
            return self.elements.logq.amax(dim=1, keepdim=True)
        sums, log_sum = self._sums(statistic)
        if statistic.combine is None:
            return sums[0]
        arguments = sums if log_sum is None else (*sums, log_sum)
        return statistic.combine(*arguments, alpha=self.elements.alpha, beta=self.elements.beta)

    def _logs(self, statistic: Statistic) -> Tensor:
        """The log-probabilities that the statistic of a label is of."""
        if not statistic.tempered:
            assert self.untempered is not None
            return self.untempered
        return self.elements.logq if statistic.student else self.elements.logp

    def _tail(self) -> Tensor:
        """Log-probabilities, -inf at the labels."""
        logq = self.elements.logq
        return torch.where(self._is_label() & ~logq.isnan(), torch.full_like(logq, -torch.inf), logq)

    def _is_label(self) -> Tensor:
        assert self.labels is not None
        hits = torch.zeros_like(self.elements.logq, dtype=torch.int32)
        return hits.scatter_add_(1, self._columns(), self._known().to(torch.int32)) > 0

    def _known(self) -> Tensor:
        """Which labels are columns: not -1, and not beyond the vocabulary."""
        assert self.labels is not None
        return (self.labels >= 0) & (self.labels < self.elements.logq.shape[1])

    def _columns(self) -> Tensor:
        assert self.labels is not None
        return self.labels.clamp(0, self.elements.logq.shape[1] - 1)

    def _sums(self, statistic: Statistic) -> tuple[tuple[Tensor, ...], Tensor | None]:
        assert statistic.value is not None
        terms = statistic.value(self.elements)
        terms = terms if isinstance(terms, tuple) else (terms,)
        log_sum = None if statistic.log_sum is None else statistic.log_sum(self.elements).logsumexp(1, keepdim=True)
        # A row with NaN stays NaN even where a formula ignores the NaN.
        reads = [self.lse_s] * statistic.student + [self.lse_t] * statistic.reference
        bad = sum(0 * lse for lse in reads)
        return tuple(term.sum(dim=1, keepdim=True) + bad for term in terms), log_sum

    def gradient(self, coefficients: Tensor, of_student: bool) -> Tensor:
        """[rows, vocab_size]: the gradient of sum(coefficients * values) with respect to one side's logits."""
        share = self.elements.q if of_student else self.elements.p
        total = torch.zeros_like(share)
        row = 0
        for statistic in self.stats:
            count = self.labels.shape[1] if statistic.per_label and self.labels is not None else 1
            c = coefficients[row : row + count].T.to(share.dtype)
            row += count
            touched = statistic.student if of_student else statistic.reference
            if touched and statistic.differentiable:
                contribution = self._gradient_of(statistic, c, share, of_student)
                total += torch.where((c == 0).all(dim=1, keepdim=True), torch.zeros_like(total), contribution)
        if self.exclude is not None:
            columns = torch.arange(total.shape[1], device=total.device)
            total = torch.where(columns == self.exclude, torch.zeros_like(total), total)
        return total / (self.temperature if of_student else self.reference_temperature)

    def _gradient_of(self, statistic: Statistic, c: Tensor, share: Tensor, of_student: bool) -> Tensor:
        if statistic.kind == "label":
            assert self.labels is not None
            c = torch.where(self.labels < 0, torch.zeros_like(c), c)
            of_column = torch.where(self._known(), c, torch.zeros_like(c))
            picked = torch.zeros_like(share).scatter_add_(1, self._columns(), of_column)
            gradient = picked - self._logs(statistic).exp() * c.sum(dim=1, keepdim=True)
            # All gradients are divided by the temperature at the end.
            return gradient if statistic.tempered else gradient * self.temperature
        if statistic.kind == "tail":
            labels, tail = self._is_label(), self._tail()
            of_labels = torch.where(labels, share, torch.zeros_like(share))
            gradient = tail.softmax(1) * of_labels.sum(dim=1, keepdim=True) - of_labels
            # A tail without mass has no gradient, and neither has the rest of its row.
            none = tail.amax(dim=1, keepdim=True) == -torch.inf
            return c * torch.where(none, torch.zeros_like(share), gradient)
        if statistic.kind == "logsumexp":
            return c * share
        elements = self.elements
        if statistic.combine is not None:
            sums, log_sum = self._sums(statistic)
            e = elements
            elements = Elements(e.logp, e.logq, e.log_ratio, e.alpha, e.beta, sums, log_sum)
        term: Term | None = statistic.grad_logq if of_student else statistic.grad_logp
        assert term is not None
        g = term(elements)
        assert isinstance(g, Tensor)
        total = g.sum(dim=1, keepdim=True) if statistic.log_sum is None else 0 * g[:, :1]
        # A column without mass takes no share of an infinite sum, which outweighs all own terms.
        taken = torch.where(share == 0, torch.zeros_like(share), share * total)
        return c * torch.where(total.isinf(), -taken, g - taken)


def _read(logits: Tensor, index: Tensor, columns: int, exclude: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows = _gather_rows(logits, index, columns).to(dtype)
    rows = torch.where(rows <= NO_MASS, torch.full_like(rows, -torch.inf), rows)
    if exclude is not None:
        ids = torch.arange(columns, device=rows.device)
        rows = torch.where(ids == exclude, torch.full_like(rows, -torch.inf), rows)
    return rows


def _log_softmax(rows: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log softmax of rows / temperature, its maximum, the sum of exponentials below that maximum, their exponents.

    The maximum goes first, before the division, and the logarithm of the sum is not rounded by itself: the error of a
    probability is then relative to its own logarithm, not to the logit or the vocabulary. NaN for a row that is -inf
    everywhere or holds +inf or NaN.
    """
    maximum = rows.amax(dim=1, keepdim=True)
    below = (rows - maximum) / temperature
    total = below.exp().sum(dim=1, keepdim=True)
    return (below.double() - total.double().log()).to(rows.dtype), maximum / temperature, total, below
