"""Comparisons of quantizers on one task: the same solver, data, budget and learning-rate search for every row.

From the command line ``python -m lightning_modules compare`` (`lightning_modules.compare.command`), from Python
`lightning_modules.compare.comparison.compare`.
"""
