"""What the libraries that load models say: errors as one sentence, no bars, no advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pvec.errors import ModelError

Loaded = TypeVar("Loaded")


def explained(load: Callable[[], Loaded], *, problem: str, remedy: str) -> Loaded:
    """Return ``load()``; what the libraries raise becomes one sentence (``ModelError``)."""
    from safetensors import SafetensorError

    from pvec.models.memory import is_out_of_memory

    try:
        return load()
    except (
        *(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ImportError),
        *(RuntimeError, MemoryError, SafetensorError),
    ) as error:
        if is_out_of_memory(error):
            remedy = "there is not enough memory; use a smaller model or dtype"
        lines = [line.strip() for line in str(error).strip().split("\n")]
        first = next((line for line in lines if not line.endswith(":")), lines[0])[:300]
        raise ModelError(f"{problem} ({first or type(error).__name__}): {remedy}.") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' own progress bars and advice while loading."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
