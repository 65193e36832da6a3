"""All or nothing: a change to the modules of a model is taken back where it ends in an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module of a model back its class, attributes, parameters, buffers and children if the block fails.

    Values of tensors are not kept: check everything before the first one is written.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> try:
        ...     with unchanged_on_error(layer):
        ...         del layer.bias
        ...         raise ValueError
        ... except ValueError:
        ...     print(layer.bias.shape)
        torch.Size([2])
    """
    states = [_State(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        raise


class _State:
    """What a module is made of. Its dictionaries keep their identity: handles of hooks refer to them."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.attributes = module, type(module), dict(vars(module))
        self.members = set(vars(self.type))
        self.contents = {key: value.copy() for key, value in self.attributes.items() if isinstance(value, dict)}

    def restore(self) -> None:
        if type(self.module) is not self.type:
            self.module.__class__ = self.type
        for name in set(vars(self.type)) - self.members:  # a property that torch gave a class that was its own already
            delattr(self.type, name)
        attributes: dict[str, Any] = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for key, content in self.contents.items():
            attributes[key].clear()
            attributes[key].update(content)
