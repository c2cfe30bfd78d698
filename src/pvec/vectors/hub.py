"""``pvec vector push`` and ``pull``: vector files on the model hub, with a card.

The endpoint and the token are huggingface_hub's own (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth
login``); no message here shows a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pvec.errors import InputError, did_you_mean
from pvec.models.hub import explained_hub
from pvec.runs.files import atomic_write, probe_writable
from pvec.vectors.find import SUFFIX, load_vectors
from pvec.vectors.formats import READABLE, load_vector, save_vector

_CARD = "README.md"
_LARGEST = 2**30
"""Bytes: a file larger than this is a model's weights, not a vector."""


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """A repository and the files that were put into it, in one commit."""

    repo: str
    url: str
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PulledFile:
    """A vector file that was fetched."""

    path: Path
    trait: str
    model: str


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """A repository and the vectors that were fetched from it."""

    repo: str
    files: tuple[PulledFile, ...]


def push(
    paths: Sequence[Path],
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    notify: Callable[[str], None] | None = None,
) -> PushResult:
    """Put vector files and a card into a model repository, created if need be, in one commit.

    Other formats than pvec's are turned into it. Raises ``InputError`` for a file that is no
    vector, two files of one name, and whatever the hub says no to.
    """
    from pvec.vectors.card import updated_card

    files_by_path = load_vectors(paths, notify=notify)
    names = {path: f"{path.stem}{SUFFIX}" for path in files_by_path}
    if len(set(names.values())) < len(names):
        raise InputError("Two of these files have the same name: rename one before pushing.")
    repo = _create_repository(repo, private=private)
    vectors = {names[path]: vector for path, vector in files_by_path.items()}
    with TemporaryDirectory() as folder:
        files = {
            name: save_vector(vector, Path(folder) / name).read_bytes()
            for name, vector in vectors.items()
        }
    files[_CARD] = updated_card(_read_card(repo), repo=repo, vectors=vectors).encode()
    message = message or f"Add {', '.join(vectors)}"
    url = _commit_files(repo, files, message=message)
    return PushResult(repo=repo, url=url, files=tuple(files))


def pull(
    repo: str,
    names: Sequence[str] = (),
    *,
    out: Path = Path("vectors"),
    revision: str | None = None,
) -> PullResult:
    """Fetch vector files of a model repository (default: all) into the folder ``out``.

    Raises ``InputError`` for a repository or file that is not there, for files that are no vectors,
    and for two files of one name in different folders; ``StoreError`` when they cannot be written.
    """
    probe_writable(out)
    chosen = _choose(repo, _sizes(repo, revision=revision), names)
    by_name: dict[str, str] = {}
    for name in chosen:
        first = by_name.setdefault(Path(name).name, name)
        if first != name:
            raise InputError(
                f"{repo} has two files called {Path(name).name} ({first} and {name}): name one of "
                f"them, or pull them into two folders with --out."
            )
    fetched = [_fetch_file(repo, name, revision=revision) for name in chosen]
    vectors = [load_vector(path) for path in fetched]  # all are vectors before any is kept
    files = []
    for path, vector in zip(fetched, vectors, strict=True):
        target = out / path.name
        with atomic_write(target) as stream:
            stream.write(path.read_bytes())
        model = vector.metadata.get("model_id", "")
        files.append(PulledFile(path=target, trait=vector.trait, model=model))
    return PullResult(repo=repo, files=tuple(files))


def _choose(repo: str, files: Mapping[str, int], names: Sequence[str]) -> list[str]:
    vectors = [name for name in files if name.endswith(READABLE)]
    chosen = list(dict.fromkeys(_named(repo, name, vectors) for name in names)) or vectors
    if not chosen:
        raise InputError(f"{repo} has no vector files.")
    large = [name for name in chosen if files[name] > _LARGEST]
    if large:
        raise InputError(
            f"{large[0]} in {repo} is too large to be a vector file: name the files that you want."
        )
    return chosen


def _named(repo: str, name: str, vectors: Sequence[str]) -> str:
    for candidate in (name, f"{name}{SUFFIX}"):
        if candidate in vectors:
            return candidate
    raise InputError(
        f"{repo} has no vector file {name!r}.{did_you_mean(name, vectors)} "
        f"It has: {', '.join(vectors) or 'none'}."
    )


def _create_repository(repo: str, *, private: bool) -> str:
    """Create a model repository unless it is there, and return its whole name."""
    from huggingface_hub import HfApi

    with explained_hub(repo, what="repository"):
        created = HfApi().create_repo(repo, private=private, repo_type="model", exist_ok=True)
    return str(created.repo_id)


def _read_card(repo: str) -> str:
    """Return the card of a repository, or an empty text when it has none."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _fetch_file(repo, _CARD).read_text(encoding="utf-8")
    except InputError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return ""
        raise


def _commit_files(repo: str, files: Mapping[str, bytes], *, message: str) -> str:
    """Put files into a repository in one commit and return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    with explained_hub(repo, what="repository"):
        info = HfApi().create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
        )
    return str(info.commit_url)


def _sizes(repo: str, *, revision: str | None) -> dict[str, int]:
    """Return the files of a repository and their bytes, 0 where the hub does not say."""
    from huggingface_hub import HfApi

    with explained_hub(repo, what="repository"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _fetch_file(repo: str, name: str, *, revision: str | None = None) -> Path:
    """Return the local copy of one file of a repository, fetched if need be."""
    from huggingface_hub import hf_hub_download

    with explained_hub(repo, what="repository"):
        return Path(hf_hub_download(repo, name, revision=revision))
