"""JSON and YAML files, whoever wrote them: every way to be wrong is one sentence.

A file may be a pipe, hold bytes that are not text, nest a thousand levels deep, have a key twice,
or a number of 6,000 digits. Traits, configurations, manifests, results and records are read here,
so that none of this ends a command as a bug or makes it hang.

YAML is read as people mean it. PyYAML reads YAML 1.1, where ``layer: 12:24:2`` is the number 44642
(base 60), ``off`` is False, ``010`` is 8 and ``1e-4`` is a text. Here plain values follow the core
schema of YAML 1.2.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import stat
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pvec.errors import InputError

Record = TypeVar("Record")

MOST_LEVELS = 100
"""Levels of lists and objects inside each other; what people write has fewer than ten."""

MOST_VALUES = 1_000_000
"""Values of a YAML document after its aliases are written out."""


class DocumentError(InputError):
    """A file or text that cannot be read. ``problem`` says why, without the file's name."""

    def __init__(self, where: str | Path, problem: str, *, remedy: str = "correct it") -> None:
        super().__init__(f"{where} {problem}; {remedy}.")
        self.problem = problem


def check_regular(path: Path) -> None:
    """Raise ``DocumentError`` for what is there but is no regular file; one not there may pass.

    Opening a pipe would wait for ever for somebody to write into it.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise DocumentError(path, f"cannot be read: {_reason(error)}", remedy=_OTHER) from None
    if stat.S_ISDIR(mode):
        raise DocumentError(path, "cannot be read: it is a folder", remedy=_OTHER)
    if not stat.S_ISREG(mode):
        raise DocumentError(path, "cannot be read: it is a pipe or a device", remedy=_OTHER)


def read_text(path: Path) -> str:
    """Return a file's text, without a byte order mark.

    Raises ``FileNotFoundError``, and ``DocumentError`` for everything else that is wrong.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start})"
        raise DocumentError(path, problem, remedy="save it as UTF-8") from None
    except OSError as error:
        raise DocumentError(path, f"cannot be read: {_reason(error)}", remedy=_OTHER) from None


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Return what a JSON file holds. Raises as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path), where=path, finite=finite)


def parse_json(text: str, *, where: str | Path, finite: bool = True) -> Any:
    """Return what a JSON text holds; ``DocumentError`` begins with ``where`` and names the line.

    With ``finite`` NaN and infinite numbers are refused, which JSON does not have.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"{where}:{error.lineno}"
        problem = f"is not valid JSON: {error.msg} at column {error.colno}"
        raise DocumentError(where, problem, remedy="correct that line") from None
    except _RepeatedKeyError as error:
        raise DocumentError(where, f"has the key {str(error)!r} twice", remedy=_ONE) from None
    except RecursionError:
        raise DocumentError(where, _TOO_DEEP) from None
    except ValueError:  # of int(), which takes 4,300 digits
        raise DocumentError(where, "holds a number of thousands of digits") from None
    return _checked(value, where, finite=finite)


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Return the object in one line of JSON, or None for anything else.

    Records are many, so this checks only what would end a command.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, too many digits or levels
        return None
    if not isinstance(record, dict) or _deeper_than(record, MOST_LEVELS):
        return None
    return record


Shape = Any
"""What a stored value must be: a type, several shapes, a dictionary of shapes by key (others may be
there; ``...`` stands for every key), or a list of one shape for all items.
"""


def misfit(value: Any, shape: Shape, at: str = "the whole") -> str | None:
    """Return where a stored value is not of a shape, or None where all of it is.

    >>> misfit({"a": [1, "x"]}, {"a": [int]})
    'a.1'
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return at
        keys = [key for key in shape if key is not ...]
        for key in keys:
            if key not in value:
                return str(key) if at == "the whole" else f"{at}.{key}"
        keys += [key for key in value if key not in shape and ... in shape]
        parts = [(str(key), value.get(key), shape.get(key, shape.get(...))) for key in keys]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return at
        parts = [(str(number), item, shape[0]) for number, item in enumerate(value)]
    elif isinstance(shape, tuple):
        return None if any(misfit(value, entry) is None for entry in shape) else at
    else:
        same = type(value) is shape or (shape is float and type(value) is int)
        return None if same else at
    prefix = "" if at == "the whole" else f"{at}."
    return next(
        filter(None, (misfit(item, expected, prefix + key) for key, item, expected in parts)), None
    )


def read_record(kind: type[Record], data: Mapping[str, Any]) -> Record:
    """Build a dataclass from a JSON object whose values have the types of its fields.

    Keys that it does not have are ignored. Raises ``ValueError`` that names the field.
    """
    values: dict[str, Any] = {}
    hints = _hints(kind)  # type: ignore[arg-type]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in data:
            values[field.name] = _converted(data[field.name], hints[field.name], field.name)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"it has no {field.name!r}")
    return kind(**values)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds (None for an empty one).

    Raises ``InputError`` with file and line for what is not YAML, and for a missing file.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise InputError(f"There is no configuration file {path}: check the path.") from None
    return parse_yaml(text, where=path)


def parse_yaml(text: str, *, where: str | Path) -> Any:
    """Return what a YAML text holds; ``DocumentError`` begins with ``where`` and names the line."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        place = f"{where}:{error.problem_mark.line + 1}" if error.problem_mark else where
        raise DocumentError(place, f"is not valid YAML: {error.problem}") from None
    except yaml.YAMLError:
        raise DocumentError(
            where, "is not valid YAML: it has a character that no text has"
        ) from None
    except RecursionError:
        raise DocumentError(where, _TOO_DEEP) from None
    except (ValueError, TypeError, AttributeError, OverflowError):  # a scalar its tag cannot make
        problem = "has a number, date or tag that cannot be read"
        raise DocumentError(where, problem) from None
    return _checked(value, where)


_hints = cache(get_type_hints)


def _converted(value: Any, hint: Any, name: str) -> Any:  # noqa: PLR0911 (a line per kind of type)
    """Return a JSON value as the annotated type, of those that records have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _converted(
            value, next(argument for argument in arguments if argument is not NoneType), name
        )
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return read_record(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(item, arguments[0], name) for item in value)
    if origin is Literal and any(value == choice for choice in arguments):
        return value
    if origin is not None and origin not in (tuple, Literal) and isinstance(value, dict):
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if hint in (int, str) and type(value) is hint:
        return value
    raise ValueError(f"{name!r} has another kind of value than it should")


_OTHER = "give another path"
_ONE = "keep one of them"
_TOO_DEEP = f"has more than {MOST_LEVELS} levels of lists and objects inside each other"


class _RepeatedKeyError(Exception):
    """A JSON object has this key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return mapping


def _checked(value: Any, where: str | Path, *, finite: bool = False) -> Any:
    """Refuse a value with too many levels, or with text that cannot be written as UTF-8."""
    if _deeper_than(value, MOST_LEVELS):
        raise DocumentError(where, _TOO_DEEP)
    for leaf in _leaves(value, where):
        if isinstance(leaf, float) and finite and not math.isfinite(leaf):
            raise DocumentError(where, "holds a number that is not finite")
        try:
            if isinstance(leaf, str):
                leaf.encode()
        except UnicodeEncodeError:
            raise DocumentError(where, "holds half of a surrogate pair, which is no text") from None
    return value


def _deeper_than(value: Any, levels: int) -> bool:
    """Whether a value has more levels; a value that holds itself has."""
    here = [value]
    for _ in range(levels + 1):
        inner: dict[int, Any] = {}  # of aliases of YAML, each once
        for item in here:
            inside = item.values() if isinstance(item, dict) else item
            if isinstance(item, dict | list):
                inner |= {id(v): v for v in inside if isinstance(v, dict | list)}
        if not inner:
            return False
        here = list(inner.values())
    return True


def _leaves(value: Any, where: str | Path) -> list[Any]:
    """Return the values of a value with few levels, keys included, its aliases written out."""
    leaves, rest, count = [], [value], 0
    while rest:
        item = rest.pop()
        count += 1
        if count > MOST_VALUES:
            raise DocumentError(where, f"has more than {MOST_VALUES:,} values")
        if isinstance(item, list):
            rest += item
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        else:
            leaves.append(item)
    return leaves


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else "the system gives no reason"
    return "its name cannot be a file's"


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a text", key.start_mark
                )
            if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


# The resolvers of YAML 1.1 are inherited by class attribute; an empty one of our own hides them.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"(~|null|Null|NULL)?$", ["~", "n", "N", ""]),
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", list("-+.")),
    ("merge", r"<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
