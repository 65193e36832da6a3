"""Guarantees and diagnostics of a trained network, each printed with the assumptions under which it holds.

``docs/analysis.md`` says which question each function answers.
"""
