"""A small network, and trainings of it with TwoStageQAT, for tests and for the scripts that they start."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from train_and_die import Experiment

from pibinn_plugin import BlockDiagonal, TwoStageQAT
from pibinn_plugin.nn import BlockDiagonalLinear

TARGETS = {"layers.0.weight": BlockDiagonal(2), "layers.2.weight": None, "layers.4.weight": None}
EPOCHS = 6


class SmallModule(pl.LightningModule):
    """A masked, a compact and a dense layer; float parameters beside the weights; 16 samples, without chance."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(8, 8), nn.Tanh(), BlockDiagonalLinear(8, 8, 2), nn.Tanh(), nn.Linear(8, 4, bias=False)
        )
        self.gain = nn.Parameter(torch.ones(1))
        self.optimizer = optimizer
        self.double()

    def forward(self, x):
        return self.gain * self.layers(x)

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.05)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)
        return torch.optim.Adam(parameters, lr=0.05, weight_decay=0.05)

    def loader(self, seed):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        data = TensorDataset(x, x[:, :4] - x[:, 4:])
        # Rank r takes samples r, r + ranks, ...: a batch of all ranks together is that of one rank alone.
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=8 // self.trainer.world_size, sampler=sampler)

    def train_dataloader(self):
        return self.loader(1)

    def val_dataloader(self):
        return self.loader(2)

    test_dataloader = val_dataloader


class ManualModule(SmallModule):
    """Steps each optimizer in each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        gain, *others = self.parameters()
        return [torch.optim.Adam([gain], lr=0.05), torch.optim.Adam(others, lr=0.05, weight_decay=0.05)]


class ShardedModule(SmallModule):
    """FSDP2, layer by layer and at the root."""

    shard_layers = shard_root = True

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if any(isinstance(module, FSDPModule) for module in self.modules()):
            return  # a second run of the same module

        mesh = self.device_mesh["data_parallel"]
        for index in (0, 2, 4) if self.shard_layers else ():
            fully_shard(self.layers[index], mesh=mesh)
        if self.shard_root:
            fully_shard(self, mesh=mesh)


class RootShardedModule(ShardedModule):
    """One group of parameters, which stay whole after a validation."""

    shard_layers = False


class HalfShardedModule(ShardedModule):
    """Forgets the root, and with it λ."""

    shard_root = False


def callback(scheme: str = "native", sign_stage_start: int | float = 2, scale_stage_start: int | float = 4):
    return TwoStageQAT(TARGETS, scheme, sign_stage_start, scale_stage_start)


class NoisyModule(SmallModule):
    """Draws its batches and adds noise to its loss, and switches stages inside an epoch."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss((x + 0.1 * torch.randn_like(x), y))

    def train_dataloader(self):
        return DataLoader(super().train_dataloader().dataset, batch_size=8, shuffle=True)


def noisy() -> Experiment:
    """Of 12 steps: 3 of warm-up, 5 of stage 1, 4 of stage 2."""
    return Experiment(NoisyModule(), {"max_epochs": EPOCHS}, [callback("torchao", 0.25, 0.6)])
