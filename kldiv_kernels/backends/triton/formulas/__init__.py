"""The statistics as `@triton.jit` functions, and which functions a statistic has (`table.py`)."""
