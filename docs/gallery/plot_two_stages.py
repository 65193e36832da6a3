"""
What two stages do
==================

A small regression with one-bit weights: λ, the fraction of signs that flip in an epoch, and the loss. In the last
quarter the signs are frozen, and λ and the float parameters settle.
"""

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pibinn_plugin as pb

torch.manual_seed(0)
torch.set_num_threads(1)
operator = torch.block_diag(*(torch.randn(8, 16).sign() for _ in range(4)))
x = torch.randn(512, 64)
y = x @ operator.T + torch.randn(512, 32)


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


class History(pl.Callback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


# %%
# Training
# --------
# One callback quantizes the layer, changes the stages and logs.

history = History()
trainer = pl.Trainer(
    max_epochs=40,
    callbacks=[pb.TwoStageQAT({"layer.weight": pb.BlockDiagonal(4)}, scale_stage_start=0.75), history],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
module = Regression()
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))

# %%
# What was logged
# ---------------

figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
for axis, name in zip(axes, ("qat/scale", "qat/flipped", "loss"), strict=True):
    axis.plot([epoch.get(name, float("nan")) for epoch in history.epochs])
    axis.axvline(30, color="grey", linestyle=":")
    axis.set_title(name)
    axis.set_xlabel("epoch")

found = module.layer.weight.detach().sign() == operator.sign()
print(f"signs found: {found[operator != 0].float().mean():.3f}")
