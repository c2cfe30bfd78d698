"""The grid file: models, traits and seeds. Every key, its meaning and its limits, declared once.

Paths are relative to the working directory. docs/grid.md shows a whole file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from pvec.documents import read_yaml
from pvec.errors import InputError, did_you_mean
from pvec.runs.names import run_name, slug
from pvec.settings.sections import ModelSettings, Section


def _listed(value: Any) -> Any:
    """Take one value where a list of them is meant."""
    return value if isinstance(value, list | tuple) else [value]


def _named(value: Any) -> Any:
    """Take a text for the model of that name."""
    return {"id": value} if isinstance(value, str) else value


class GridModel(ModelSettings):
    """One model of a grid. What is not set here is as in the command's settings, but for those
    that say which model it is (``IDENTITY``).
    """

    id: str = Field(min_length=1)
    """Model to run: a hub id, a folder, a GGUF file, or `tiny`, the bundled teaching model"""

    name: str = ""
    """What the model is called in tables and folders (default: the last part of its id, and its \
adapter)"""

    layer: str | None = None
    """Where `steer-eval` steers, as `--layer`; `shift` measures at these layers (numbers only)"""

    coef: str | None = None
    """Steering strength, as `--coef`"""

    checkpoints: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Finetunes of the model, or their adapters, whose shift `shift` measures"""

    @property
    def label(self) -> str:
        """What to call the model."""
        return self.name or run_name(model=self.id, adapter=self.adapter)


IDENTITY = ("id", "gguf_file", "adapter", "revision", "chat_template")
"""Settings of a model that only the grid file sets."""


class GridFile(Section):
    """A whole grid: every model with every trait and every seed."""

    name: str = ""
    """Name of the grid's folder in `runs/` (default: that of the file)"""

    models: tuple[Annotated[GridModel, BeforeValidator(_named)], ...] = Field(min_length=1)
    """Models: a name or folder each, or its settings"""

    traits: Annotated[tuple[str, ...], BeforeValidator(_listed)] = Field(min_length=1)
    """Bundled traits by name, or trait files"""

    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...], BeforeValidator(_listed)
    ] = Field(default=(0,), min_length=1)
    """Random seeds; each makes answers, and vectors, of its own"""


def read_grid_file(path: Path) -> GridFile:
    """Read a grid file. Raises ``InputError`` naming everything that is wrong with it."""
    tree = read_yaml(path)
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} must hold `models:`, `traits:` and `seeds:` (docs/grid.md).")
    try:
        grid = GridFile.model_validate(tree)
    except ValidationError as error:
        raise InputError(_sentence(path, error)) from None
    _refuse_repeated(path, "model", (slug(model.label).lower() for model in grid.models))
    _refuse_repeated(path, "trait", grid.traits)
    _refuse_repeated(path, "seed", map(str, grid.seeds))
    name = slug(grid.name or path.stem)
    if not name:
        raise InputError(f"{path}: {grid.name!r} cannot name a folder: give another name.")
    return grid.model_copy(update={"name": name})


def _refuse_repeated(path: Path, what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        remedy = "give each a `name:` of its own" if what == "model" else f"name each {what} once"
        raise InputError(f"{path}: two {what}s are called {repeated[0]!r}: {remedy}.")


def _sentence(path: Path, error: ValidationError) -> str:
    """Return everything that is wrong, each with its path in the file (models count from 1)."""
    parts: dict[str, None] = {}
    for item in error.errors(include_url=False):
        steps = [str(s + 1) if isinstance(s, int) else str(s) for s in item["loc"]]
        where, message = ".".join(steps), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            fields = GridModel.model_fields if len(steps) > 1 else GridFile.model_fields
            hint = did_you_mean(steps[-1], fields).strip()
            parts[f"{where}: unknown key{hint and f' ({hint})'}"] = None
        else:
            value = "" if item["type"] == "missing" else f" (it is {str(item['input'])[:60]!r})"
            parts[f"{where}: {message[0].lower()}{message[1:]}{value}"] = None
    return f"{path}: {'; '.join(parts)}."
