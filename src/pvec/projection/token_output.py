"""``pvec project --tokens``: every token's projections, in a folder beside the projected file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from pvec.backends.run_session import manifest_sections
from pvec.backends.session import ModelSession, Notify
from pvec.data.conversations import Chat, Conversation, Pair
from pvec.data.table import Row
from pvec.errors import InputError
from pvec.models.token_text import TokenTexts
from pvec.projection.projector import AnswerTokens, LoadedVectors
from pvec.runs.store import Run
from pvec.runs.summary import TOKENS_KIND, write_summary
from pvec.runs.tokens import TokenRecord, write_tokens
from pvec.settings import Settings


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
        messages = conversation.messages
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
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
