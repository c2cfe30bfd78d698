"""The model hub: the files of a model into its local cache, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pvec.errors import InputError, ModelError, StoreError, did_you_mean

_OTHER_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*", "original/*"]
"""The same weights in another format; transformers reads those at the top level."""


def download(name: str, *, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder of a repository with the files that match, fetched where they are missing.

    Raises ``ModelError`` in one sentence when that is not possible.
    """
    from huggingface_hub import snapshot_download

    with explained_hub(name, what="model"):
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=_OTHER_COPIES,
        )
    return Path(folder)


def gguf_files(name: str, *, revision: str | None) -> list[str]:
    """Return the GGUF files of a repository; without a connection those in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    pattern = ["*.gguf"]
    try:
        with explained_hub(name, what="model"):
            files = snapshot_download(name, revision=revision, allow_patterns=pattern, dry_run=True)
    except DryRunError:
        return gguf_inside(download(name, revision=revision, patterns=pattern))
    return sorted(file.filename for file in files)


def gguf_inside(folder: Path) -> list[str]:
    """Return the GGUF files below a folder, by their paths inside it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("**/*.gguf"))


@contextmanager
def explained_hub(name: str, *, what: Literal["model", "repository"]) -> Iterator[None]:
    """Turn what goes wrong with the hub into one sentence with the remedy.

    ``ModelError`` is about a model, ``InputError`` about a repository of vectors, ``StoreError``
    about the disk.
    """
    from huggingface_hub import errors

    failure = ModelError if what == "model" else InputError
    # the HTTPError of whichever HTTP client this version of huggingface_hub is built on
    transport_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.DryRunError:
        raise
    except errors.GatedRepoError as error:
        raise failure(
            f"The {what} {name!r} is gated: accept its terms on the hub and {_LOG_IN}."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise failure(
            f"The {what} {name!r} has no such revision: name a branch, tag or commit."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise failure(_missing(name, what)) from error
    except errors.RemoteEntryNotFoundError as error:
        raise failure(f"{name} has no such file: `pvec vector pull` lists them.") from error
    except errors.LocalTokenNotFoundError as error:
        raise failure(f"The hub needs to know who you are: {_LOG_IN}.") from error
    except errors.HfHubHTTPError as error:
        raise failure(_refused(name, error)) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, transport_error) as error:
        local = f"The model {name!r} is not a local folder or in the hub cache, and the hub"
        raise failure(
            f"{local if what == 'model' else 'The hub'} cannot be reached: check the name, the "
            f"network, HF_ENDPOINT and HF_HUB_OFFLINE.{did_you_mean(name, ['tiny'])}"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{name} cannot be transferred: {error.strerror or 'try again'}."
        ) from error


def _missing(name: str, what: str) -> str:
    if what == "model":
        return (
            f"There is no model {name!r}: it is neither a local folder nor on the hub (a private "
            f"one needs `hf auth login`).{did_you_mean(name, ['tiny'])}"
        )
    return (
        f"There is no repository {name} that you may see: write OWNER/NAME, and {_LOG_IN} if it is "
        f"private."
    )


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def _refused(name: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"The hub does not let you do this with {name} (HTTP {status}): {_LOG_IN}, with a "
            f"token that may do it."
        )
    return f"The hub refused the request about {name} (HTTP {status or 'error'}): try again later."
