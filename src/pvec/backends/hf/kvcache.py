"""A key-value cache whose rows come and go.

transformers' own dynamic cache copies everything for each new token and cannot be merged. This one
keeps spare columns, fills the places of rows that left with others, repeats rows, joins batches
(the shorter is padded on the left) and takes back a half-done step. It holds full-length keys for
sliding-window layers too: the model's mask hides what is out of the window.

A forward pass of fixed shapes sees its buffers whole (``RowCache.fixed``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_SPARE_COLUMNS = 64


class RowCache(Cache):
    """Keys and values of a left-padded batch, ``[rows, heads, columns, head_dim]`` per layer."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)

    @property
    def columns(self) -> int:
        """Number of cached positions, padding included (0 before the first forward pass)."""
        layers = self._growing()
        return layers[0].get_seq_length() if layers else 0

    def keep(self, rows: Sequence[int]) -> None:
        """Make row ``k`` what row ``rows[k]`` was; repeats and gaps are allowed.

        Cheap when the rows that move come from behind the first ``len(rows)``.
        """
        for layer in self._growing():
            layer.apply(lambda arena: arena.keep(rows))

    def drop_columns(self, count: int) -> None:
        """Forget the first ``count`` columns (padding in every row)."""
        for layer in self._growing():
            layer.apply(lambda arena: arena.drop_columns(count))

    def join(self, other: RowCache, *, room: int = 0) -> None:
        """Append the rows of ``other``, and make room for ``room`` rows if it must grow."""
        for layer, added in zip(self._growing(), other._growing(), strict=True):
            layer.join(added, room=room)

    def selected(self, rows: Sequence[int]) -> RowCache:
        """Return a cache with its own storage, whose row ``k`` is row ``rows[k]`` of this one."""
        twin, index = RowCache(), torch.tensor(rows)
        for number, layer in enumerate(self._growing()):
            chosen = index.to(layer.keys.device)
            twin.update(layer.keys[chosen], layer.values[chosen], number)
        return twin

    def close_gaps(self, real: torch.Tensor) -> None:
        """Move the columns that are ``real`` (bool ``[rows, columns]``) to the right end.

        They keep their order; what is left of them is padding.
        """
        width = int(real.sum(dim=1).max())
        # a stable sort: padding first, then the real columns in their order
        order = real.long().argsort(dim=1, stable=True)[:, -width:]
        for layer in self._growing():
            layer.apply(lambda arena: arena.take_columns(order))

    @property
    def place(self) -> tuple[int, ...]:
        """Where the buffers are in memory: equal to an earlier value when none has moved."""
        return tuple(place for layer in self._growing() for place in layer.place)

    @property
    def next_column(self) -> int:
        """The column of the buffers that the next token is written to."""
        return self._growing()[0].next_column

    def reserve(self, rows: int) -> None:
        """Make room for one more column in ``rows`` rows; buffers that have it do not move."""
        for layer in self._growing():
            layer.apply(lambda arena: arena.reserve(rows))

    def fixed(self, rows: int, column: torch.Tensor) -> FixedCache:
        """Return the first ``rows`` rows of the buffers with all their columns, used or not.

        A forward pass of one token writes it to ``column``, a number ``[1]`` on the device, and
        reads everything: its mask must hide what is not in use. ``grow`` counts the column.
        """
        buffers = [layer.buffers(rows) for layer in self._growing()]
        return FixedCache([FixedLayer(keys, values, column) for keys, values in buffers])

    def grow(self) -> None:
        """Count the column that a forward pass over ``fixed`` has written."""
        for layer in self._growing():
            layer.apply(lambda arena: arena.grow())

    def _growing(self) -> list[GrowingLayer]:
        return [layer for layer in self.layers if isinstance(layer, GrowingLayer)]


class StateCache(DynamicCache):
    """transformers' own cache, for layers whose state is more than keys and values.

    Its rows have equal lengths, without padding; rows may leave or repeat, but none may join.
    """

    def keep(self, rows: Sequence[int]) -> None:
        """Make row ``k`` what row ``rows[k]`` was; repeats and gaps are allowed."""
        self.reorder_cache(torch.tensor(rows))  # type: ignore[arg-type]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values: views of arenas that are larger than they need to be."""

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Start empty, with the shapes of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._arenas = (_Arena(key_states), _Arena(value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of the new tokens and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for arena, states in zip(self._arenas, (key_states, value_states), strict=True):
            arena.append(states)
        self._show()
        return self.keys, self.values

    def apply(self, change: Any) -> None:
        """Call ``change`` on the keys' and the values' arena."""
        for arena in self._arenas:
            change(arena)
        self._show()

    def join(self, other: GrowingLayer, *, room: int) -> None:
        """Append the rows of ``other``."""
        for arena, states in zip(self._arenas, (other.keys, other.values), strict=True):
            arena.join(states, room=room)
        self._show()

    @property
    def place(self) -> tuple[int, ...]:
        """Where the buffers are in memory."""
        return tuple(arena.buffer.data_ptr() for arena in self._arenas)

    @property
    def next_column(self) -> int:
        """The column of the buffers that the next token is written to."""
        return self._arenas[0].last

    def buffers(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first rows of the keys' and the values' buffer, each with all columns."""
        keys, values = (arena.buffer[:rows] for arena in self._arenas)
        return keys, values

    def _show(self) -> None:
        self.keys, self.values = (arena.view for arena in self._arenas)


class FixedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's buffers as a forward pass of fixed shapes sees them."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of the new token and return all columns."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values


class FixedCache(Cache):
    """The buffers of a ``RowCache`` as a forward pass of fixed shapes sees them."""

    def __init__(self, layers: list[FixedLayer]) -> None:
        super().__init__(layers=list(layers))
        self.columns = layers[0].keys.shape[2]
        """Number of columns of the buffers, used or not."""


class _Arena:
    """A buffer of which the first rows and a run of columns are in use.

    What is not in use holds finite numbers, so that a mask can hide it.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.buffer = like[:, :, :0]
        self._rows = like.shape[0]
        self._first = self.last = 0

    @property
    def view(self) -> torch.Tensor:
        """What is in use, ``[rows, heads, columns, width]``."""
        return self.buffer[: self._rows, :, self._first : self.last]

    def append(self, states: torch.Tensor) -> None:
        """Write new columns behind those in use."""
        count = states.shape[2]
        if self.last + count > self.buffer.shape[2]:
            self._move(rows=self._rows, columns=self.last - self._first, more=count)
        self.buffer[: self._rows, :, self.last : self.last + count] = states
        self.last += count

    def keep(self, rows: Sequence[int]) -> None:
        """Make row ``k`` what row ``rows[k]`` was."""
        moves = [(to, source) for to, source in enumerate(rows) if to != source]
        if all(source >= len(rows) for _, source in moves) and 2 * len(rows) > self._rows:
            if moves:
                to, source = torch.tensor(moves, device=self.buffer.device).unbind(dim=1)
                self.buffer[to, :, self._first : self.last] = self.view[source]
        else:
            self.buffer = self.view[torch.tensor(rows, device=self.buffer.device)]
            self._first, self.last = 0, self.buffer.shape[2]
        self._rows = len(rows)

    def drop_columns(self, count: int) -> None:
        """Forget the first ``count`` columns."""
        self.buffer[:, :, self._first : self._first + count] = 0  # of a failed row: not finite
        self._first += count

    def reserve(self, rows: int) -> None:
        """Make room for one more column in ``rows`` rows."""
        if rows > self.buffer.shape[0] or self.last == self.buffer.shape[2]:
            self._move(rows=rows, columns=self.last - self._first, more=1)

    def grow(self) -> None:
        """Count a column that is written already."""
        self.last += 1

    def take_columns(self, columns: torch.Tensor) -> None:
        """Keep in row ``r`` the columns ``columns[r]``, in that order."""
        view = self.view
        index = columns.to(view.device)[:, None, :, None]
        self.buffer = view.gather(2, index.expand(-1, view.shape[1], -1, view.shape[3]))
        self._first, self.last = 0, columns.shape[1]

    def join(self, states: torch.Tensor, *, room: int) -> None:
        """Append rows; the shorter of the two is padded with zeros on the left."""
        count, _, width, _ = states.shape
        total = self._rows + count
        columns = max(width, self.last - self._first)
        if total > self.buffer.shape[0] or width > self.last - self._first:
            self._move(rows=max(total, room), columns=columns, more=1)
        place = self.buffer[self._rows : total, :, self._first : self.last]
        place[:, :, : columns - width] = 0
        place[:, :, columns - width :] = states
        self._rows = total

    def _move(self, *, rows: int, columns: int, more: int) -> None:
        """Copy to a larger buffer; old columns go to the right end of the ``columns`` in use."""
        old = self.view
        room = columns + more + _SPARE_COLUMNS + columns // 8
        room += -room % 8  # kernels of a GPU read masks by eight columns
        self.buffer = old.new_zeros(rows, old.shape[1], room, old.shape[3])
        padding = columns - old.shape[2]
        self.buffer[: self._rows, :, padding:columns] = old
        self._first, self.last = 0, columns
