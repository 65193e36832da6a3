"""Import a framework without the log lines about kernels that this machine cannot have anyway."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Logger -> the beginning of the message it is kept from printing. Any other message passes.
_NOISE = {
    "torchao": "Failed to load",
    "torchao.kernel.intmm": "Warning: Detected no triton",
    "torch.utils._pytree": "<enum 'KernelPreference'>",
}


def _is_not_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


@contextmanager
def quiet_import() -> Iterator[None]:
    """Filter the known noise of framework imports inside the ``with`` block."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_not_noise)
    try:
        yield
    finally:
        for name in _NOISE:
            logging.getLogger(name).removeFilter(_is_not_noise)
