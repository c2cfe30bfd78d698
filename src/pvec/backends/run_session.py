"""What every command that makes answers does with its run folder, whatever the answers are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from pvec.backends.planned import PlannedResponse, generate_missing
from pvec.backends.session import ModelSession
from pvec.closing import Closing
from pvec.errors import StoreError
from pvec.models.template import date_seen, is_dated, set_date
from pvec.runs.manifest import FILE_NAME, read_manifest
from pvec.runs.responses import Json, ResponseRecord
from pvec.runs.store import Run
from pvec.traits.trait import Trait


class RunSession(Closing):
    """One command at work on one run folder, with the model of ``session``.

    Opening it takes the folder (see ``Run.open_or_create`` for what it raises), notes the command,
    the settings and the model in the manifest, keeps ``traits`` and shows what the user should know
    of them. Leaving it notes that the work is done and how long its stages took, unless an
    exception says otherwise.
    """

    def __init__(
        self,
        session: ModelSession,
        folder: Path,
        *,
        kind: str,
        identity: Mapping[str, Json],
        traits: Sequence[Trait] = (),
    ) -> None:
        self.session = session
        self.settings = session.settings
        use_run_date(session, folder)
        with ExitStack() as stack:
            self.store = stack.enter_context(
                Run.open_or_create(folder, kind=kind, identity=identity)
            )
            self.store.keep_traits(traits)
            stack.enter_context(self.store.session(**manifest_sections(session)))
            self._stack = stack.pop_all()
        if is_dated(session.metadata.tokenizer):
            date = date_seen(session.metadata.tokenizer)
            session.notify(
                f"the chat template writes today's date into every prompt: this run keeps "
                f"{date:%Y-%m-%d}, the day it began"
            )
        for note in (*(note for trait in traits for note in trait.notes), *self.store.notes):
            session.notify(note)

    def generate(self, planned: Sequence[PlannedResponse], *, stage: str = "generate") -> int:
        """Generate the answers that are missing and return their number."""
        with self.store.stage("generate"):
            return generate_missing(
                self.store,
                self.session,
                planned,
                on_progress=self.session.on_progress,
                stage=stage,
            )

    def responses(self, planned: Sequence[PlannedResponse]) -> list[ResponseRecord]:
        """Return the answers that the run holds of those that were planned, in that order."""
        order = {response.id: position for position, response in enumerate(planned)}
        records = [record for record in self.store.responses() if record.id in order]
        return sorted(records, key=lambda record: order[record.id])

    def close(self) -> None:
        """Let the next writer in. The manifest says that the command did not end its work."""
        self._stack.close()

    def __exit__(self, *exc_info: object) -> None:
        self._stack.__exit__(*exc_info)  # type: ignore[arg-type]


def use_run_date(session: ModelSession, folder: Path) -> None:
    """Let a chat template that writes the date see the day on which the run in ``folder`` began.

    Prompts that are planned for a run are rendered after this, so that a run goes on with the
    prompts it began with. Does nothing where no run was begun.
    """
    tokenizer = session.metadata.tokenizer
    if is_dated(tokenizer) and (folder / FILE_NAME).is_file():
        manifest = read_manifest(folder)
        text = str(manifest.get("chat_date") or manifest["created"])
        try:
            date = datetime.fromisoformat(text)
        except ValueError:
            raise StoreError(
                f"{folder / FILE_NAME} is damaged (it has no date but {text[:40]!r}): restore it "
                "from a copy or start a new run folder."
            ) from None
        set_date(tokenizer, date.astimezone().replace(tzinfo=None) if date.tzinfo else date)


def run_identity(session: ModelSession, *, subject: Mapping[str, Json]) -> dict[str, Json]:
    """Return what tells a run that generates from another: its ``subject``, and who answers how."""
    generation = session.settings.generation
    return {
        **subject,
        "model": session.metadata.id,
        "adapter": session.metadata.adapter,
        "engine": session.identity,
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "max_tokens": session.max_tokens,
        "seed": generation.seed,
        "thinking": generation.thinking,
    }


def manifest_sections(session: ModelSession) -> dict[str, Any]:
    """Return what a manifest says of the settings and the model that answers came from."""
    metadata = session.metadata
    dated = is_dated(metadata.tokenizer)
    date = date_seen(metadata.tokenizer).isoformat(timespec="seconds") if dated else None
    return {
        **({"chat_date": date} if dated else {}),
        "settings": session.settings.model_dump(mode="json"),
        "model": {
            "id": metadata.id,
            "fingerprint": metadata.fingerprint,
            "adapter": metadata.adapter,
            "bundled": metadata.bundled,
        },
    }
