"""Where projected and filtered files go, and what is kept beside them until they are whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from pvec.data.storage import url_of
from pvec.errors import InputError, PvecError, StoreError
from pvec.projection.inputs import Source, is_same_file
from pvec.projection.token_output import token_folder
from pvec.runs.files import WriterLock, atomic_write, probe_target
from pvec.runs.jsonl import read_jsonl
from pvec.runs.manifest import read_manifest
from pvec.runs.summary import TOKENS_KIND
from pvec.types import OutputOptions


def output_path(source: Source, output: OutputOptions) -> Path:
    """Return where the projected file goes. Raises ``InputError`` for a place that cannot be."""
    table = source.table
    if output.in_place:
        if output.out is not None:
            raise InputError("--in-place and --out were both given: choose one.")
        if not table.replaceable:
            raise InputError(
                f"{source.path} is not one file, so --in-place cannot replace it: omit it, and the "
                f"results go to {table.output}."
            )
        return source.path
    target = output.out or table.output
    if url_of(target) is not None:
        raise InputError(f"--out {url_of(target)} needs --engine ray; without it give a file here.")
    if is_same_file(target, source.path):
        raise InputError(
            f"{target} is the input itself: give another --out, or --in-place to replace it."
        )
    if target.is_dir():
        raise InputError(f"--out {target} is a folder: give the output a name.")
    if target.suffix != table.output.suffix:
        raise InputError(
            f"{target} will be of the format of {source.path}: give --out a name that ends in "
            f"{table.output.suffix}."
        )
    return target


def require_free(target: Path, output: OutputOptions) -> None:
    """Raise ``InputError`` or ``StoreError`` where the output cannot be written."""
    probe_target(target)
    tokens = token_folder(target)
    if output.tokens and tokens.exists():
        if not output.overwrite:
            raise InputError(f"{tokens} is there already: give --overwrite to replace it.")
        if not _holds_tokens(tokens):
            raise InputError(f"{tokens} holds no tokens of pvec and is not replaced: rename it.")
    if target.exists() and not (output.in_place or output.overwrite):
        raise InputError(
            f"{target} is there already: give --overwrite to replace it, --out for another place, "
            f"or add columns to it with `pvec project {target} --in-place`."
        )


def filtered_paths(source: Source, *, overwrite: bool) -> tuple[Path, Path]:
    """Return where the kept rows and the removed ones go, beside the input.

    Raises ``InputError`` where something is there already that ``overwrite`` does not replace.
    """
    output = source.table.output
    stem, suffix = Path(output.name.replace(".projected", "")).stem, output.suffix
    kept, removed = (output.with_name(f"{stem}.{name}{suffix}") for name in ("kept", "removed"))
    for target in (kept, removed):
        if is_same_file(target, source.path):
            raise InputError(f"{target} is the input itself: rename the input.")
        if target.exists() and not overwrite:
            raise InputError(f"{target} is there already: give --overwrite to replace it.")
        probe_target(target)
    return kept, removed


def write_filtered(paths: tuple[Path, Path], source: Source, *, removed: np.ndarray) -> None:
    """Write the rows of ``source`` as they are to the first path, the removed to the second."""
    with ExitStack() as stack:
        writers = []
        for path in paths:
            stream = stack.enter_context(atomic_write(path))
            writers.append(stack.enter_context(source.table.writer(stream, columns=())))
        for (row, _), gone in zip(source.rows(), removed.tolist(), strict=True):
            writers[gone].write(row, {})


def _holds_tokens(folder: Path) -> bool:
    try:
        return bool(read_manifest(folder)["kind"] == TOKENS_KIND)
    except StoreError:
        return False


@contextmanager
def open_workplace(target: Path) -> Iterator[Path]:
    """Keep what is finished in a hidden folder beside the output until all of it is.

    It stays when the job stops half-way, and a job for the same output waits its turn.
    """
    real = target.resolve()  # the output is moved from here, which takes the same disk
    folder = real.with_name(f".{real.name}.pvec")
    folder.mkdir(exist_ok=True)
    with WriterLock(folder / ".lock"):
        for torn in folder.glob("*.tmp"):
            torn.unlink()
        try:
            yield folder
        except PvecError:
            if next(islice(read_jsonl(folder / "chunks.jsonl"), 1, None), None) is None:
                shutil.rmtree(folder)  # nothing was projected that would be worth keeping
            raise
        shutil.rmtree(folder)
