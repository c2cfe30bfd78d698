"""What a run says of the model, the engine and the settings that its answers came from."""

from __future__ import annotations

from collections.abc import Mapping

from pvec.backends.session import ModelSession
from pvec.runs.responses import Json
from pvec.runs.store import Run
from pvec.settings import Settings


def run_identity(
    settings: Settings, session: ModelSession, *, subject: Mapping[str, Json]
) -> dict[str, Json]:
    """Return what tells a run that generates from another: its ``subject``, and who answers how."""
    generation = settings.generation
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


def keep_settings(store: Run, settings: Settings, session: ModelSession) -> None:
    """Note in a run's manifest with which settings and model it was made."""
    metadata = session.metadata
    store.update_manifest(
        settings=settings.model_dump(mode="json"),
        model={
            "id": metadata.id,
            "fingerprint": metadata.fingerprint,
            "adapter": metadata.adapter,
            "bundled": metadata.bundled,
        },
    )
