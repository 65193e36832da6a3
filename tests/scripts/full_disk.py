"""A disk that is full for files of this process: no file may grow beyond a size."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(after_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
