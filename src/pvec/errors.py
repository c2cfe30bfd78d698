"""The errors that pvec raises on purpose.

    PvecError                 the user can fix it: one sentence with the remedy, exit code 2
    ├── InputError            a wrong file, option or setting, refused before a model is loaded
    ├── ModelError            the model, adapter, tokenizer or vector does not fit
    │   └── ModelMemoryError  not even a single row fits into the device's memory
    ├── SteeringError         requested steering did not apply (never a warning)
    ├── JudgeError            the judge refused, is unreachable or scored nothing
    └── StoreError            a run folder that is damaged, locked or of another configuration

Anything else that escapes is a bug in pvec and exits with code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PvecError(Exception):
    """An error that the user can fix. The message is one plain sentence with the remedy."""


class InputError(PvecError, ValueError):
    """A file, option or setting that is wrong."""


class ModelError(PvecError):
    """The model, adapter, tokenizer or vector does not fit the request."""


class ModelMemoryError(ModelError):
    """A single row does not fit into the memory of the device."""


class SteeringError(PvecError):
    """Requested steering did not apply."""


class JudgeError(PvecError):
    """The judge refused the key, cannot be reached, or scored nothing."""


class StoreError(PvecError):
    """A run folder is damaged, locked, or belongs to another configuration."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x' or 'y'?"`` for the nearest known words, or an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    if not nearest:
        return ""
    return f" Did you mean {' or '.join(repr(n) for n in nearest)}?"


def install_command(extra: str) -> str:
    """Return the command that installs an optional part of pvec, which comes as a source folder.

    >>> install_command("vllm")
    "pip install '.[vllm]' (in the folder of pvec's source)"
    """
    return f"pip install '.[{extra}]' (in the folder of pvec's source)"
