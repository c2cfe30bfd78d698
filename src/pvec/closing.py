"""What holds something until it is closed: a model, a file, a connection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that closes itself when it is left, whatever happened inside."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held. Called on leaving the context."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
