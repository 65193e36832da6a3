"""Training runs that may be killed at any moment and resumed bit for bit.

Lightning's checkpoint holds the weights, the optimizers and the loops, and resumes from them. Two things are missing
for a resumed run to equal, to the last bit, the run that was never stopped:

* **The file must be whole.** :class:`AtomicCheckpointIO` writes beside the target, forces the bytes to disk and
  renames. Whatever moment the process is killed at, a checkpoint's name stands for a complete checkpoint, the old or
  the new one.
* **Chance must continue.** :class:`RandomState` keeps the state of the random number generators in the checkpoint and
  puts it back where the interrupted run would have gone on drawing.

Use both, and resume with ``ckpt_path="last"``, which starts from scratch where there is no checkpoint yet::

    trainer = Trainer(
        plugins=[AtomicCheckpointIO()],
        callbacks=[RandomState(), ModelCheckpoint(dirpath="runs/1", save_last=True)],
    )
    trainer.fit(module, datamodule, ckpt_path="last")

What has to hold besides: the same command (seed, data, number of ranks and of loader workers), checkpoints at the ends
of epochs or after their validation, ``save_last=True`` rather than ``"link"`` (Lightning moves that link in two steps),
no ``reload_dataloaders_every_n_epochs``, and no random draws inside *persistent* loader workers, which keep a generator
of their own that no checkpoint sees. After validation Lightning has not yet averaged the epoch's training metrics, and
does not store them: prefer checkpoints at the ends of epochs, ``ModelCheckpoint``'s default.
"""

import os
import random
from pathlib import Path
from typing import Any

import numpy
import pytorch_lightning as pl
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import distributed
from typing_extensions import override

from pibinn_plugin.storage.atomic_file import atomic_file

__all__ = ["AtomicCheckpointIO", "RandomState", "read_checkpoint"]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint on the CPU, without pickle.

    Raises:
        MisconfigurationException: the file is not one, or damaged.
        OSError: it cannot be opened.
    """
    with Path(path).open("rb"):
        pass  # what the system refuses is said by the system
    try:
        checkpoint = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # of a zip file, of a pickle, of the system: whatever torch meets in foreign bytes
        raise MisconfigurationException(
            f"{path} is no checkpoint of a training run, or a damaged one ({type(error).__name__} in torch.load)"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise MisconfigurationException(f"{path} is no checkpoint of a training run: it holds no state_dict")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that none is ever seen half-written, not even after a power failure.

    Lightning's own ``TorchCheckpointIO`` writes to the system's temporary directory and moves the file from there,
    which is a copy, and not atomic, wherever that directory is another file system. Here the bytes go to a hidden file
    next to the target, reach the disk, and get the target's name in one step. That file's name depends on the target
    only: one left by a killed run is overwritten, and renamed, when the resumed run writes that checkpoint again.

    Paths that are not local (object stores) are written by ``TorchCheckpointIO``: their stores replace whole objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "last.ckpt"
        >>> checkpoint_io = AtomicCheckpointIO()
        >>> checkpoint_io.save_checkpoint({"epoch": 3}, path)
        >>> checkpoint_io.load_checkpoint(path)
        {'epoch': 3}
        >>> [file.name for file in path.parent.iterdir()]
        ['last.ckpt']
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes a checkpoint; the file at ``path`` is replaced when the new one is complete, and untouched until then.

        Args:
            checkpoint: What to write.
            path: Where to. Missing directories are made.
            storage_options: Not supported, as in ``TorchCheckpointIO``.

        Raises:
            TypeError: ``storage_options`` is given.
            OSError: The file system refused (no space, no permission). The previous checkpoint is still there.
        """
        filesystem, filesystem_path = url_to_fs(str(path))
        if storage_options is not None or not isinstance(filesystem, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(filesystem_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The partial file does not end in .ckpt: ModelCheckpoint looks for the last checkpoint by prefix and ending.
        with atomic_file(target) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        _synchronize_directory(target.parent)


class RandomState(pl.Callback):
    """Keeps the state of Python's, NumPy's and torch's random number generators in the checkpoint.

    Each rank's state is kept, with that of its CUDA device where it has one, and each rank gets its own back. The state
    is stored as plain tensors and numbers, so the checkpoint loads with ``weights_only=True``.

    Put it first among the callbacks, so that what others draw when an epoch starts is drawn from the restored state.

    When it is restored matters. A fresh process draws on its way to the first resumed step: it builds the model and the
    data, ``FitLoop.setup_data`` makes a loader iterator, which draws the seed of the loader's workers, and hooks up to
    ``on_train_start`` may draw. The uninterrupted run drew none of this between the checkpoint and what followed. So
    the state is put back after all of it, in the hook with which the interrupted run would have gone on:

    * A checkpoint written in ``on_train_epoch_end`` resumes with a new epoch: in ``on_train_epoch_start``. The iterator
      made by ``setup_data`` came of other numbers; the epoch loop, told that it is not resuming, makes its own after
      that hook, as in every later epoch. (Under ``max_steps`` Lightning closes the old epoch once more, then does so.)
    * A checkpoint written after validation resumes inside the finished epoch, which Lightning closes without a
      further step: in ``on_train_epoch_end``. The next epoch makes its own iterator anyway.
    * A checkpoint written between two steps resumes with a step: in ``on_train_batch_start``. The rest of that epoch
      repeats only if the loader has a ``state_dict`` of its own that holds its position, which torch's has not. The
      position is given back in ``on_train_start``, also where Lightning forgets it.

    Example:
        >>> callback = RandomState()
        >>> state = callback.state_dict()
        >>> sorted(state["ranks"][0])
        ['numpy', 'python', 'torch']
    """

    def __init__(self) -> None:
        self._ranks: list[dict[str, Any]] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every rank. All ranks have to call it, as they do when Lightning saves a checkpoint."""
        own = _random_state()
        if not (distributed.is_available() and distributed.is_initialized()):
            return {"ranks": [own]}
        ranks: list[dict[str, Any]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state for the moment at which training goes on."""
        self._ranks = state_dict["ranks"]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # What an earlier fit, or a test of a checkpoint, has loaded is not for this run.
        self._ranks = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        # Where `configure_optimizers` asks for the number of all steps, Lightning makes the loaders before it has read
        # the checkpoint, and keeps their positions for when it makes them. They have not given a batch yet.
        trainer.fit_loop._load_combined_loader_states()
        if self._ranks is None:
            rank_zero_warn(
                f"The checkpoint {trainer.ckpt_path} holds no random state: it was written without the callback "
                "RandomState. This run will not repeat what the interrupted one would have done."
            )
        elif len(self._ranks) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint {trainer.ckpt_path} was written by {len(self._ranks)} ranks and is resumed by "
                f"{trainer.world_size}: the random state is not restored. Resume with as many ranks to repeat what the "
                "interrupted run would have done."
            )
            self._ranks = None

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._ranks is not None and trainer.fit_loop.is_resuming:
            # Lightning has no public way to ask for a new iterator; the flag has no other reader.
            trainer.fit_loop._resuming_from_checkpoint = False
        self._restore(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._restore(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Where the checkpoint was written in this very hook, its state is that of the hook's end, not of its start.
        if not trainer.fit_loop.restarted_on_epoch_end:
            self._restore(trainer)

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._ranks is not None:
            _restore_random_state(self._ranks[trainer.global_rank])
            self._ranks = None


def _random_state() -> dict[str, Any]:
    version, words, next_gaussian = random.getstate()
    algorithm, key, position, has_gaussian, cached_gaussian = numpy.random.get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "next_gaussian": next_gaussian},
        "numpy": {
            "algorithm": algorithm,
            # As int64: a tensor of 32 unsigned bits does not survive the pickling of all_gather_object.
            "key": torch.from_numpy(numpy.asarray(key).astype(numpy.int64)),
            "position": position,
            "has_gaussian": has_gaussian,
            "cached_gaussian": cached_gaussian,
        },
        "torch": torch.get_rng_state(),
    }
    # Asked of CUDA before anything uses it, this would occupy the device.
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    python_state = state["python"]
    random.setstate(
        (python_state["version"], tuple(python_state["words"].tolist()), python_state["next_gaussian"]),
    )
    numpy_state = state["numpy"]
    numpy.random.set_state(
        (
            numpy_state["algorithm"],
            numpy_state["key"].numpy().astype(numpy.uint32),
            numpy_state["position"],
            numpy_state["has_gaussian"],
            numpy_state["cached_gaussian"],
        )
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _synchronize_directory(directory: Path) -> None:
    # A rename is on disk when the directory that holds the name is.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
