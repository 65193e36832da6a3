"""Guarantees and diagnostics of a trained network, each printed with the assumptions under which it holds.

``docs/analysis.md`` says which question each function answers.
"""

from pibinn_plugin.analysis.comparison import compare_convergence, plain_ista
from pibinn_plugin.analysis.contraction import one_bit_existence, sign_adjoint_moments, spectral_contraction
from pibinn_plugin.analysis.convergence import certify, certify_constants, layer_constants
from pibinn_plugin.analysis.finite_class import required_examples, risk_bounds
from pibinn_plugin.analysis.generalization import generalization_bounds
from pibinn_plugin.analysis.geometry import compare_geometry, network_geometry
from pibinn_plugin.analysis.geometry_estimate import estimate_geometry
from pibinn_plugin.analysis.hypothesis_class import unrolled_class
from pibinn_plugin.analysis.matrix_free import constants_from_products, contraction_from_products
from pibinn_plugin.analysis.measurement import measure, measure_examples
from pibinn_plugin.analysis.plots import (
    plot_bounds,
    plot_convergence,
    plot_sign_history,
    plot_spectra,
    save_figure,
)
from pibinn_plugin.analysis.sign_history import read_sign_history
from pibinn_plugin.analysis.unrolled import Unrolled, read_solver
from pibinn_plugin.analysis.variants import weight_variants

__all__ = [
    "Unrolled",
    "certify",
    "certify_constants",
    "compare_convergence",
    "compare_geometry",
    "constants_from_products",
    "contraction_from_products",
    "estimate_geometry",
    "generalization_bounds",
    "layer_constants",
    "measure",
    "measure_examples",
    "network_geometry",
    "one_bit_existence",
    "plain_ista",
    "plot_bounds",
    "plot_convergence",
    "plot_sign_history",
    "plot_spectra",
    "read_sign_history",
    "read_solver",
    "required_examples",
    "risk_bounds",
    "save_figure",
    "sign_adjoint_moments",
    "spectral_contraction",
    "unrolled_class",
    "weight_variants",
]
