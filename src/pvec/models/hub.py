"""Download the files of a model from the hub into its local cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pvec.errors import ModelError, did_you_mean

Found = TypeVar("Found")

_OTHER_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*", "original/*"]
"""The same weights in another format; transformers reads those at the top level."""


def download(name: str, *, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository with the files that match, fetched where they are missing.

    Raises ``ModelError`` in one sentence when that is not possible.
    """
    from huggingface_hub import snapshot_download

    folder = _asked(
        name,
        revision,
        lambda: snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_OTHER_COPIES,
        ),
    )
    return Path(folder)


def gguf_files(name: str, *, revision: str | None) -> list[str]:
    """Return the GGUF files of a repository; without a connection those in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    pattern = ["*.gguf"]
    try:
        files = _asked(
            name,
            revision,
            lambda: snapshot_download(
                name, revision=revision, allow_patterns=pattern, dry_run=True
            ),
        )
    except DryRunError:
        return gguf_inside(download(name, revision=revision, patterns=pattern))
    return sorted(file.filename for file in files)


def gguf_inside(folder: Path) -> list[str]:
    """Return the GGUF files below a folder, by their paths inside it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.gguf"))


def _asked(name: str, revision: str | None, ask: Callable[[], Found]) -> Found:
    """Return ``ask()``; what the hub's client raises becomes one sentence (``ModelError``)."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return ask()
    except GatedRepoError as error:
        raise ModelError(
            f"The model {name!r} is gated: accept its terms on the hub and log in with "
            f"`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"The model {name!r} has no revision {revision!r}: check the name of the revision."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"There is no model {name!r}: it is neither a local folder nor on the hub (a private "
            f"one needs `hf auth login`).{did_you_mean(name, ['tiny'])}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"The model {name!r} is not a local folder or in the hub cache, and the hub cannot "
            f"be reached: check the name and the network.{did_you_mean(name, ['tiny'])}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"The model {name!r} could not be downloaded ({error}): try again."
        ) from error
