"""The base class of objects that hold a resource until they are closed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that closes itself when it is left, whatever happened inside."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held. Called on leaving the context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
