"""
Signs from few pairs
====================

An operator of ±1 with known support and unknown signs is learned from N noisy pairs. The relaxation to a box passes
from guessing to knowing near half as many pairs as a row has unknowns; least squares needs as many pairs as unknowns.
"""

import matplotlib.pyplot as plt
import torch

from pibinn_plugin import Dense
from pibinn_plugin.initialization.sign_regression import PairStatistics, box_weights, ridge_weights

torch.manual_seed(0)
rows, unknowns = 16, 48
truth = torch.randn(rows, unknowns).sign()
pairs = range(12, 97, 6)
found = {"box": [], "least squares": []}
for count in pairs:
    right = dict.fromkeys(found, 0.0)
    for _ in range(3):
        x = torch.randn(count, unknowns)
        y = x @ truth.T + 0.3 * torch.randn(count, rows)
        statistics = PairStatistics(Dense(), (rows, unknowns))
        statistics.add(x, y)
        right["box"] += (box_weights(statistics, scale=1.0).latent.sign() == truth).float().mean().item() / 3
        right["least squares"] += (ridge_weights(statistics).sign() == truth).float().mean().item() / 3
    for name, fraction in right.items():
        found[name].append(fraction)

# %%
# The box knows that no weight is larger than λ, least squares does not.

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, fractions in found.items():
    axis.plot(list(pairs), fractions, marker="o", label=name)
axis.axvline(unknowns / 2, color="grey", linestyle=":", label="half the unknowns")
axis.set_xlabel("pairs")
axis.set_ylabel("signs that are right")
axis.legend()
