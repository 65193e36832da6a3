"""The structures of a file: each distinct one is stored once, and each weight has the number of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pibinn_plugin.errors import ArtifactError, StructureError
from pibinn_plugin.structure import Structure
from pibinn_plugin.structure.base import short


@dataclass(frozen=True, eq=False)
class StoredStructures:
    """The structures of a list of weights as a file holds them.

    Args:
        content: uint8, shape ``(bytes,)``: the stored forms of the distinct structures, one after the other, in order
            of first use.
        lengths: bytes of each of them.
        numbers: for each weight, which of them is its own.

    Example:
        >>> from pibinn_plugin.structure import Banded, Dense
        >>> stored = StoredStructures.of([Banded(1, 2), Dense(), Banded(1, 2)])
        >>> stored.content.numel(), stored.lengths, stored.numbers
        (10, [9, 1], [0, 1, 0])
        >>> stored.decode()
        [Banded(lower=1, upper=2), Dense(), Banded(lower=1, upper=2)]
    """

    content: Tensor
    lengths: list[int]
    numbers: list[int]

    @classmethod
    def of(cls, structures: Iterable[Structure]) -> StoredStructures:
        """Store the structures of these weights."""
        distinct: dict[bytes, int] = {}
        numbers = [distinct.setdefault(structure.to_bytes(), len(distinct)) for structure in structures]
        content = torch.tensor(list(b"".join(distinct)), dtype=torch.uint8, device="cpu")
        return cls(content, [len(stored) for stored in distinct], numbers)

    def decode(self) -> list[Structure]:
        """The structure of each weight, one object for all weights that share it. Nothing read is trusted.

        Raises:
            ArtifactError: the lengths do not add up to the content, a weight has a number that is none of theirs, a
                structure is used by no weight or not in order of first use, or its bytes describe none.
        """
        self._check()
        distinct = []
        for number, stored in enumerate(self.content.split(self.lengths)):
            try:
                distinct.append(Structure.from_bytes(bytes(stored.tolist())))
            except StructureError as error:
                raise ArtifactError(f"structure {number}: {error}") from error
        return [distinct[number] for number in self.numbers]

    def _check(self) -> None:
        if self.content.dtype != torch.uint8 or self.content.dim() != 1:
            raise ArtifactError("the structures are not a list of bytes")
        if not isinstance(self.lengths, list) or any(type(length) is not int or length < 1 for length in self.lengths):
            raise ArtifactError("the bytes of the structures are not a list of positive whole numbers")
        if sum(self.lengths) != self.content.numel():
            stated = short(sum(self.lengths))
            raise ArtifactError(f"the structures take {self.content.numel()} bytes, not the {stated} stated")
        are_whole = all(type(number) is int for number in self.numbers)
        if not are_whole or list(dict.fromkeys(self.numbers)) != list(range(len(self.lengths))):
            raise ArtifactError(
                f"the weights number their structures {short(self.numbers)}; expected all of 0 to "
                f"{len(self.lengths) - 1}, in order of first use"
            )
