"""Whatever a user gives is used, or refused: plausible mistakes that would end in a plausible, wrong result."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_modules.analysis.examples import held_out_groups
from lightning_modules.analysis.sign_history import read_sign_history
from lightning_modules.compare.comparison import compare
from lightning_modules.compare.rows import Row, read_rows
from lightning_modules.compare.storage import load_baseline, stored_size
from lightning_modules.data.bsds500 import BSDS500
from lightning_modules.data.eegdenoisenet import EEGDenoiseNet
from lightning_modules.data.files import DataFileError, read_index
from lightning_modules.data.resumable_loader import EpochSampler, ResumableLoader
from lightning_modules.data.sparse_recovery import SparseRecovery
from lightning_modules.metrics import NMSE, nmse_db, rrmse_temporal
from lightning_modules.modules import SolverModule
from lightning_modules.operators import BlockOperator, FlattenedPhysics, GaussianBlocks, SignBlocks
from lightning_modules.pattern_calibration import block_pairs
from lightning_modules.pictures import SignalPictures
from pibinn_plugin import ArtifactError, PIBiNNError

# Batches


def trainer(tmp_path):
    return pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip


def with_one(value, shape=(8, 4)):
    values = torch.ones(shape)
    values[5, 1] = value
    return values


BATCHES = {
    "NaN in y": (with_one(float("nan")), torch.ones(8, 3), "y of a batch holds NaN"),
    "infinity in x": (torch.ones(8, 4), with_one(float("inf"), (8, 3)), "x of a batch holds NaN"),
    "x that a loss would broadcast": (torch.ones(8, 4), torch.ones(8, 1), r"\(4, 3\), but x has shape \(4, 1\)"),
    "x with an axis too many": (torch.ones(8, 4), torch.ones(8, 1, 3), r"x has shape \(4, 1, 3\)"),
}


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_train_to_nothing_are_refused(name, verb, tmp_path):
    y, x, words = BATCHES[name]
    loader = DataLoader(TensorDataset(y, x), batch_size=4)
    with pytest.raises(MisconfigurationException, match=words):
        getattr(trainer(tmp_path), verb)(SolverModule(nn.Linear(4, 3), metrics=[NMSE()]), loader)


def test_a_batch_is_a_pair(tmp_path):
    loader = DataLoader(torch.ones(8, 4), batch_size=4)
    with pytest.raises(MisconfigurationException, match="expected a pair"):
        trainer(tmp_path).fit(SolverModule(nn.Linear(4, 4)), loader)


@pytest.mark.parametrize("metric", [nmse_db, rrmse_temporal])
def test_metrics_of_complex_signals_are_refused(metric):
    signal = torch.ones(2, 4, dtype=torch.complex64)
    for pair in ((signal, signal), (signal.real, signal), (signal, signal.real)):
        with pytest.raises(ValueError, match="must be real"):
            metric(*pair)


# A position within an epoch


class Indices(Dataset):
    def __getitems__(self, indices):
        return indices


def loader_of(length=24, batch_size=4, ranks=1):
    return ResumableLoader(Indices(), batch_size, EpochSampler(length, ranks, 0))


@pytest.mark.parametrize("other", [{"batch_size": 2}, {"batch_size": 8}, {"ranks": 2}, {"length": 48}])
@pytest.mark.parametrize("batches", [0, 1, 5])
def test_a_position_in_batches_of_another_size_is_refused(other, batches):
    first = loader_of()
    reader = iter(first)
    for _ in range(batches):
        next(reader)
    second = loader_of(**other)
    second.load_state_dict({**first.state_dict(), "epoch": 0})
    if batches:
        with pytest.raises(MisconfigurationException, match="resume with as many"):
            next(iter(second))
    else:
        assert next(iter(second))[0] == 0


@pytest.mark.parametrize("other", [{}, {"batch_size": 2, "ranks": 2}])
def test_a_position_is_that_of_all_ranks_together(other):
    first = loader_of()
    reader = iter(first)
    next(reader)
    second = loader_of(**other)
    second.load_state_dict(first.state_dict())
    assert next(iter(second))[0] == next(reader)[0]


def test_in_another_epoch_the_position_does_not_matter():
    second = loader_of(batch_size=2)
    second.load_state_dict({"epoch": 3, "batches": 2, "examples_a_step": 4, "examples_an_epoch": 24})
    assert next(iter(second)) == [0, 1]


# Data and operators


@pytest.mark.parametrize("blocks", [torch.ones(0, 2, 2), torch.ones(2, 0, 2), torch.ones(2, 2, 0)])
def test_an_empty_operator_is_refused(blocks):
    with pytest.raises(ValueError, match="none of these 0"):
        BlockOperator(blocks)


@pytest.mark.parametrize("kind", [GaussianBlocks, SignBlocks])
@pytest.mark.parametrize("sizes", [(0, 2, 2), (2, 0, 2), (2, 2, 0), (-1, 2, 2)])
def test_sizes_of_blocks_are_positive(kind, sizes):
    with pytest.raises(ValueError, match="at least 1 of each"):
        kind(*sizes)


class Physics(nn.Module):
    """An operator on rows of 4 with what a user may get wrong."""

    shape = (4, 4)

    def __init__(self, offset=0.0, gain=1.0, keep=4):
        super().__init__()
        self.offset, self.gain, self.keep = offset, gain, keep

    def A(self, x):
        return (self.gain * x + self.offset)[..., : self.keep]

    A_adjoint = A


def test_physics_with_an_offset_is_refused():
    assert FlattenedPhysics(Physics(), (4,)).shape == (4, 4)
    with pytest.raises(ValueError, match="not linear"):
        FlattenedPhysics(Physics(offset=1.0), (4,))


@pytest.mark.parametrize(
    ("physics", "arguments"),
    [
        (Physics(keep=1), {}),  # noise would broadcast it to four measurements
        (Physics(gain=0.0), {}),
        (Physics(gain=float("nan")), {}),
        (Physics(), {"sparsity": 1e-12}),  # a percentage of a percentage: no signal at all
    ],
)
def test_an_operator_without_measurements_is_refused(physics, arguments):
    assert SparseRecovery(Physics(), **{"sparsity": 0.5}).noise_deviation > 0
    with pytest.raises(ValueError, match=r"expected \(\d+, 4\), finite and not zero"):
        SparseRecovery(physics, **arguments)


def test_more_calibration_patches_than_an_epoch_has_are_refused(tmp_path):
    BSDS500(tmp_path, train_patches=8, calibration_patches=8)
    with pytest.raises(ValueError, match="some would never be seen"):
        BSDS500(tmp_path, train_patches=8, calibration_patches=9)


@pytest.mark.parametrize(
    ("y_shape", "x_shape"),
    [
        ((2, 3, 4, 4), (2, 1, 16, 17)),
        ((2, 3, 4, 4), (2, 1, 8, 16)),  # blocks of two heights
        ((2, 3, 4, 4), (2, 3, 16, 16)),
        ((2, 3, 4, 4), (1, 1, 16, 16)),
        ((2, 3, 4, 4), (2, 1, 2, 2)),
        ((2, 3, 4), (2, 1, 16, 16)),
    ],
)
def test_blocks_of_other_images_are_refused(y_shape, x_shape):
    with pytest.raises(ValueError, match="they must be"):
        block_pairs(torch.zeros(y_shape), torch.zeros(x_shape))


def test_one_subject_written_in_several_ways_is_one_group(tmp_path):
    import numpy as np

    rows = [f"S{number // 4},train" for number in range(40)]
    tests = ["anna,test", " Anna ,test", "01,test", "1.0,test", "1,test", "ANNA,test"]
    epochs = np.random.default_rng(0).standard_normal((len(rows) + len(tests), 512), dtype=np.float32)
    for kind in ("EEG", "EOG"):
        np.save(tmp_path / f"{kind}_all_epochs.npy", epochs)
    (tmp_path / "EEG_index.csv").write_text("\n".join(["subject,split", *rows, *tests]))
    data = EEGDenoiseNet(tmp_path, batch_size=4)
    data.setup()
    groups, _ = held_out_groups(data)
    assert groups.unique().tolist() == [0, 1]
    assert groups[:6].tolist() == [0, 0, 1, 1, 1, 0]


# Comparisons, logs and pictures


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": (0, 1, 0)}, "seeds 0"),
        ({"learning_rates": (1e-3, 0.001)}, r"learning rates 0\.001"),
        ({"rows": (Row("a", "fp32"), Row("a", "global"))}, "rows a"),
    ],
)
def test_what_is_compared_with_itself_is_refused(arguments, words, tmp_path):
    settings = {"rows": (Row("a", "fp32"),), "folder": tmp_path / "runs", **arguments}
    with pytest.raises(MisconfigurationException, match=f"{words} are given more than once"):
        compare(["--config", "no.yaml"], **settings)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {quantizer: fp32}\na: {quantizer: global}\n", "'a' is given again in line 2"),
        ("a:\n  quantizer: fp32\n  overrides: {x: 1, x: 2}\n", "'x' is given again in line 3"),
        ("a: {quantizer: [}\n", "is no YAML"),
    ],
)
def test_a_file_of_rows_has_each_key_once(text, words, tmp_path):
    path = tmp_path / "rows.yaml"
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=words) as caught:
        read_rows([str(path)])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("stage", ["-1", "3", "0.5", "nan"])
def test_an_unknown_stage_of_a_log_is_refused(stage, tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text(f"epoch,qat/flipped,qat/scale,qat/stage\n0,0.25,0.1,{stage}\n")
    with pytest.raises(PIBiNNError, match="no log of TwoStageQAT"):
        read_sign_history(log)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sampling_rate_is_positive_and_finite(rate):
    with pytest.raises(MisconfigurationException, match="positive and finite"):
        SignalPictures(sampling_rate=rate)


def test_fewer_pictures_than_asked_for_are_said(tmp_path, capsys):
    loader = DataLoader(TensorDataset(torch.rand(6, 8), torch.rand(6, 8)), batch_size=3)
    run = pl.Trainer(
        callbacks=[SignalPictures(count=5)], logger=False, accelerator="cpu", default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    run.test(SolverModule(nn.Linear(8, 8)), loader, verbose=False)
    assert "signals.png shows 2 examples, not 5" in capsys.readouterr().out


def test_an_error_of_a_data_file_is_one_line_of_bounded_length(tmp_path):
    index = tmp_path / "EEG_index.csv"
    index.write_text('subject,split\na,"' + "train\n" * 10**5 + '"\n')
    with pytest.raises(DataFileError) as caught:
        read_index(index, 1)
    message = str(caught.value)
    assert message.startswith(str(index))
    assert message.endswith("contiguous runs.")
    assert len(message) <= 1000
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("header", ["[" * 10**5, "3", "[]", "{}", '{"layers": 3}', '{"layers": [3]}', "NaN"])
@pytest.mark.parametrize("read", [stored_size, lambda path: load_baseline(path, nn.Linear(2, 2))])
def test_a_packed_file_of_another_header_is_refused(header, read, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"baseline": header})
    with pytest.raises(ArtifactError) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
