"""A grid folder: the runs of many models, traits and seeds, and ``grid.json``, which lists them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pvec.documents import misfit, read_json, read_record
from pvec.errors import StoreError
from pvec.runs.files import atomic_write

GRID_FILE = "grid.json"
FORMAT_VERSION = 1

State = Literal["pending", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One run of a grid. ``model`` is the model's name in the grid, ``run`` its folder's name.

    ``reason`` says why a cell failed. ``inputs`` is a hash of all that the run follows from: a
    command that finds another one runs the cell again.
    """

    command: str
    model: str
    trait: str
    seed: int
    run: str
    state: State = "pending"
    reason: str = ""
    inputs: str = ""

    @property
    def label(self) -> str:
        """The cell in words."""
        return f"{self.trait} in {self.model}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class GridFolder:
    """What ``grid.json`` says. Every change writes the file as a whole."""

    path: Path
    cells: tuple[GridCell, ...] = ()

    def of(self, command: str) -> tuple[GridCell, ...]:
        """Return the cells of one command."""
        return tuple(cell for cell in self.cells if cell.command == command)

    def with_cells(self, cells: Iterable[GridCell]) -> GridFolder:
        """Return this folder with cells added or replaced, by the name of their run."""
        merged = {cell.run: cell for cell in (*self.cells, *cells)}
        return replace(self, cells=tuple(merged.values()))

    def write(self) -> None:
        """Replace ``grid.json``. Raises ``StoreError`` when it cannot be written."""
        content = {
            "format_version": FORMAT_VERSION,
            "cells": [asdict(cell) for cell in self.cells],
        }
        with atomic_write(self.path / GRID_FILE, mode="w") as stream:
            stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_grid(folder: Path) -> bool:
    """Whether a folder is that of a grid."""
    return (folder / GRID_FILE).is_file()


def read_grid(folder: Path) -> GridFolder:
    """Return the grid in ``folder``, without cells where none was begun.

    Raises ``StoreError`` for a folder that holds something else, and for a damaged ``grid.json``.
    """
    if not is_grid(folder):
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise StoreError(
                f"{folder} is not empty and no grid: choose a new or an empty folder (--out), or "
                "another name for the grid."
            )
        return GridFolder(path=folder)
    stored = read_json(folder / GRID_FILE)
    wrong = misfit(stored, {"format_version": int, "cells": [dict]})
    if wrong is None and stored["format_version"] > FORMAT_VERSION:
        raise StoreError(f"{folder} was made by a newer pvec: update pvec or use another folder.")
    try:
        if wrong is not None:
            raise ValueError(f"it has no {wrong!r}, or another kind of value there")
        cells = tuple(read_record(GridCell, cell) for cell in stored["cells"])
        for cell in cells:
            if Path(cell.run).name != cell.run:
                raise ValueError(f"the run {cell.run[:60]!r} is not in the folder")
    except ValueError as error:
        raise StoreError(
            f"{folder / GRID_FILE} is damaged ({error}): delete it, and the same command lists its "
            "runs again."
        ) from None
    return GridFolder(path=folder, cells=cells)
