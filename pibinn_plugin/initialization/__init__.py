"""Where training starts: latents and λ from training pairs, or from a known operator."""

from pibinn_plugin.initialization.start import (
    SOLUTIONS,
    Initialization,
    SignsFromOperator,
    SignsFromPairs,
    StartsFloatWeights,
    operator_entries,
    signs_from_operator,
    start_float_weights,
)

__all__ = [
    "SOLUTIONS",
    "Initialization",
    "SignsFromOperator",
    "SignsFromPairs",
    "StartsFloatWeights",
    "operator_entries",
    "signs_from_operator",
    "start_float_weights",
]
