"""Draw ``method.svg``: latents, their signs, the structure, and the weight that is their product.

python docs/pictures/draw_method.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from pibinn_plugin import BlockDiagonal

plt.rcParams["svg.hashsalt"] = "pibinn"
torch.manual_seed(3)
latent, mask = torch.randn(8, 16), BlockDiagonal(4).mask((8, 16))
panels = [
    ("V\nlatents, in training only", latent),
    ("sign(V)\none bit each", latent.sign()),
    ("M\nfixed by physics", mask.float()),
    ("W = λ · sign(V) ⊙ M\none λ for the network", 0.7 * latent.sign() * mask),
]
figure, axes = plt.subplots(1, 4, figsize=(11, 2.2), layout="constrained")
for axis, (title, values) in zip(axes, panels, strict=True):
    axis.imshow(values, cmap="RdBu", vmin=-2, vmax=2)
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
figure.savefig(Path(__file__).with_name("method.svg"), metadata={"Date": None})
