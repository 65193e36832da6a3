"""The rows of a comparison: which quantizer, and what differs from the config."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_modules.compare.callback import BASELINES, FIXED
from lightning_modules.yaml_files import load_yaml

__all__ = ["QUANTIZERS", "Row", "read_rows"]

QUANTIZERS = (*BASELINES, "global")


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        name: as the table shows it.
        quantizer: ``global`` (TwoStageQAT as the config has it) or a baseline.
        overrides: options of the command line, by their dotted names, that differ from the config.

    Raises:
        MisconfigurationException: an unknown quantizer.

    Example:
        >>> Row("global, 19 layers", "global", {"model.solver.init_args.layers": 19}).options
        ['--model.solver.init_args.layers=19']
    """

    name: str
    quantizer: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            raise MisconfigurationException(
                f"row {self.name!r}: unknown quantizer {self.quantizer!r}; expected one of {', '.join(QUANTIZERS)}"
            )

    @property
    def options(self) -> list[str]:
        """The overrides as options of the command line."""
        return [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.overrides.items()
        ]

    @property
    def chooses_start(self) -> bool:
        """Whether it searches among what the config's initialization offers: every baseline among all of that.

        There is the network that the one-bit row starts at. A row that was not offered it would show how bad its start
        is, not how good its weights.
        """
        return self.quantizer not in ("global", *FIXED)

    @property
    def trains_weights(self) -> bool:
        """Whether the learning rate of weights matters to it."""
        return self.quantizer not in FIXED


def read_rows(names: Sequence[str]) -> tuple[Row, ...]:
    """Rows from the names of quantizers, or from one YAML file that maps names of rows to their fields.

    Args:
        names: such as ``["fp32", "global"]`` or ``["rows.yaml"]``; none for every quantizer.

    Raises:
        MisconfigurationException: an unknown quantizer, or a file that does not map rows to their fields or has a
            key twice.
        FileNotFoundError: no such file.

    Example:
        >>> [row.name for row in read_rows(["fp32", "global"])]
        ['fp32', 'global']
    """
    if len(names) != 1 or not names[0].endswith((".yaml", ".yml")):
        return tuple(Row(name, name) for name in dict.fromkeys(names or QUANTIZERS))
    content = load_yaml(Path(names[0]))
    try:
        return tuple(_row(name, **(fields or {})) for name, fields in content.items())
    except (TypeError, AttributeError) as error:
        raise MisconfigurationException(
            f"{names[0]} should map each row to its quantizer and overrides: {error}"
        ) from error


def _row(name: str, quantizer: str | None = None, overrides: dict[str, Any] | None = None) -> Row:
    return Row(str(name), quantizer or str(name), dict(overrides or {}))
