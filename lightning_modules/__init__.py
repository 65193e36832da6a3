"""Unrolled solvers, their data and their metrics, for use with `pibinn_plugin` and PyTorch Lightning."""
