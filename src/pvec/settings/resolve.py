"""Where settings come from: command line, environment, configuration file, defaults.

They are merged field by field in that order, so that a file may set one key of a section and the
command line another. An unknown name is refused with the nearest known ones; an old name of a
setting (``RENAMED``) is accepted with a note that says the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pvec.errors import InputError, did_you_mean
from pvec.settings.tree import ENV_PREFIX, RENAMED, Settings, env_name, fields, value_of

CONFIG_FILE = Path("pvec.yaml")
"""Read from the working directory when it is there and ``--config`` names no other."""

OTHER_ENV_NAMES = frozenset({"PVEC_TEST_DATA"})
"""``PVEC_`` names that are not settings: the folder of real files that some tests read."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """The settings of one command, and by dotted path where each value came from.

    An origin is ``command line``, ``environment PVEC_…``, ``.env``, the configuration file's path,
    or ``default``.
    """

    settings: Settings
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """What the user should know about the names that were given: old ones and their new names."""

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Yield ``(dotted path, value, origin)`` of every setting; secrets come masked."""
        for path, origin in self.origins.items():
            yield path, value_of(self.settings, path), origin


def resolve(
    cli: Mapping[str, Any] | None = None,
    *,
    config_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    dotenv: frozenset[str] = frozenset(),
) -> Resolved:
    """Merge command line, environment, configuration file and defaults into one tree.

    ``cli`` maps dotted paths to values. ``config_file`` must exist when it is given; without it
    ``pvec.yaml`` is read if it exists. ``environ`` is ``os.environ`` unless given; ``dotenv``
    names those of its variables that a ``.env`` file put there (see ``load_dotenv``).

    Raises ``InputError`` for an unknown name, an invalid value, or an unreadable file.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(fields(), "default")
    notes: list[str] = []
    for given, value, origin in (
        *_from_file(config_file),
        *_from_environment(os.environ if environ is None else environ, dotenv),
        *((path, value, "command line") for path, value in (cli or {}).items()),
    ):
        path = RENAMED.get(given, given)
        if path != given:
            notes.append(f"{given} ({origin}) is now called {path}: use the new name")
        if path != given and origins[path] == origin:
            raise InputError(f"{path} and its old name {given} are both set ({origin}): keep one.")
        values[path] = value
        origins[path] = origin
    try:
        settings = Settings(**nest(values))
    except ValidationError as error:
        raise InputError(_sentence(error, origins)) from None
    return Resolved(settings=settings, origins=origins, notes=tuple(notes))


def override(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return ``settings`` with the values of some dotted paths replaced.

    Raises ``InputError`` for a value that does not fit.
    """
    values = {path: value_of(settings, path) for path in fields()} | dict(changes)
    try:
        return Settings(**nest(values))
    except ValidationError as error:
        raise InputError(_sentence(error, dict.fromkeys(fields(), "argument"))) from None


def load_dotenv(
    path: Path = Path(".env"), *, environ: MutableMapping[str, str] | None = None
) -> frozenset[str]:
    """Put what ``.env`` sets into the environment, where other libraries find their keys too.

    Names that the environment already sets stay as they are. Returns the names that were added.
    """
    environ = os.environ if environ is None else environ
    if not path.is_file():
        return frozenset()
    from dotenv import dotenv_values

    try:
        written = dotenv_values(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); correct it or move it away.") from None
    added = {name: text for name, text in written.items() if text and name not in environ}
    environ.update(added)
    return frozenset(added)


def _from_environment(
    environ: Mapping[str, str], dotenv: frozenset[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings that ``PVEC_`` names set; an empty text counts as not set."""
    paths = {env_name(path): path for path in (*fields(), *RENAMED)}
    texts: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, text in environ.items():
        if not name.upper().startswith(ENV_PREFIX) or name in OTHER_ENV_NAMES:
            continue
        if name not in paths:
            where = " (in .env)" if name in dotenv else ""
            raise InputError(
                f"{name}{where} is an unknown setting.{did_you_mean(name.upper(), paths)}"
                " `pvec config` lists all settings."
            )
        path = RENAMED.get(paths[name], paths[name])
        if text and path in names:
            raise InputError(f"{name} and {names[path]} are the same setting: keep one.")
        if text:
            names[path] = name
            texts[env_name(path).lower()] = _json_list(fields()[path], text)
    for path, value in _flatten(_read_texts(texts) if texts else {}):
        name = names[path]
        origin = ".env" if name in dotenv else f"environment {name}"
        yield paths[name], _choice(fields()[path], value), origin


def _read_texts(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of environment names (in lower case) as a tree of settings."""
    from pydantic_settings import BaseSettings, EnvSettingsSource  # 0.1 s, and rarely needed

    class Environment(BaseSettings, Settings):  # type: ignore[misc]  # our frozen config wins
        pass

    source = EnvSettingsSource(Environment, env_prefix=ENV_PREFIX, env_nested_delimiter="__")
    source.env_vars = texts
    return source()


def _json_list(field: FieldInfo, text: str) -> str:
    """Return the text of a list as pydantic-settings reads it: ``3,4`` and ``[3, 4]`` as JSON."""
    if get_origin(field.annotation) is not tuple:
        return text
    parts = text.strip().strip("[]").split(",")
    return json.dumps([part.strip() for part in parts if part.strip()])


def _choice(field: FieldInfo, value: Any) -> Any:
    """Return the choice that a text stands for: some choices are numbers."""
    if get_origin(field.annotation) is not Literal:
        return value
    return {str(choice): choice for choice in get_args(field.annotation)}.get(str(value), value)


def _from_file(config_file: Path | None) -> Iterator[tuple[str, Any, str]]:
    """Yield the settings of the configuration file, refusing unknown keys."""
    path = config_file or CONFIG_FILE
    if config_file is None and not path.is_file():
        return
    from pvec.documents import read_yaml  # help needs neither YAML nor .env

    tree = read_yaml(path)
    if tree is None:
        return
    if not isinstance(tree, Mapping):
        raise InputError(f"{path} must hold sections such as `model:`, not a bare value.")
    for dotted, value in _flatten(tree):
        if dotted in {name.split(".")[0] for name in fields()}:
            if value is not None:
                raise InputError(f"{dotted} in {path} is a section; give its keys, not {value!r}.")
        elif dotted not in fields() and dotted not in RENAMED:
            raise InputError(
                f"{path} has an unknown key {dotted!r}.{did_you_mean(dotted, fields())}"
                " `pvec config` lists all settings."
            )
        else:
            yield dotted, value, str(path)


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, value)`` of the leaves; a mapping that is a setting's value stays."""
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path not in fields():
            yield from _flatten(value, f"{path}.")
        else:
            yield path, value


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of dotted paths as a tree."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[name] = value
    return tree


def _sentence(error: ValidationError, origins: Mapping[str, str]) -> str:
    """Say in one sentence which settings do not fit, what they were, and where they came from."""
    parts = []
    for item in error.errors(include_url=False):
        path = ".".join(str(step) for step in item["loc"])
        while path not in origins and "." in path:  # below a list or mapping
            path = path.rpartition(".")[0]
        secret = path in fields() and "SecretStr" in str(fields()[path].annotation)
        value = "" if secret else f" = {item['input']!r}"
        message = item["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        parts.append(f"{path}{value} (from {origins.get(path, 'the settings')}): {message}")
    return "; ".join(parts) + "."
