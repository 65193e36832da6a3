"""
Structures of physics
=====================

Where the operator of an inverse problem is nonzero, and in how many bytes that is written down.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt

import pibinn_plugin as pb
from lightning_modules.operators import SignBlocks


def blur(x):
    return (x.roll(1, -1) + x + x.roll(-1, -1)) / 3


def keep_every_third(x):
    return x[:, ::3]


def differences(x):
    return x[:, 1:] - x[:, :-1]


operators = {
    "circular blur": (blur, (48, 48)),
    "subsampling": (keep_every_third, (16, 48)),
    "differences": (differences, (47, 48)),
    "coded blocks": (SignBlocks(blocks=4, rows=6, columns=12).A, (24, 48)),
}

# %%
# The support is read off the operator by its action alone.

figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
for axis, (name, (operator, shape)) in zip(axes, operators.items(), strict=True):
    structure = pb.structure_from_operator(SimpleNamespace(A=operator), columns=shape[1])
    axis.spy(structure.mask(shape))
    nonzeros, rule = structure.nnz(shape), len(structure.to_bytes())
    axis.set_title(f"{name}\n{type(structure).__name__}, {nonzeros} bits, rule {rule} bytes", fontsize=8)
    print(f"{name}: {structure if rule < 60 else type(structure).__name__}")
