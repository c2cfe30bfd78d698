"""Writing files so that a kill, a full disk or a second process never leaves half of one behind."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pvec.errors import StoreError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock; two writers are then not noticed
    fcntl = None  # type: ignore[assignment]

_SPARE_BYTES = 64 * 2**20
"""What must be free before a job starts: less than this and it would soon stop half-way."""

_REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file has reached the largest size allowed; raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission is denied; choose a folder that you may write to",
    errno.EPERM: "it is not permitted; choose a folder that you may write to",
    errno.ENOTDIR: "a part of that path is a file, not a folder; choose another path",
    errno.EISDIR: "that is a folder, not a file; choose another path",
}


def store_error(path: Path, exc: OSError) -> StoreError:
    """Turn an ``OSError`` met while writing ``path`` into one sentence with the remedy."""
    reason = _REMEDIES.get(exc.errno or 0, f"{exc.strerror or exc}; choose another path")
    return StoreError(f"cannot write {path}: {reason}.")


def os_error_sentence(error: OSError) -> str:
    """Return an ``OSError`` that nobody handled as one sentence with the remedy."""
    reason = " ".join(str(error.strerror or error).split()) or type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError):
        return f"The connection failed ({reason}): check the network and the server, and try again."
    if error.filename is None and error.errno is None:
        return f"A file or connection could not be used ({reason}): check it and try again."
    what = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    remedy = _REMEDIES.get(error.errno or 0, "check the path")
    return f"cannot read or write {what} ({reason}): {remedy}."


def probe_writable(folder: Path, *, need_bytes: int = _SPARE_BYTES) -> None:
    """Create ``folder`` and make sure that a file can be written in it.

    Called before a model is loaded. Raises ``StoreError`` for a read-only or full disk, a path
    through a file, or fewer than ``need_bytes`` bytes free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, prefix=".probe.") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
        free = shutil.disk_usage(folder).free
    except FileExistsError as exc:
        raise StoreError(
            f"cannot write into {folder}: that is a file; choose another path."
        ) from exc
    except OSError as exc:
        raise store_error(folder, exc) from exc
    if free < need_bytes:
        raise StoreError(
            f"cannot write into {folder}: only {free / 2**20:.0f} MiB are free and "
            f"{need_bytes / 2**20:.0f} MiB are needed; free some space or choose another folder."
        )


def probe_target(path: Path) -> None:
    """Make sure that ``atomic_write`` can write ``path``: called before anything is computed.

    Raises ``StoreError`` as ``probe_writable`` does for its folder, and for a folder, a pipe or a
    device in its place.
    """
    _refuse_special(path)
    probe_writable(path.parent)


@contextlib.contextmanager
def atomic_write(
    path: str | Path, *, mode: str = "wb", aside: Path | None = None
) -> Iterator[IO[Any]]:
    """Open a file beside ``path`` for writing and put it in place when the block ends well.

    Whoever looks at ``path`` sees the old file or the new one, whole. ``mode`` is ``"wb"`` or
    ``"w"`` (UTF-8, newlines as written). ``aside`` is another folder of the same disk for the file
    in the making. A link keeps pointing where it did, and an existing
    file's permissions stay. Raises ``StoreError`` when the disk is full or read-only, and for a
    pipe or a device, which it would replace.
    """
    target = Path(os.path.realpath(path))
    _refuse_special(target)
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished, lock = _begin_file(target, aside or target.parent)
    except OSError as exc:
        raise store_error(target, exc) from exc
    try:
        with open(descriptor, mode, encoding=encoding, newline=newline) as stream:  # noqa: PTH123
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.chmod(_permissions(target))
        unfinished.replace(target)
        _sync_folder(target.parent)
    except OSError as exc:
        raise store_error(target, exc) from exc
    finally:
        unfinished.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Let at most one process write what this lock guards; it goes when its process ends.

    The file at ``path`` holds the owner's process id, for the message that the second one gets. It
    stays: removing it would race with the next owner. Raises ``StoreError`` naming the process that
    holds the lock.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        raise store_error(path, exc) from exc
    try:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise StoreError(
                f"{path.parent} is being written by another pvec process (pid {owner}); "
                "wait for it to finish or stop it, then run the same command again."
            ) from exc
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            raise store_error(path, exc) from exc
        yield
    finally:
        os.close(descriptor)


def _begin_file(target: Path, folder: Path) -> tuple[int, Path, int | None]:
    """Begin the file that will replace ``target``; return its descriptor, its path and its lock.

    What killed writers of ``target`` left in ``folder`` is removed: nobody holds its lock.
    """
    prefix, suffix = f".{target.name}.", ".tmp"
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=suffix)
        lock = None
        if fcntl is not None:
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            lock = os.dup(descriptor)
            for path in folder.glob(f"{glob.escape(prefix)}*{suffix}"):
                _remove_abandoned(path)
        if os.fstat(descriptor).st_nlink or lock is None:
            return descriptor, Path(name), lock
        os.close(descriptor)  # another writer took it for abandoned before it was locked
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Delete a file in the making unless somebody holds its lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def _refuse_special(path: Path) -> None:
    """Raise ``StoreError`` for what is there but is no regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # not there, or what writing will name
        return
    if stat.S_ISDIR(mode):
        raise store_error(path, OSError(errno.EISDIR, os.strerror(errno.EISDIR)))
    if not stat.S_ISREG(mode):
        raise StoreError(f"cannot write {path}: it is a pipe or a device; choose another path.")


def _permissions(target: Path) -> int:
    """Return the mode that the replaced file has, or what a new file would get here."""
    try:
        return target.stat().st_mode & 0o7777
    except FileNotFoundError:
        # mkstemp makes 0600; a new file should have what open() would have given it
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
