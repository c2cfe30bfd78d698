"""``pvec vector push`` and ``pull``: vector files on the model hub, with a card.

The endpoint and the token are huggingface_hub's own (``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth
login``); no message here shows a token. In a repository's card each vector's section stands between
two comments, so that pushing another one, or the same again, leaves the rest of a card as it is,
whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pvec.errors import InputError, did_you_mean
from pvec.models.hub import explained_hub
from pvec.runs.files import atomic_write, probe_writable
from pvec.vectors.files import READABLE, SUFFIX, load_vector, load_vectors, save_vector
from pvec.vectors.vector import PersonaVector

_CARD = "README.md"
_LARGEST = 2**30
"""Bytes: a file larger than this is a model's weights, not a vector."""


PROVENANCE = {
    "model_id": "model",
    "adapter": "adapter",
    "model_fingerprint": "model fingerprint",
    "dtype": "number format",
    "method": "method",
    "judge": "judge",
    "threshold": "trait threshold",
    "min_coherence": "least coherence",
    "paired": "paired filter",
    "seed": "seed",
    "source": "made from",
    "expression": "combination",
    "orthogonal_to": "orthogonal to",
    "incremental": "incremental",
    "source_format": "format",
    "pvec_version": "pvec",
}
"""Metadata of a vector file, in the words that people read."""

_USE = """## How to use them

Rows are layers: row `l` is the residual stream after decoder block `l` (0-based block `l - 1`;
`hidden_states[l]` in transformers), row 0 the embedding output. The vectors are not normalised.

```python
from safetensors import safe_open

with safe_open("FILE", framework="np") as file:
    vector = file.get_tensor("response_avg")[LAYER]  # float32 [hidden size]
```

Steering adds `coefficient * vector` to the residual stream after that block. With pvec:
`pvec vector pull REPO`, then `pvec vector show FILE` and `pvec steer-eval --vector FILE`.

These vectors were measured on one model with one judge. They can make a model say harmful things:
use them to study, monitor or prevent a trait.
"""


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


def updated_card(card: str, *, repo: str, vectors: Mapping[str, PersonaVector]) -> str:
    """Return ``card`` with the sections of ``vectors`` (file name to vector) added or replaced.

    An empty ``card`` begins as one with metadata for the hub.
    """
    text = card or _new_card(repo, vectors)
    for file, vector in vectors.items():
        begin, end = f"<!-- pvec:{file} -->", f"<!-- /pvec:{file} -->"
        section = f"{begin}\n{_section(file, vector)}{end}"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if pattern.search(text):
            text = pattern.sub(lambda _, new=section: new, text)  # type: ignore[misc]
        else:
            text = f"{text.rstrip()}\n\n{section}\n"
    return text


def _new_card(repo: str, vectors: Mapping[str, PersonaVector]) -> str:
    models = {vector.metadata.get("model_id", "") for vector in vectors.values()}
    hub_names = sorted(name for name in models if re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    base = "".join(f"- {name}\n" for name in hub_names)
    front = "library_name: pvec\ntags:\n- persona-vectors\n- activation-steering\n"
    front += f"base_model:\n{base}" if base else ""
    use = _USE.replace("REPO", repo).replace("FILE", next(iter(vectors)))
    return f"---\n{front}---\n\n# Persona vectors\n\n{use}"


def _section(file: str, vector: PersonaVector) -> str:
    metadata = [("kinds", ", ".join(vector.kinds))]
    metadata += [("layers", str(vector.num_layers)), ("width", str(vector.hidden_size))]
    kept = [vector.metadata.get(f"kept_{sign}", "") for sign in ("pos", "neg")]
    if all(kept):
        metadata.append(("answers that count", f"{kept[0]} positive, {kept[1]} negative"))
    metadata += [
        (word, vector.metadata[key]) for key, word in PROVENANCE.items() if vector.metadata.get(key)
    ]
    listed = "".join(f"- {name}: {value}\n" for name, value in metadata)
    return f"## {vector.trait} (`{file}`)\n\n{listed}\n{_layers(vector)}"


def _layers(vector: PersonaVector) -> str:
    """Return what is known per layer as a table."""
    columns = {"norm": vector.norms(vector.main_kind)}
    if vector.mean_norm is not None:
        columns["residual norm"] = vector.mean_norm
    names = {"auc": "separation (AUC)", "stability": "split-half cosine"}
    columns |= {word: vector.stats[key] for key, word in names.items() if key in vector.stats}
    head = f"| layer | {' | '.join(columns)} |\n|---:|{'---:|' * len(columns)}\n"
    rows = (
        f"| {layer} | {' | '.join(f'{values[layer]:.3g}' for values in columns.values())} |\n"
        for layer in range(vector.num_layers + 1)
    )
    return head + "".join(rows)
