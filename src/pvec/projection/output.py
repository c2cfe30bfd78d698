"""Where projected and filtered files go, and what is kept beside them until they are whole.

``pvec project --tokens`` also writes every token's projections, in a folder beside the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np

from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify
from pvec.data.conversations import Chat, Conversation, Pair
from pvec.data.storage import url_of
from pvec.data.table import Row
from pvec.errors import InputError, PvecError, StoreError
from pvec.models.token_text import TokenTexts
from pvec.projection.inputs import Source
from pvec.projection.projector import AnswerTokens, LoadedVectors
from pvec.runs.files import atomic_write, probe_target, writer_lock
from pvec.runs.jsonl import read_jsonl
from pvec.runs.manifest import read_manifest
from pvec.runs.store import Run
from pvec.runs.summary import TOKENS_KIND, write_summary
from pvec.runs.tokens import TokenRecord, write_tokens
from pvec.settings import Settings
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
    if _is_same_file(target, source.path):
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
        if _is_same_file(target, source.path):
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


def _is_same_file(first: Path, second: Path) -> bool:
    """Whether two paths are one file, links followed."""
    with suppress(OSError):
        return first.samefile(second)
    return False


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
    with writer_lock(folder / ".lock"):
        for torn in folder.glob("*.tmp"):
            torn.unlink()
        try:
            yield folder
        except PvecError:
            if next(islice(read_jsonl(folder / "chunks.jsonl"), 1, None), None) is None:
                shutil.rmtree(folder)  # nothing was projected that would be worth keeping
            raise
        shutil.rmtree(folder)


# ── single tokens ───────────────────────────────────────────────────────────────────────────────


def token_folder(target: Path) -> Path:
    """Return the folder of the tokens that belong to the projected file ``target``."""
    return target.with_name(f"{target.name.removesuffix(target.suffix)}.tokens")


def token_settings(settings: Settings, *, notify: Notify) -> Settings:
    """Return settings under which single tokens can be kept.

    Raises ``InputError`` for settings that exclude it.
    """
    options, name = settings.project, settings.backend.name
    if "proj" not in options.span_types:
        raise InputError(
            "--tokens keeps the type proj of every token: add --projection-type proj (and answer "
            "to --spans)."
        )
    if options.turns == "all":
        raise InputError("--tokens goes with --turns last or --turns each: `all` pools the turns.")
    if name == "vllm":
        raise InputError("--tokens needs --backend hf: vLLM keeps means, not single tokens.")
    if name == "auto":
        notify("backend: transformers, which --tokens needs")
    backend = settings.backend.model_copy(update={"name": "hf"})
    return settings.model_copy(update={"backend": backend})


class TokenOutput:
    """The folder in the making: a part for every chunk of rows, and at the end what they are."""

    def __init__(self, store: Run, session: ModelSession, vectors: LoadedVectors) -> None:
        self._store = store
        self._turns = session.settings.project.turns
        self._texts = TokenTexts(session.metadata.tokenizer)
        self._tokenizer = session.metadata.tokenizer
        self._vectors = vectors

    def write(
        self, number: int, rows: Sequence[tuple[Row, Conversation]], answers: Sequence[AnswerTokens]
    ) -> None:
        """Keep the answers of chunk ``number``; done again, a chunk replaces itself."""
        records = (self._record(*rows[answer.row], answer) for answer in answers)
        write_tokens(self._store.path, number, list(records), columns=len(self._vectors.columns))

    def finish(self, path: Path) -> None:
        """Say what the parts are: tokens of the answers in the file ``path``."""
        columns = [{"vector": v, "layer": layer} for v, layer in self._vectors.columns]
        write_summary(self._store.path, {"data": path, "turns": self._turns, "columns": columns})

    def _record(self, row: Row, conversation: Conversation, answer: AnswerTokens) -> TokenRecord:
        texts = self._texts(answer.token_ids)
        return TokenRecord(
            line=row.line,
            turn=answer.turn + 1,
            question=self._question(row, conversation, answer.turn),
            text="".join(texts),
            token_ids=np.array(answer.token_ids, dtype=np.int32),
            widths=np.array([len(text) for text in texts], dtype=np.uint16),
            values=answer.values,
            think=answer.think,
        )

    def _question(self, row: Row, conversation: Conversation, turn: int) -> str:
        """Return what the answer answers: the message before it."""
        if not isinstance(conversation, Chat):
            known = row.values.get("question")
            if isinstance(known, str):
                return known
            if isinstance(conversation, Pair):
                return conversation.prompt
            return str(self._tokenizer.decode(list(conversation.prompt_ids)))
        messages, places = conversation.messages, conversation.answer_places
        place = places[turn if self._turns == "each" else -1] if places else len(messages)
        return messages[place - 1]["content"] if place else ""


@contextmanager
def open_token_output(
    folder: Path, session: ModelSession, vectors: LoadedVectors, *, path: Path, target: Path
) -> Iterator[TokenOutput]:
    """Collect tokens in ``folder`` and put them in place as ``target`` when the block ends well."""
    metadata = session.metadata
    identity = {
        "trait": path.resolve().stem, "model": metadata.id, "adapter": metadata.adapter
    }  # fmt: skip
    with ExitStack() as stack:
        store = stack.enter_context(Run.open_or_create(folder, kind=TOKENS_KIND, identity=identity))
        stack.enter_context(
            store.session(projection_axes=vectors.axes(), **manifest_sections(session))
        )
        output = TokenOutput(store, session, vectors)
        yield output
        output.finish(path)
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
