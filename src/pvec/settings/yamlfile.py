"""A YAML reader with the scalars of YAML 1.2.

PyYAML reads YAML 1.1, where ``layer: 12:24:2`` is the number 44642 (base 60), ``off`` is False,
``010`` is 8 and ``1e-4`` is a text, and where the second of two equal keys silently wins. Here
plain values follow the core schema of YAML 1.2, and a repeated key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pvec.errors import InputError


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds (None for an empty one).

    Raises ``InputError`` with file and line for what is not YAML, and for a missing file.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 (a safe loader)
    except FileNotFoundError:
        raise InputError(f"There is no configuration file {path}.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise InputError(f"{where} is not valid YAML: {error.problem}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from None


def parse_yaml(text: str, *, where: str) -> Any:
    """Return what a text holds, by the same rules; ``InputError`` begins with ``where``."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError:
        raise InputError(f"{where}: {text!r} is not valid YAML.") from None


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value)
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
