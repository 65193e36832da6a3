"""A start from the batches of a stream without an end: as many are read as are trained on."""

import itertools

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pibinn_plugin import TwoStageQAT

MOST = 50


class Stream(IterableDataset):
    def __iter__(self):
        return (torch.full((4,), float(number)) for number in itertools.count())


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def training_step(self, batch, _):
        return self.linear(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class CountsBatches:
    """An initialization that reads what it is given, and no more than `MOST` of it."""

    weights = "*"

    def __init__(self):
        self.seen = 0

    def __call__(self, model, batches, sum_over_ranks=None):
        self.seen = sum(1 for _ in itertools.islice(batches, MOST))


@pytest.mark.parametrize(
    ("limits", "expected"), [({"max_steps": 3}, 3), ({"max_epochs": 1, "limit_train_batches": 5}, 5)]
)
def test_a_stream_is_read_as_far_as_it_is_trained_on(limits, expected, tmp_path):
    counts = CountsBatches()
    callback = TwoStageQAT({"linear.weight": None}, scale_stage_start=1.0, initialization=counts)
    trainer = Trainer(
        callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path, **limits,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Stream(), batch_size=2))
    assert counts.seen == expected
