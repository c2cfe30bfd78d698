"""What is never stored or shown: keys, and passwords and query strings of URLs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_SECRET_ENDINGS = ("api_key", "api-key", "token", "secret", "password", "authorization")
_URL = re.compile(r"""(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<rest>[^\s'"<>]*)""", re.IGNORECASE)
_HIDDEN = "***"


def safe_url(text: str) -> str:
    """Return ``text`` with every URL in it cut to scheme, host, port and path.

    >>> safe_url("https://me:secret@host:8000/v1?key=abc#top")
    'https://host:8000/v1'
    """
    return _URL.sub(_without_private_parts, text)


def without_secrets(value: Any) -> Any:
    """Return JSON-like ``value`` without secrets: texts under keys such as ``api_key`` are replaced
    by ``"***"``, URLs are cut to what ``safe_url`` leaves.

    A second line of defence: callers should not pass keys in the first place.
    """
    if isinstance(value, Mapping):
        return {
            key: _HIDDEN
            if isinstance(item, str) and item and _names_secret(str(key))
            else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return safe_url(value) if isinstance(value, str) else value


def safe_command(arguments: Sequence[str]) -> list[str]:
    """Return a command line without the value of any option or key that is named as a secret.

    The value may follow the name, or stand behind an equals sign (``judge.api_key=VALUE``).
    """
    safe: list[str] = []
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if equals and _names_secret(name):
            safe.append(f"{name}={_HIDDEN}")
        elif safe and safe[-1].startswith("--") and "=" not in safe[-1] and _names_secret(safe[-1]):
            safe.append(_HIDDEN)
        else:
            safe.append(safe_url(argument))
    return safe


def _names_secret(name: str) -> bool:
    return name.lower().endswith(_SECRET_ENDINGS)


def _without_private_parts(match: re.Match[str]) -> str:
    # Not urlsplit: what is no valid URL must not show its password either.
    place = re.split(r"[?#]", match["rest"], maxsplit=1)[0]
    host, slash, path = place.partition("/")
    if "@" in path:  # a password may hold a slash
        host, slash, path = place.rpartition("@")[2].partition("/")
    return f"{match['scheme']}{host.rpartition('@')[2]}{slash}{path}"
