"""How many signs flipped in each epoch of a training, read from the log that `TwoStageQAT` wrote through Lightning."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from pibinn_plugin.errors import PIBiNNError
from pibinn_plugin.tables import text_table

__all__ = ["SignHistory", "read_sign_history"]

_STAGES = ("warm-up", "signs", "scale")


@dataclass(frozen=True)
class SignHistory:
    """One entry an epoch.

    Args:
        epochs: their numbers.
        flipped: the fraction of signs that flipped.
        scale: λ at the end.
        stages: ``warm-up``, ``signs`` or ``scale``.
    """

    epochs: tuple[int, ...]
    flipped: tuple[float, ...]
    scale: tuple[float, ...]
    stages: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            [str(epoch), stage, f"{flipped:.3%}", f"{scale:.5g}"]
            for epoch, flipped, scale, stage in zip(self.epochs, self.flipped, self.scale, self.stages, strict=True)
        ]
        legend = "flipped: fraction of all signs that changed in the epoch; λ at its end. As logged by the training.\n"
        return text_table(("epoch", "stage", "flipped", "λ"), rows) + legend


def read_sign_history(path: Path | str) -> SignHistory:
    r"""Read the ``metrics.csv`` of Lightning's CSVLogger.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        PIBiNNError: it has no row with ``epoch``, ``qat/flipped``, ``qat/scale`` and ``qat/stage``.

    Example:
        >>> log = Path(tmp_path) / "metrics.csv"
        >>> _ = log.write_text("epoch,qat/flipped,qat/scale,qat/stage\n0,0.25,0.1,1.0\n")
        >>> read_sign_history(log).flipped
        (0.25,)
    """
    columns = ("epoch", "qat/flipped", "qat/scale", "qat/stage")
    with open(path, newline="") as file:
        logged = [[row.get(column) for column in columns] for row in csv.DictReader(file)]
    rows = [row for row in logged if all(row)]
    if not rows:
        raise PIBiNNError(f"{path} has no row with {', '.join(columns)}: was TwoStageQAT in that run?")
    try:
        numbers = [[float(value or "") for value in row] for row in rows]
        stages = tuple(_STAGES[_index(row[3])] for row in numbers)
    except (ValueError, IndexError) as error:
        raise PIBiNNError(f"{path} is no log of TwoStageQAT: {error}") from error
    epochs, flipped, scale, _ = zip(*numbers, strict=True)
    return SignHistory(tuple(map(int, epochs)), flipped, scale, stages)


def _index(stage: float) -> int:
    if stage not in range(len(_STAGES)):
        raise ValueError(f"stage {stage}: expected one of 0 to {len(_STAGES) - 1}")
    return int(stage)
