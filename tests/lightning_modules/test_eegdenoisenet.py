"""The EEG data: mixtures, splits without leaks, batches that depend on seed and epoch only, damaged files."""

import os
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from eeg_files import EEG_SUBJECTS, EOG_RECORDS, ROWS_EACH, loaded, write_index, write_small_data_set
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_modules.data.artifact_augmentation import ArtifactAugmentation
from lightning_modules.data.eegdenoisenet import EVALUATION_LEVELS_DB, EEGDenoiseNet, mix
from lightning_modules.data.files import DataFileError
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader


@pytest.fixture
def folder(tmp_path):
    write_small_data_set(tmp_path)
    return tmp_path


def batches(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def rows_of(mixtures):
    """Rows of the EEG and of the artifact file that occur in a data set."""
    return {int(value) for value in mixtures.clean[:, 0]}, {int(value) for value in mixtures.artifacts[:, 0]}


# Mixtures


def test_mixture_has_the_power_ratio_and_unit_deviation():
    random = np.random.default_rng(0)
    clean, artifact = (random.standard_normal((4, 512)).astype(np.float32) * scale for scale in (3, 50))
    snr_db = np.array([-14.0, -3.0, 0.0, 4.0], dtype=np.float32)
    y, x = (side.numpy() for side in mix(*map(torch.from_numpy, (clean, artifact, snr_db))))
    for row in range(4):
        noise = y[row] - x[row]
        assert 10 * np.log10((x[row] ** 2).sum() / (noise**2).sum()) == pytest.approx(snr_db[row], abs=1e-3)
        assert y[row].std() == pytest.approx(1, rel=1e-5)
        assert np.corrcoef(x[row], clean[row])[0, 1] == pytest.approx(1, rel=1e-6)
        assert np.corrcoef(noise, artifact[row])[0, 1] == pytest.approx(1, rel=1e-6)


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_mixture_does_not_depend_on_the_units_of_the_files(clean_unit, artifact_unit):
    clean, artifact = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    snr_db = torch.tensor([-5.0, 0.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(mix(clean_unit * clean, artifact_unit * artifact, snr_db), mix(clean, artifact, snr_db))


# Splits


def test_no_subject_or_record_is_in_two_parts(folder):
    data = loaded(folder)
    for kind, groups in ((0, EEG_SUBJECTS), (1, EOG_RECORDS)):
        rows = [rows_of(part)[kind] for part in (data.train_set, data.val_set, data.test_set)]
        owners = [{(row - 1) % groups for row in part} for part in rows]
        assert all(owners) and sum(map(len, owners)) == len(set.union(*owners)) == groups
        assert sum(map(len, rows)) == groups * ROWS_EACH
        assert owners[2] == {number for number in range(groups) if number % 5 == 0}


def test_held_out_subjects_do_not_depend_on_the_seed(folder):
    assert rows_of(loaded(folder, seed=1).val_set) == rows_of(loaded(folder, seed=2).val_set)


def test_without_index_the_parts_are_contiguous_runs(folder):
    for index in folder.glob("*.csv"):
        index.unlink()
    data = loaded(folder)
    for kind, count in ((0, EEG_SUBJECTS * ROWS_EACH), (1, EOG_RECORDS * ROWS_EACH)):
        train, val, test = (sorted(rows_of(part)[kind]) for part in (data.train_set, data.val_set, data.test_set))
        assert train + val + test == list(range(1, count + 1))
        assert len(val) == len(test) == count // 10


@pytest.mark.parametrize("part", ["val", "test"])
def test_evaluation_mixtures_are_fixed_and_even_over_the_levels(folder, part):
    first, second = (getattr(loaded(folder, seed=seed, batch_size=5), f"{part}_set") for seed in (0, 1))
    for a, b in zip(first.pairing, second.pairing, strict=True):
        assert torch.equal(a, b)
    levels, counts = first.pairing.snr_db.unique(return_counts=True)
    assert tuple(levels.tolist()) == EVALUATION_LEVELS_DB and len(counts.unique()) == 1


def test_every_test_epoch_is_seen_at_every_level(folder):
    data = loaded(folder)
    assert len(data.test_set) == 10 * len(data.test_set.clean)
    for level in EVALUATION_LEVELS_DB:
        rows = data.test_set.pairing.clean[data.test_set.pairing.snr_db == level]
        assert rows.tolist() == list(range(len(data.test_set.clean)))


# Batches


def test_batches_are_float32_pairs(folder):
    data = loaded(folder)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for y, x in loader:
            assert y.shape == x.shape and y.shape[1] == 512 and y.dtype == x.dtype == torch.float32
            assert torch.isfinite(y).all() and torch.isfinite(x).all()


def test_one_example_equals_its_row_in_a_batch(folder):
    data = loaded(folder)
    y, x = data.train_set.__getitems__([100, 101])
    assert torch.equal(data.train_set[101][0], y[1]) and torch.equal(data.train_set[101][1], x[1])
    torch.testing.assert_close(data.val_set[3], tuple(side[1] for side in data.val_set.__getitems__([2, 3])))


def test_training_draws_depend_on_seed_and_epoch_only(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    data = loaded(folder, seed=3)
    first = batches(data, epoch=5)
    batches(data, epoch=0)
    torch.manual_seed(1)
    np.random.seed(1)
    for other in (batches(data, epoch=5), batches(loaded(folder, seed=3), epoch=5)):
        assert all(torch.equal(a, b) for p, q in zip(first, other, strict=True) for a, b in zip(p, q, strict=True))
    assert not torch.equal(first[0][0], batches(data, epoch=6)[0][0])
    assert not torch.equal(first[0][0], batches(loaded(folder, seed=4), epoch=5)[0][0])


def test_loading_leaves_the_global_random_state_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(loaded(folder), epoch=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_holds_every_training_epoch_once_with_snr_in_range(folder):
    data = loaded(folder, snr_range_db=(-2.0, 3.0))
    pairing = data.train_set.pairing(7)
    assert sorted(pairing.clean.tolist()) == list(range(len(data.train_set)))
    assert pairing.snr_db.min() >= -2 and pairing.snr_db.max() <= 3 and pairing.snr_db.max() - pairing.snr_db.min() > 4


def batches_of_rank(data, epoch, ranks, rank):
    sampler = EpochSampler(len(data.train_set), ranks, rank)
    sampler.set_epoch(epoch)
    return list(ResumableLoader(data.train_set, data.batch_size, sampler))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_see_the_batches_of_one_rank(folder, ranks):
    whole = batches(loaded(folder, batch_size=4 * ranks), epoch=2)
    data = loaded(folder, batch_size=4)
    parts = [batches_of_rank(data, 2, ranks, rank) for rank in range(ranks)]
    assert [len(part) for part in parts] == [len(whole)] * ranks
    for step, (y, x) in enumerate(whole):
        # The ranks take turns: example i of the whole batch is with rank i modulo the number of ranks.
        for rank in range(ranks):
            assert torch.equal(parts[rank][step][0], y[rank::ranks])
            assert torch.equal(parts[rank][step][1], x[rank::ranks])


def test_a_source_is_held_out_whole_for_validation(folder):
    """But for its recordings that are for test, which stay there."""
    records = [
        {"record": row % EOG_RECORDS, "source": "Here" if row % EOG_RECORDS < 6 else " there"} for row in range(60)
    ]
    rows = [record | {"split": "train" if record["record"] % 5 else "test"} for record in records]
    write_index(folder / "EOG_index.csv", rows)
    data, usual = loaded(folder, val_source="there"), loaded(folder)
    parts = {name: rows_of(getattr(data, f"{name}_set"))[1] for name in ("train", "val", "test")}
    records_of = {name: {(row - 1) % EOG_RECORDS for row in part} for name, part in parts.items()}
    assert records_of == {"train": {1, 2, 3, 4}, "val": {6, 7, 8, 9}, "test": {0, 5}}
    assert rows_of(data.train_set)[0] == rows_of(usual.train_set)[0]  # the EEG is split as ever


@pytest.mark.parametrize("index", ["with another source", "without sources", "absent"])
def test_a_source_that_is_not_there_is_an_error(folder, index):
    path = folder / "EOG_index.csv"
    if index == "absent":
        path.unlink()
    elif index == "without sources":
        path.write_text(path.read_text().replace("source", "laboratory"))
    with pytest.raises(DataFileError, match="val_source"):
        loaded(folder, val_source="elsewhere")


def test_an_augmentation_distorts_training_artifacts_only_and_afresh_each_epoch(folder):
    plain, augmented = loaded(folder), loaded(folder, augmentation=ArtifactAugmentation())
    for epoch in (0, 3):
        for (y, x), (other, clean) in zip(batches(plain, epoch), batches(augmented, epoch), strict=True):
            # The same EEG at the same level, with another artifact.
            powers = [((a - b).square().sum(1) / b.square().sum(1)) for a, b in ((y, x), (other, clean))]
            torch.testing.assert_close(*powers, rtol=1e-3, atol=0)
            assert not torch.allclose(y, other, atol=0.1)
    assert not torch.equal(augmented.train_set.distortions(0).floor, augmented.train_set.distortions(3).floor)
    for name in ("val_set", "test_set"):
        for index in (0, 5):
            assert torch.equal(getattr(plain, name)[index][0], getattr(augmented, name)[index][0])


def test_an_augmented_batch_depends_on_its_rows_alone(folder):
    data = loaded(folder, augmentation=ArtifactAugmentation(), batch_size=6).train_set
    together, first = data.__getitems__([len(data) + 2, len(data) + 4]), data[len(data) + 4]
    torch.testing.assert_close(together[0][1], first[0])
    again = loaded(folder, augmentation=ArtifactAugmentation(), batch_size=6).train_set
    assert torch.equal(again.__getitems__([len(data) + 2, len(data) + 4])[0], together[0])


class Recorder(pl.LightningModule):
    """A model that remembers a sum of every batch, and stops at one by an error."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.zeros(1))
        self.seen = {}
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        y, x = batch
        self.seen[self.global_step] = (self.current_epoch, y.double().sum().item(), x.double().sum().item())
        return (self.gain * y - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, root, stop_at=None, ckpt_path=None, **arguments):
    model = Recorder(stop_at)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(root, save_top_k=-1, filename="{step}", **arguments)],
    )
    try:
        trainer.fit(model, datamodule=EEGDenoiseNet(folder, batch_size=8, seed=1), ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert stop_at is not None
    return model.seen


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 1}])
def test_a_killed_run_resumes_with_the_same_batches(folder, tmp_path, every):
    whole = fit(folder, tmp_path / "whole", **every)
    per_epoch = len(whole) // 3
    assert len(set(whole.values())) == len(whole)
    for stop_at in (per_epoch + 2, 2 * per_epoch):
        root = tmp_path / f"killed{stop_at}"
        killed = fit(folder, root, stop_at=stop_at, **every)
        last = max(root.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
        resumed = fit(folder, root / "resumed", ckpt_path=last, **every)
        assert max(resumed) == max(whole) and {**killed, **resumed} == whole
        assert all(whole[step] == batch for step, batch in resumed.items())


# Arguments


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"artifact": "ECG"}, "ECG"),
        ({"snr_range_db": (4.0, -14.0)}, r"\(4.0, -14.0\)"),
        ({"snr_range_db": (-14.0, 4.0, 8.0)}, r"\(-14.0, 4.0, 8.0\)"),
        ({"snr_range_db": (float("nan"), 4.0)}, "nan"),
        ({"snr_range_db": (0.0, float("inf"))}, "inf"),
        ({"val_fraction": 0.0}, "0.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_unfit_arguments_are_refused_and_named(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        EEGDenoiseNet(tmp_path, **arguments)


def test_a_batch_larger_than_the_data_is_refused(folder):
    with pytest.raises(ValueError, match="lower batch_size"):
        loaded(folder, batch_size=1000).train_dataloader()


# Real data


def real_folder():
    root = Path(__file__).resolve().parents[2]
    return Path(os.environ.get("PIBINN_DATA", root.parent / "shared" / "data")) / "eeg"


@pytest.mark.skipif(
    not (real_folder() / "EEG_all_epochs.npy").is_file(),
    reason="no EEG_all_epochs.npy in $PIBINN_DATA/eeg nor in ../shared/data/eeg",
)
def test_real_data():
    data = EEGDenoiseNet(real_folder())
    data.setup()
    assert len(data.test_set) == 15_000
    y, x = data.test_set.__getitems__(range(0, 15_000, 10))
    identity = ((y - x).square().mean(1) / x.square().mean(1)).sqrt()
    assert identity.mean().item() == pytest.approx(np.mean([10 ** (-level / 20) for level in EVALUATION_LEVELS_DB]))
