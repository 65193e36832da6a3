"""Unrolled solvers as plain modules, one algorithm a file."""
