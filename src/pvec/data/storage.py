"""Files wherever they are: paths of this machine, and URLs (``s3://``, ``gs://``, ``hf://``) that
fsspec opens.

Every failure of a store is an ``InputError`` or ``StoreError`` of one sentence.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pvec.errors import InputError, PvecError, StoreError, install_command
from pvec.runs.files import atomic_write, store_error

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")
"""At least two letters, as ``C:/`` is a drive; ``Path`` makes one slash of two."""

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
_VERSIONS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "updated", "last_modified")
"""What stores call that which changes with a file's content."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a store: its path or URL, its size in bytes, and what changes with its content."""

    path: str
    size: int
    version: str


def url_of(path: str | Path) -> str | None:
    """Return the URL that ``path`` is, or None for a path of this machine.

    >>> url_of(Path("s3://bucket/data.jsonl"))
    's3://bucket/data.jsonl'
    """
    match = _URL.match(str(path))
    return None if match is None else f"{match[1]}://{str(path)[match.end() :]}"


def location(path: str | Path) -> str:
    """Return the URL, or the absolute path, by which every process of this machine finds it."""
    return url_of(path) or str(Path(path).expanduser().resolve())


def join(folder: str, name: str) -> str:
    """Return the location of ``name`` in ``folder``."""
    return f"{folder.rstrip('/')}/{name}"


def open_file(path: str | Path) -> IO[bytes]:
    """Open a file for reading. Raises ``InputError`` for a URL that cannot be read."""
    url = url_of(path)
    if url is None:
        return Path(path).open("rb")
    with storage_errors(url, "read"):
        system, inner = _system(url)
        stream: IO[bytes] = io.BufferedReader(_Remote(system.open(inner, "rb"), url), 2**20)
        return stream


def read_files(locations: Sequence[str]) -> dict[str, bytes]:
    """Return the content of small files of one folder, by location; stores read them at once."""
    if not locations:
        return {}
    with storage_errors(locations[0], "read"):
        if url_of(locations[0]) is None:
            return {name: Path(name).read_bytes() for name in locations}
        system, _ = _system(locations[0])
        inner = {system._strip_protocol(name): name for name in locations}  # noqa: SLF001 (fsspec's own use)
        several = len(inner) > 1  # of one location fsspec returns the content alone
        read = system.cat(list(inner)) if several else {n: system.cat_file(n) for n in inner}
        return {inner[name]: content for name, content in read.items()}


def write_file(place: str, content: bytes) -> None:
    """Write a file as a whole: aside and renamed here, one object at a time in a store.

    Raises ``StoreError`` where it cannot be written.
    """
    url = url_of(place)
    if url is None:
        with atomic_write(place) as stream:
            stream.write(content)
        return
    with storage_errors(url, "write"):
        system, inner = _system(url)
        system.pipe_file(inner, content)


def list_files(folder: str | Path) -> list[StoredFile]:
    """Return the files of a folder and the folders in it, sorted; or the file itself.

    Names that begin with a dot or an underscore are left out, as other readers of such folders do.
    Empty where there is nothing. Raises ``InputError`` for a store that cannot be read.
    """
    place = location(folder)
    with storage_errors(place, "read"):
        system, inner = _system(place)
        try:
            entries: dict[str, Any] = system.find(inner, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        scheme = (url_of(place) or "").partition("://")[0]
        return [
            StoredFile(
                path=f"{scheme}://{name}" if scheme else name,
                size=int(entry["size"]),
                version=next((str(entry[key]) for key in _VERSIONS if entry.get(key)), ""),
            )
            for name, entry in sorted(entries.items())
            if entry.get("type") == "file" and not _is_hidden(name, within=inner)
        ]


def names_in(folder: str) -> set[str]:
    """Return the names of what is in ``folder``, hidden or not; empty where there is none."""
    with storage_errors(folder, "read"):
        system, inner = _system(folder)
        try:
            listed = system.ls(inner, detail=False, refresh=True)
        except FileNotFoundError:
            return set()
        return {PurePosixPath(name).name for name in listed if name.rstrip("/") != inner}


def stamp_of(path: str | Path) -> list[str | int]:
    """Return what tells a file from a changed one: its place, size and time or version."""
    if url_of(path) is None:
        status = Path(path).stat()
        return [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]
    return [part for f in list_files(path) for part in (f.path, f.size, f.version)]


@contextmanager
def storage_errors(place: str, doing: str) -> Iterator[None]:
    """Turn whatever a store's package raises into one sentence: reading ``InputError``, writing
    ``StoreError``.
    """
    try:
        yield
    except PvecError:
        raise
    except ImportError as error:
        scheme = place.partition("://")[0]
        extra = _EXTRAS.get(scheme)
        remedy = install_command(extra) if extra else str(error)
        raise InputError(f"{scheme}:// needs another package: {remedy}.") from error
    except Exception as error:  # every store's package has exceptions of its own
        if isinstance(error, OSError) and url_of(place) is None:
            raise store_error(Path(place), error) from error
        kind = InputError if doing == "read" else StoreError
        raise kind(f"cannot {doing} {place}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"there is no such file, folder or bucket ({text}); check the URL."
    name = type(error).__name__
    if isinstance(error, PermissionError) or "Credential" in name or "Token" in name:
        return f"access is denied ({text}); check the credentials of the store."
    if isinstance(error, ValueError) and "Protocol not known" in text:
        return "no package of fsspec opens such URLs; use s3://, gs:// or hf://."
    return f"{text}; check the store and the network, then run the same command again."


def _system(place: str) -> tuple[Any, str]:
    """Return the file system of a location and the location within it."""
    import fsspec

    system, inner = fsspec.core.url_to_fs(place)
    return system, str(inner)


def _is_hidden(name: str, *, within: str) -> bool:
    parts = PurePosixPath(name.removeprefix(within)).parts
    return any(part.startswith((".", "_")) for part in parts)


class _Remote(io.RawIOBase):
    """A file of fsspec whose failures are sentences."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._url, "read"):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
