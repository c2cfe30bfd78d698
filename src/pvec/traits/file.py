"""Reading a trait's JSON with errors that name the file, the key and the line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never, Self, TypeVar

from pvec.documents import parse_json, read_text
from pvec.errors import InputError, did_you_mean

_TOP_KEYS = frozenset(
    {"name", "description", "assistant_names", "instruction", "questions", "eval_prompt"}
)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TraitFile:
    """A parsed trait file that still knows where in its text each key stands.

    The accessors below raise ``InputError`` for a key that is missing or of the wrong type.
    """

    path: Path
    source: str
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse ``path``. Raises ``InputError`` for anything that is not a JSON object."""
        try:
            source = read_text(path)
        except FileNotFoundError:
            raise InputError(f"there is no trait file {path}; check the path.") from None
        if not source.strip():
            raise InputError(f"{path} is empty; a trait file is a JSON object (docs/formats.md).")
        data = parse_json(source, where=path)
        if not isinstance(data, dict):
            raise InputError(
                f"{path} holds a JSON {type(data).__name__}; a trait file is a JSON object "
                "(docs/formats.md)."
            )
        return cls(path=path, source=source, data=data)

    @property
    def is_own_format(self) -> bool:
        """Whether this is pvec's one-file format; the reference's has one list of questions."""
        return not isinstance(self.data.get("questions"), list)

    def refuse_unknown_keys(self) -> None:
        """Raise ``InputError`` for a key that pvec's format does not have (a typing error)."""
        for key in self.data:
            if key not in _TOP_KEYS:
                raise InputError(
                    f"{self.path}:{self._line(key)} has the unknown key {key!r}."
                    f"{did_you_mean(key, _TOP_KEYS)} Known keys: {', '.join(sorted(_TOP_KEYS))}."
                )

    def text(
        self, key: str, *, inside: Mapping[str, Any] | None = None, optional: bool = False
    ) -> str:
        """Return the string at ``key``; an absent optional one is the empty string."""
        return self._value(key, str, "a text", inside=inside, optional=optional)

    def texts(self, key: str, *, inside: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Return the list of strings at ``key``."""
        return tuple(self._list(key, str, "a list of texts", inside=inside))

    def mapping(self, key: str, *, optional: bool = False) -> Mapping[str, Any]:
        """Return the object at ``key``; an absent optional one is empty."""
        return self._value(key, dict, "an object", optional=optional)

    def mappings(self, key: str) -> list[dict[str, Any]]:
        """Return the list of objects at ``key``."""
        return self._list(key, dict, "a list of objects")

    def _list(
        self, key: str, kind: type[T], expected: str, *, inside: Mapping[str, Any] | None = None
    ) -> list[T]:
        items: list[T] = self._value(key, list, expected, inside=inside)
        for item in items:
            if not isinstance(item, kind):
                self._wrong_type(key, expected, item)
        return items

    def _value(
        self,
        key: str,
        kind: type[T],
        expected: str,
        *,
        inside: Mapping[str, Any] | None = None,
        optional: bool = False,
    ) -> T:
        container = self.data if inside is None else inside
        if key in container:
            value = container[key]
            return value if isinstance(value, kind) else self._wrong_type(key, expected, value)
        if optional:
            return kind()
        around = "" if inside is None else f" in {_shortened(inside)}"
        raise InputError(
            f"{self.path}:{self._line_of_container(inside)} lacks the key {key!r}{around}."
            f"{did_you_mean(key, container)} docs/formats.md shows a whole trait file."
        )

    def _wrong_type(self, key: str, expected: str, value: Any) -> Never:
        raise InputError(
            f"{self.path}:{self._line(key)} should have {expected} under {key!r}, not "
            f"{_shortened(value)}; docs/formats.md shows a whole trait file."
        )

    def _line(self, key: str) -> int:
        """Return the line where ``key`` first stands as a key, from 1."""
        match = re.search(rf"{re.escape(json.dumps(key))}\s*:", self.source)
        return 1 if match is None else self.source.count("\n", 0, match.start()) + 1

    def _line_of_container(self, container: Mapping[str, Any] | None) -> int:
        """Return the line of an object by its first key and value, as nearly as the text tells."""
        if not container:
            return 1
        key, value = next(iter(container.items()))
        start = json.dumps(value, ensure_ascii=False)[:40] if isinstance(value, str) else ""
        match = re.search(rf"{re.escape(json.dumps(key))}\s*:\s*{re.escape(start)}", self.source)
        return self._line(key) if match is None else self.source.count("\n", 0, match.start()) + 1


def _shortened(value: Any, *, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}…"
