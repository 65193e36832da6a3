"""Where training starts: latents and λ from training pairs, or from a known operator."""

from pibinn_plugin.initialization.start import (
    Initialization,
    SignsFromOperator,
    SignsFromPairs,
    signs_from_operator,
    start_float_weights,
)

__all__ = ["Initialization", "SignsFromOperator", "SignsFromPairs", "signs_from_operator", "start_float_weights"]
