"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A hidden file beside ``path`` to write to: it takes the place of ``path`` when the block ends, if it ends well.

    A symbolic link stays one: the file that it points to is replaced.

    Raises:
        OSError: the file system refuses. What was at ``path`` is still there.

    Example:
        >>> with atomic_file(f"{tmp_path}/notes.txt") as partial:
        ...     _ = partial.write_text("all of it")
        >>> [path.name for path in tmp_path.iterdir()]
        ['notes.txt']
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")  # always this one: what a kill leaves is written over
    try:
        partial.touch()
        mode = (
            (path if path.exists() else partial).stat().st_mode
        )  # some writers make files that only their owner reads
        yield partial
        os.chmod(partial, stat.S_IMODE(mode))
        os.replace(partial, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk is found by a write, which knows no name
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
