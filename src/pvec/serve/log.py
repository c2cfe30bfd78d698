"""The log of a server: a line of JSON for every whole answer, in files that are rotated."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from pvec.closing import Closing
from pvec.errors import InputError
from pvec.runs.files import os_error_sentence

_BYTES, _FILES = 64 << 20, 5


class AnswerLog(Closing):
    """Writes to ``path``; what is full becomes ``path.1``, ``path.2``, …, of which five are kept.

    With ``text`` a line has the rendered ``prompt`` and the ``answer``, as ``pvec project`` reads
    them; without, nothing that a user wrote or read. Raises ``InputError`` when the file cannot be
    written.
    """

    def __init__(self, path: Path, *, text: bool) -> None:
        self.text = text
        try:
            self._file = _File(path, maxBytes=_BYTES, backupCount=_FILES, encoding="utf-8")
        except OSError as error:
            raise InputError(f"--log: {os_error_sentence(error)}") from None

    def write(self, line: dict[str, Any]) -> bool:
        """Append a line; False when it could not be written."""
        self._file.failed = False
        message = json.dumps(line, ensure_ascii=False)
        self._file.handle(logging.LogRecord("pvec.serve", logging.INFO, "", 0, message, None, None))
        return not self._file.failed

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _File(RotatingFileHandler):
    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        self.failed = True
