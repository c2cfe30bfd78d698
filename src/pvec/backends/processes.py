"""Several processes that share the rows of one capture (``accelerate launch``, ``torchrun``).

Every process loads the model and captures its part; sums are small, so they travel as pickled
objects over gloo whatever device the model is on.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import TracebackType
from typing import Self, TypeVar

from pvec.errors import InputError, PvecError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Processes:
    """The processes of one launch (a single process without a launcher). A context manager.

    All of them must make the same calls in the same order.
    """

    def __init__(self, *, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._joined = False

    @classmethod
    def launched(cls) -> Self:
        """Return the processes that a launcher announced in the environment.

        Raises ``InputError`` for an environment in which this process would work alone although
        several were started.
        """
        size = _number("WORLD_SIZE", 1)
        if "RANK" not in os.environ:
            if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
                raise InputError(
                    "accelerate launch started a process that knows of no others, as it does with "
                    "--cpu: use --multi_gpu in its place, which works on CPUs too, or torchrun."
                )
            if size > 1:
                raise InputError(
                    f"WORLD_SIZE is {size} but RANK is not set: start the processes with "
                    f"accelerate launch or torchrun, or unset WORLD_SIZE."
                )
        return cls(rank=_number("RANK", 0), size=size)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """This process's number on its machine: the accelerator it uses."""
        return _number("LOCAL_RANK", 0)

    def share(self, items: Sequence[Item], *, cost: Callable[[Item], int]) -> Sequence[Item]:
        """Return this process's part of ``items``: neighbours, about equal in cost."""
        ends = list(accumulate(cost(item) for item in items))
        total = ends[-1] if ends else 0
        first, last = (bisect_left(ends, total * k / self.size) for k in (self.rank, self.rank + 1))
        start = first + 1 if self.rank else 0  # the item that crosses a border belongs to the left
        return items[start : last + 1]

    def gather(self, value: Result) -> list[Result]:
        """Return every process's ``value`` on the main one, an empty list on the others."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        gathered: list[Result | None] | None = [None] * self.size if self.main else None
        dist.gather_object(value, gathered)
        return [value for value in gathered or [] if value is not None]

    def share_all(self, value: Result) -> list[Result]:
        """Return every process's ``value``, on all of them."""
        import torch.distributed as dist

        values: list[Result | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def on_main(self, make: Callable[[], Result]) -> Result:
        """Run ``make`` on the main process and return its result, or raise its error, on all."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        outcome: list[Result | PvecError | None] = [None]
        if self.main:
            try:
                outcome = [make()]
            except PvecError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], PvecError):
            raise outcome[0]
        return outcome[0]  # type: ignore[return-value]

    def __enter__(self) -> Self:
        if self.size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", rank=self.rank, world_size=self.size)
                self._joined = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._joined:
            import torch.distributed as dist

            dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    """Return a variable of the launcher's environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} in the environment is no number: unset or correct it.")
    return int(text)


ALONE = Processes()
"""A single process."""
