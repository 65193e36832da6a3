"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write to: it takes the place of ``path`` when the block ends, if it ends well.

    Raises:
        OSError: the file system refuses. What was at ``path`` is still there.

    Example:
        >>> with atomic_file(f"{tmp_path}/notes.txt") as partial:
        ...     _ = partial.write_text("all of it")
        >>> [path.name for path in tmp_path.iterdir()]
        ['notes.txt']
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
