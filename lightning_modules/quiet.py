"""Without what Lightning says of every run and nobody can act on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ignore_hints", "quiet_lightning"]


def ignore_hints() -> None:
    """Ignore warnings about Lightning's own use of torch, and a hint that is wrong for data in memory."""
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without what Lightning says once a run: a comparison has a line a run of its own."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            ignore_hints()
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
