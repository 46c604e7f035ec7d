"""The statistics as `@triton.jit` functions: what one has (`statistic.py`), and which has which (`table.py`).

kl.py, mixtures.py, distances.py, powers.py and quadratic.py are the twins of those in `csrc/divergences/` and in
`kldiv_kernels/divergences/`: the same statistics in the same order under the same headings.
"""
