"""Where the documents of a batch lie: each in a row of its own, or several in one row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Documents(ABC):
    """The documents of one batch of R rows of T tokens.

    Attributes:
        count: n, how many there are.
    """

    count: int

    @abstractmethod
    def fit(self, x: Tensor) -> bool:
        """Whether a tensor is (R, T, …), so that its tokens can be told apart."""

    @abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """(n,) sums over each document's tokens of `values` (R, T)."""

    @abstractmethod
    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """(n, p, q) sums over each document's tokens of the outer products of `left` (R, T, p) and `right` (R, T, q)."""


class Rows(Documents):
    """A document per row."""

    def __init__(self, count: int) -> None:
        self.count = count

    def fit(self, x: Tensor) -> bool:
        """See `Documents`; rows may be of any length."""
        return x.ndim == 3 and x.shape[0] == self.count

    def sums(self, values: Tensor) -> Tensor:
        """See `Documents`."""
        return values.sum(1)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Documents`."""
        return torch.bmm(left.mT, right)


@dataclass(frozen=True)
class Place:
    """Where one document lies: its row, its first token there, and how many tokens it has."""

    row: int
    start: int
    length: int


@dataclass(frozen=True)
class _Group:
    """Documents of similar length: their numbers (g,), their tokens in the flattened batch (g, L), and which of those are theirs (g, L)."""

    numbers: Tensor
    tokens: Tensor
    inside: Tensor

    def to(self, device: torch.device) -> _Group:
        return _Group(self.numbers.to(device), self.tokens.to(device), self.inside.to(device))


class Stretches(Documents):
    """Documents that are stretches of rows. Tokens that belong to none, such as padding, count nowhere.

    A stretch is padded to the longest of its group, and the lengths in a group differ by less than a factor of two: so little is computed in
    vain, and the number of products grows with the logarithm of the longest document alone.

    Args:
        places: of every document.
        shape: R and T.
    """

    def __init__(self, places: Sequence[Place], shape: tuple[int, int]) -> None:
        self.places, self.count = list(places), len(places)
        self._shape = shape
        groups: dict[int, list[int]] = {}
        for number, place in enumerate(self.places):
            groups.setdefault(place.length.bit_length(), []).append(number)
        self._groups = {torch.device("cpu"): [self._group(numbers) for numbers in groups.values()]}

    def _group(self, numbers: list[int]) -> _Group:
        places = [self.places[number] for number in numbers]
        first = torch.tensor([place.row * self._shape[1] + place.start for place in places])[:, None]
        offsets = torch.arange(max(place.length for place in places))[None]
        inside = offsets < torch.tensor([place.length for place in places])[:, None]
        return _Group(torch.tensor(numbers), first + offsets * inside, inside)

    def _on(self, device: torch.device) -> list[_Group]:
        if device not in self._groups:
            self._groups[device] = [group.to(device) for group in self._groups[torch.device("cpu")]]
        return self._groups[device]

    def fit(self, x: Tensor) -> bool:
        """See `Documents`."""
        return x.ndim == 3 and tuple(x.shape[:2]) == self._shape

    def sums(self, values: Tensor) -> Tensor:
        """See `Documents`."""
        flat = values.flatten()
        groups = self._on(values.device)
        parts = torch.cat([(flat[group.tokens] * group.inside).sum(1) for group in groups])
        return torch.zeros_like(parts).index_put((torch.cat([group.numbers for group in groups]),), parts)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Documents`."""
        result = left.new_empty(self.count, left.shape[-1], right.shape[-1])
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        for group in self._on(left.device):
            result[group.numbers] = torch.bmm((left[group.tokens] * group.inside[..., None]).mT, right[group.tokens])
        return result
