"""Generated data: statistics, reproducibility, and the same batches on one rank and on two."""

import pytest
import torch

from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.data.sparse_recovery import SparseRecovery, _ExamplesByEpoch
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
    one = list(ResumableLoader(_ExamplesByEpoch(data, 64), 32, EpochSampler(64)))
    two = [list(ResumableLoader(_ExamplesByEpoch(data, 64), 16, EpochSampler(64, 2, rank))) for rank in range(2)]
    for joined, first, second in zip(one, *two, strict=True):
        assert torch.equal(joined[0][0::2], first[0])
        assert torch.equal(joined[0][1::2], second[0])


def test_evaluation_examples_do_not_depend_on_the_training_seed():
    first, second = make(seed=1), make(seed=2)
    first.setup()
    second.setup()
    assert torch.equal(first.test_set.tensors[0], second.test_set.tensors[0])
    assert not torch.equal(first.test_set.tensors[0], first.val_set.tensors[0])


def test_with_fixed_pairs_an_epoch_goes_through_all_of_them_in_another_order_each_time():
    data = make(training_pairs=24, train_examples=48, batch_size=8)
    pairs = {tuple(y.tolist()): x for y, x in zip(*data.fixed_pairs(), strict=True)}
    assert len(pairs) == 24
    orders = []
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        seen = [(tuple(y.tolist()), x) for batch in batches for y, x in zip(*batch, strict=True)]
        assert all(torch.equal(pairs[y], x) for y, x in seen)
        assert {y for y, _ in seen[:24]} == {y for y, _ in seen[24:]} == pairs.keys()
        orders.extend([[y for y, _ in seen[:24]], [y for y, _ in seen[24:]]])
    assert len({tuple(order) for order in orders}) == 4
    other = make(training_pairs=24, seed=1).fixed_pairs()
    assert not torch.equal(other[0], data.fixed_pairs()[0])


def test_fixed_pairs_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="training_pairs is None"):
        make().fixed_pairs()


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 0.0},
        {"sparsity": float("nan")},
        {"snr_db": float("nan")},
        {"snr_db": float("-inf")},
        {"batch_size": 0},
        {"seed": -1},
        {"training_pairs": 0},
        {"training_pairs": 65},
    ],
)
def test_arguments_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}(=| is ){next(iter(wrong.values()))}"):
        make(**wrong)


def test_a_batch_larger_than_the_epoch_is_refused():
    with pytest.raises(ValueError, match="lower batch_size"):
        make(batch_size=128).train_dataloader()
