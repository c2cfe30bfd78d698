"""An append-only log of JSON objects, one per line.

Every appended line has reached the operating system when ``append`` returns, so a killed process
loses nothing that was finished; the disk follows at most ``sync_seconds`` later. A line cut short
by a kill or a power failure is removed when the log is opened again, and the caller is told.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pvec.closing import Closing
from pvec.documents import check_regular, parse_record
from pvec.errors import StoreError
from pvec.runs.files import store_error

_BLOCK = 1 << 16


class JsonlLog(Closing):
    """An open log; use it as a context manager. One writer at a time: the run's lock sees to it.

    ``note`` says in one sentence what was repaired on opening, or is empty.
    """

    def __init__(
        self, path: str | Path, *, sync_every: int = 256, sync_seconds: float = 2.0
    ) -> None:
        """Open ``path`` for appending, creating it if need be.

        Raises ``StoreError`` when it cannot be written.
        """
        self.path = Path(path)
        self.note = ""
        self._sync_every = sync_every
        self._sync_seconds = sync_seconds
        self._unsynced = 0
        self._synced_at = time.monotonic()
        try:
            self._descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            self._mend_tail()
        except OSError as exc:
            raise store_error(self.path, exc) from exc

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one object as a line; when this returns, a kill can no longer lose it.

        Raises ``StoreError`` on a full disk; the log then ends with the last whole line.
        """
        line = encode_line(record)
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            self._write(line)
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            raise store_error(self.path, exc) from exc
        self._unsynced += 1
        late = time.monotonic() - self._synced_at >= self._sync_seconds
        if late or self._unsynced >= self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Make everything appended so far survive a power cut too."""
        try:
            os.fsync(self._descriptor)
        except OSError as exc:
            raise store_error(self.path, exc) from exc
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and close. Closing twice is harmless."""
        if self._descriptor < 0:
            return
        try:
            if self._unsynced:
                self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, line: bytes) -> None:
        """Write all of ``line``; a disk that fills up may take a part of it first."""
        view = memoryview(line)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _mend_tail(self) -> None:
        """Cut a last line that a kill left unfinished, or end one that lacks only its newline."""
        size = os.fstat(self._descriptor).st_size
        tail = _unterminated_tail(self._descriptor, size)
        if not tail:
            return
        if parse_record(tail) is not None:
            self._write(b"\n")
            return
        os.ftruncate(self._descriptor, size - len(tail))
        self.note = (
            f"{self.path.name} ended in the middle of a line ({len(tail)} bytes, left by a kill or "
            "a full disk); that line was removed and is done again"
        )


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` lazily; line numbers start at 1, blank lines are skipped.

    An unfinished last line (a writer is at work, or was killed) is not yielded. Any other line that
    is not a JSON object raises ``StoreError`` naming file and line. A missing file is empty.
    """
    path = Path(path)
    check_regular(path)
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                record = parse_record(line)
                if record is not None:
                    yield number, record
                elif line.endswith(b"\n"):
                    raise StoreError(
                        f"{path}:{number} is not a JSON object; restore the file from a copy, or "
                        "delete that line and run the same command again to redo it."
                    )
    except FileNotFoundError:
        return


def encode_line(record: Mapping[str, Any]) -> bytes:
    """Return ``record`` as one line of UTF-8 JSON, newline included."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _unterminated_tail(descriptor: int, size: int) -> bytes:
    """Return what follows the last newline, reading backwards block by block."""
    tail = b""
    start = size
    while start > 0:
        length = min(_BLOCK, start)
        start -= length
        block = os.pread(descriptor, length, start)
        newline = block.rfind(b"\n")
        if newline >= 0:
            return block[newline + 1 :] + tail
        tail = block + tail
    return tail
