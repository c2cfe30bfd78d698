"""The output of a job on blocks: a folder of part files, here or in a store, and how far it is.

A block's part file has a name that follows from the block, and is written as a whole; then a small
file in ``_pvec`` says that the block is done and what was counted. Whoever dies, and however often
a block is done again, each block is in the output once, in the input's order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvec.data.storage import join, names_in, read_files, url_of, write_file
from pvec.documents import misfit, parse_json
from pvec.errors import InputError, StoreError
from pvec.runs.files import probe_writable

OWN = "_pvec"
"""Folder of what is no part; readers of such folders leave out names that begin so."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a block gave: the part file (None for a block that is only counted), ``arrays`` beside
    it (``.npz``), and counts as JSON.
    """

    counts: Mapping[str, Any]
    content: bytes | None = None
    arrays: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class BlockFolder:
    """Parts called ``name`` and a number in ``place``, a path or URL."""

    place: str
    suffix: str
    name: str = "part"

    def part(self, number: int) -> str:
        """Return where a block's part file is."""
        return join(self.place, f"{self._stem(number)}{self.suffix}")

    def arrays(self, number: int) -> str:
        """Return where a block's arrays are."""
        return self._own(f"{self._stem(number)}.npz")

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Note whose parts these are, or check that it was the same job that began the folder.

        Raises ``StoreError`` for another job's folder and where nothing can be written, and
        ``InputError`` for a folder that holds something else.
        """
        plan = self._own("plan.json")
        if "plan.json" in names_in(join(self.place, OWN)):
            (began,) = self._read([plan], {}, remedy="give another --out").values()
            different = [name for name in identity if began.get(name) != identity[name]]
            if different:
                raise StoreError(
                    f"{self.place} holds parts of another job (different: {', '.join(different)}): "
                    f"give another --out, or delete that folder."
                )
            return
        if names_in(self.place):
            raise InputError(
                f"{self.place} is there already and holds other files: give another --out."
            )
        if url_of(self.place) is None:
            probe_writable(Path(self.place))
        write_file(plan, json.dumps(dict(identity), indent=2, ensure_ascii=False).encode())

    def done(self) -> dict[int, dict[str, Any]]:
        """Return what was counted of the blocks that are done, by number."""
        parts = names_in(self.place) if self.suffix else None
        numbers = {
            self._own(name): int(match[1])
            for name in names_in(join(self.place, OWN))
            if (match := re.fullmatch(rf"{self.name}-(\d+)\.json", name))
            and (parts is None or name.replace(".json", self.suffix) in parts)
        }
        remedy = "delete it, and the same command does its block again"
        read = self._read(list(numbers), {"rows": int}, remedy=remedy)
        return {numbers[place]: counts for place, counts in sorted(read.items())}

    def keep(self, number: int, part: Part) -> None:
        """Write what a block gave; that it is done is written last. Raises ``StoreError``."""
        if part.content is not None:
            write_file(self.part(number), part.content)
        if part.arrays is not None:
            write_file(self.arrays(number), part.arrays)
        write_file(self._own(f"{self._stem(number)}.json"), json.dumps(part.counts).encode())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write what all parts say together."""
        write_file(self._own("summary.json"), json.dumps(summary, indent=2).encode())

    def _read(
        self, places: Sequence[str], shape: Mapping[str, Any], *, remedy: str
    ) -> dict[str, dict[str, Any]]:
        """Return JSON objects of ``shape`` by place; ``StoreError`` for a damaged one."""
        objects = {}
        for place, content in read_files(places).items():
            try:
                value = parse_json(content.decode(), where=place)
            except (InputError, UnicodeDecodeError):
                value = None
            if misfit(value, dict(shape)) is not None:
                raise StoreError(f"{place} is damaged: {remedy}.")
            objects[place] = value
        return objects

    def _stem(self, number: int) -> str:
        return f"{self.name}-{number:06}"

    def _own(self, name: str) -> str:
        return join(join(self.place, OWN), name)
