"""YAML files in which every key is there once."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from typing_extensions import override

__all__ = ["load_yaml"]


class _UniqueKeysLoader(yaml.SafeLoader):
    """PyYAML takes the last of equal keys without a word; YAML 1.2 (3.2.1.3) has none."""

    @override
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise MisconfigurationException(f"the key {key!r} is given again in line {line}: leave one of the two")
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> Any:
    r"""Read a YAML file.

    Raises:
        MisconfigurationException: it is no YAML, or a mapping has a key twice.
        FileNotFoundError: there is no such file.

    Example:
        >>> path = Path(tmp_path) / "rows.yaml"
        >>> _ = path.write_text("a: 1\nb: {c: 2}")
        >>> load_yaml(path)
        {'a': 1, 'b': {'c': 2}}
    """
    try:
        return yaml.load(path.read_text(), Loader=_UniqueKeysLoader)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise MisconfigurationException(f"{path} is no YAML: {' '.join(str(error).split())}") from error
