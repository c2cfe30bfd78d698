"""Requests that arrive while others run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Arrivals(Iterable[Item], Generic[Item]):
    """A stream that a backend takes from without waiting while it has other work."""

    @abstractmethod
    def take(self, *, wait: bool) -> list[Item] | None:
        """Return what has arrived since the last call; None when nothing will follow.

        With ``wait`` it waits for the next item or the end, otherwise it may return an empty list.
        """

    def __iter__(self) -> Iterator[Item]:
        while (items := self.take(wait=True)) is not None:
            yield from items


class Given(Arrivals[Item]):
    """Items that are all there: the first ``take`` returns them."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items: list[Item] | None = list(items)

    def take(self, *, wait: bool) -> list[Item] | None:  # noqa: ARG002 (there is nothing to wait for)
        """Return all items, and None afterwards."""
        items, self._items = self._items, None
        return items or None


def arriving(items: Iterable[Item]) -> Arrivals[Item]:
    """Return ``items`` as arrivals."""
    return items if isinstance(items, Arrivals) else Given(items)
