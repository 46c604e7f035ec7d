"""Which `@triton.jit` functions compute a statistic."""

from __future__ import annotations

from kldiv_kernels.backends.triton.device import state
from kldiv_kernels.backends.triton.formulas.distances import DISTANCES
from kldiv_kernels.backends.triton.formulas.kl import KL_DIVERGENCES
from kldiv_kernels.backends.triton.formulas.mixtures import MIXTURE_DIVERGENCES
from kldiv_kernels.backends.triton.formulas.powers import POWER_DIVERGENCES
from kldiv_kernels.backends.triton.formulas.quadratic import QUADRATIC_DIVERGENCES
from kldiv_kernels.backends.triton.formulas.statistic import TWO, TritonStatistic

# Statistics that are no divergences have no functions: the kernels know log-probabilities, tails, logsumexp and maxima.
TABLE: dict[str, TritonStatistic] = {
    "logprob": TritonStatistic(),
    "reference_logprob": TritonStatistic(takes=TWO),
    "untempered_logprob": TritonStatistic(takes=state.UNTEMPERED.value),
    "tail_logprob": TritonStatistic(takes=state.TAIL.value),
    "logsumexp": TritonStatistic(),
    "max_logprob": TritonStatistic(takes=state.ARGMAX.value),
    "argmax": TritonStatistic(takes=state.ARGMAX.value),
    **KL_DIVERGENCES,
    **MIXTURE_DIVERGENCES,
    **DISTANCES,
    **POWER_DIVERGENCES,
    **QUADRATIC_DIVERGENCES,
}
