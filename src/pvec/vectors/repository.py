"""The model hub, as far as vector files need it: put files into a repository, and take them out.

The endpoint and the token are huggingface_hub's own (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth
login``); no message here shows a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pvec.errors import InputError, StoreError

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository; ``size`` in bytes, None when the hub does not say."""

    name: str
    size: int | None


def create_repository(repo: str, *, private: bool) -> str:
    """Create a model repository unless it is there, and return its whole name.

    Raises ``InputError`` when the hub cannot be reached or does not let the user write.
    """
    from huggingface_hub import HfApi

    with _explained(repo):
        created = HfApi().create_repo(repo, private=private, repo_type="model", exist_ok=True)
    return str(created.repo_id)


def read_card(repo: str) -> str:
    """Return the card of a repository, or an empty text when it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return fetch_file(repo, CARD).read_text(encoding="utf-8")
    except InputError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return ""
        raise


def commit_files(repo: str, files: Mapping[str, bytes], *, message: str) -> str:
    """Put files into a repository in one commit and return its address.

    Raises ``InputError`` as above.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with _explained(repo):
        info = HfApi().create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
        )
    return str(info.commit_url)


def list_files(repo: str, *, revision: str | None = None) -> list[RemoteFile]:
    """Return the files of a repository. Raises ``InputError`` when it is not there."""
    from huggingface_hub import HfApi

    with _explained(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    return [RemoteFile(name=file.rfilename, size=file.size) for file in info.siblings or []]


def fetch_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """Return the local copy of one file of a repository, fetched if need be."""
    from huggingface_hub import hf_hub_download

    with _explained(repo):
        return Path(hf_hub_download(repo, name, revision=revision))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what goes wrong with the hub into one sentence with the remedy."""
    from huggingface_hub import errors

    # the HTTPError of whichever HTTP client this version of huggingface_hub is built on
    transport_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.HFValidationError as error:
        raise InputError(f"{repo!r} is no repository name: write OWNER/NAME.") from error
    except errors.GatedRepoError as error:
        raise InputError(f"{repo} is gated: accept its terms on the hub first.") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo} has no such revision: name a branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"There is no repository {repo} that you may see: check its name, and log in with "
            f"`hf auth login` if it is private."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{repo} has no such file: `pvec vector pull` lists them.") from error
    except errors.LocalTokenNotFoundError as error:
        raise InputError(f"The hub needs to know who you are: {_LOG_IN}.") from error
    except errors.HfHubHTTPError as error:
        raise InputError(_refused(repo, error)) from error
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{repo} cannot be fetched: the hub cannot be reached.") from error
    except (errors.OfflineModeIsEnabled, transport_error) as error:
        raise InputError(
            "The hub cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
    except OSError as error:
        raise StoreError(
            f"{repo} cannot be transferred: {error.strerror or 'try again'}."
        ) from error


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def _refused(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"The hub does not let you do this with {repo} (HTTP {status}): {_LOG_IN}, with a "
            f"token that may write."
        )
    return f"The hub refused the request about {repo} (HTTP {status or 'error'}): try again later."
