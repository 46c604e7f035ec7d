"""The kernels, the same for every statistic: a first sweep, sums of normalised terms, the gradient.

state.py    what some columns of a row amount to, and how two such states merge
row.py, rows.py    a row, and where rows are
slices.py   what a program does with a slice of a row
kernels.py  how rows are spread over programs
labels.py, label_kernels.py    many labels a row, and the columns that are none
hooks.py    what a set of statistics gives the kernels
"""
