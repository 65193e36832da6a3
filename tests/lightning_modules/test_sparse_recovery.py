"""Generated data: statistics, reproducibility, and the same batches on one rank and on two."""

import pytest
import torch

from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.data.sparse_recovery import SparseRecovery, _FreshExamples
from lightning_modules.operators import SignBlocks


def make(**kwargs):
    return SparseRecovery(SignBlocks(2, 8, 16), **{"train_examples": 64, "batch_size": 16, **kwargs})


def test_sparsity_and_noise_are_what_was_asked_for():
    data = make(sparsity=0.2, snr_db=10.0)
    y, x = data.draw(20_000, seed=5)
    assert (x != 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    signal = data.operator.A(x)
    ratio = 10 * torch.log10(signal.square().mean() / (y - signal).square().mean())
    assert ratio.item() == pytest.approx(10.0, abs=0.2)


def test_epochs_differ_and_come_from_the_seed_alone():
    def epoch(seed, number):
        loader = make(seed=seed).train_dataloader()
        loader.sampler.set_epoch(number)
        torch.randn(7)  # the global random state plays no part
        return torch.cat([y for y, _ in loader])

    assert torch.equal(epoch(1, 3), epoch(1, 3))
    assert not torch.equal(epoch(1, 3), epoch(1, 4))
    assert not torch.equal(epoch(1, 3), epoch(2, 3))


def test_two_ranks_see_the_joined_batch_of_one():
    data = make()
    one = list(ResumableLoader(_FreshExamples(data, 64), 32, EpochSampler(64)))
    two = [list(ResumableLoader(_FreshExamples(data, 64), 16, EpochSampler(64, 2, rank))) for rank in range(2)]
    for joined, first, second in zip(one, *two, strict=True):
        assert torch.equal(joined[0][0::2], first[0])
        assert torch.equal(joined[0][1::2], second[0])


def test_evaluation_examples_do_not_depend_on_the_training_seed():
    first, second = make(seed=1), make(seed=2)
    first.setup()
    second.setup()
    assert torch.equal(first.test_set.tensors[0], second.test_set.tensors[0])
    assert not torch.equal(first.test_set.tensors[0], first.val_set.tensors[0])


@pytest.mark.parametrize("wrong", [{"sparsity": 0.0}, {"batch_size": 0}, {"seed": -1}])
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}(=| is ){next(iter(wrong.values()))}"):
        make(**wrong)


def test_a_batch_larger_than_the_epoch_is_refused():
    with pytest.raises(ValueError, match="lower batch_size"):
        make(batch_size=128).train_dataloader()
