"""Names of weights in the header of a file: ``layers.{0..11}.weight`` stands for twelve that are alike."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping

# No name of a module holds a dot, so that none is taken for a range.
_RANGE = re.compile(r"\{(0|[1-9]\d{0,8})\.\.(0|[1-9]\d{0,8})\}")


def ranges(weights: Mapping[str, Hashable]) -> list[str]:
    """Names, each once and with ranges where weights that are alike are numbered through.

    Args:
        weights: name, and what has to be equal of the weights of a range.

    Example:
        >>> ranges({"a.0.weight": 8, "b.weight": 8, "a.1.weight": 8, "a.2.weight": 4})
        ['a.{0..1}.weight', 'b.weight', 'a.2.weight']
    """
    left = dict(weights)
    found = []
    while left:
        name = next(iter(left))
        runs = [_run(name, position, left) for position in range(name.count(".") + 1)]
        longest = max(runs, key=len)
        found.append(_range(longest))
        for each in longest:
            del left[each]
    return found


def expand(name: str) -> list[str]:
    """The names that a name with a range stands for; the name itself without one.

    Example:
        >>> expand("layers.{9..11}.weight")
        ['layers.9.weight', 'layers.10.weight', 'layers.11.weight']
    """
    found = _RANGE.search(name)
    if found is None:
        return [name]
    return [f"{name[: found.start()]}{n}{name[found.end() :]}" for n in range(int(found[1]), int(found[2]) + 1)]


def count(name: str) -> int:
    """How many names a name stands for, without making them; 0 or less for a range that ends before it starts."""
    found = _RANGE.search(name)
    return 1 if found is None else int(found[2]) - int(found[1]) + 1


def _run(name: str, position: int, left: Mapping[str, Hashable]) -> list[str]:
    """The names that follow a name when its part at a position is counted up."""
    parts = name.split(".")
    run = [name]
    if re.fullmatch(r"0|[1-9]\d{0,8}", parts[position]):
        for number in range(int(parts[position]) + 1, 10**9):
            following = ".".join((*parts[:position], str(number), *parts[position + 1 :]))
            if following not in left or left[following] != left[name]:
                break
            run.append(following)
    return run


def _range(run: list[str]) -> str:
    if len(run) == 1:
        return run[0]
    first, last = run[0].split("."), run[-1].split(".")
    return ".".join(a if a == b else f"{{{a}..{b}}}" for a, b in zip(first, last, strict=True))
