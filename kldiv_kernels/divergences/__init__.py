"""The statistics that compare two rows, and those of one, each with its formula, its value and its gradients.

elements.py   what they are made of
statistic.py  what the registry has of each
kl.py, mixtures.py, distances.py, powers.py, quadratic.py   the statistics: the PyTorch twins of `csrc/divergences/`
              and of `backends/triton/formulas/`, which have the same files in the same order under the same headings
"""

from __future__ import annotations

from kldiv_kernels.divergences.distances import DISTANCES
from kldiv_kernels.divergences.elements import Elements, Term
from kldiv_kernels.divergences.kl import KL_DIVERGENCES
from kldiv_kernels.divergences.mixtures import MIXTURE_DIVERGENCES
from kldiv_kernels.divergences.powers import POWER_DIVERGENCES
from kldiv_kernels.divergences.quadratic import QUADRATIC_DIVERGENCES
from kldiv_kernels.divergences.statistic import ANY, Bound, Statistic

DIVERGENCES = (*KL_DIVERGENCES, *MIXTURE_DIVERGENCES, *DISTANCES, *POWER_DIVERGENCES, *QUADRATIC_DIVERGENCES)

__all__ = ["ANY", "DIVERGENCES", "Bound", "Elements", "Statistic", "Term"]
