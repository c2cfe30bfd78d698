"""Locate the files of a model: bundled, a local folder, a hub id, checkpoints, an adapter.

Loads no weights. Hub models are downloaded to the local cache and are folders from then on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pvec.documents import DocumentError, read_json
from pvec.errors import ModelError, did_you_mean

BUNDLED = "tiny"
"""The word for the model that ships with pvec; its own judge, if it has one, is ``tiny/judge``."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_ADAPTER_CONFIG = "adapter_config.json"
_METADATA = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
_SAFE_WEIGHTS = ["*.safetensors"]
_PICKLED_WEIGHTS = ["*.bin"]
_CODE = ["*.py"]
_OTHER_COPIES = ["*/*.safetensors", "*/*.bin", "consolidated*", "original/*"]
"""The same weights in another format; transformers reads those at the top level."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the user names it, with how to load it."""

    model: str
    adapter: str | None = None
    merge_adapter: bool = False
    dtype: Dtype = "auto"
    device: str = "auto"
    device_map: str | None = None
    """As in transformers; None spreads the model only when it does not fit on one GPU."""
    revision: str | None = None
    chat_template: str | None = None
    """A file that replaces the tokenizer's own template."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    """Also accept ``.bin`` weights, which run code when they are loaded."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The folders of a model, and notes on choices made while locating them."""

    id: str
    folder: Path
    tokenizer_folder: Path
    adapter_folder: Path | None = None
    bundled: bool = False
    notes: tuple[str, ...] = ()


def locate_model(spec: ModelSpec, *, weights: bool = True) -> ModelFiles:
    """Find (and if needed download) the files of a model; ``ModelError`` in one sentence.

    ``weights=False`` leaves the weights of a hub model where they are.
    """
    named = _locate(spec, spec.model, weights=weights)
    if spec.adapter is not None:
        adapter = _locate(spec, spec.adapter, weights=True)
        if not (adapter.folder / _ADAPTER_CONFIG).exists():
            raise ModelError(
                f"{spec.adapter!r} is not an adapter (it has no {_ADAPTER_CONFIG}): give it as the "
                f"model instead."
            )
        return _with_adapter(named, adapter)
    if (named.folder / _ADAPTER_CONFIG).exists():
        return _with_adapter(_base_of(spec, named, weights=weights), named)
    if not (named.folder / "config.json").exists():
        raise ModelError(
            f"The folder {spec.model!r} does not hold a model: it has neither config.json, "
            f"{_ADAPTER_CONFIG} nor checkpoint-N folders."
        )
    return named


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON file of the model as a dictionary."""
    try:
        content = read_json(folder / name, finite=False)
    except FileNotFoundError:
        raise ModelError(f"There is no {folder / name}: fetch or save the model again.") from None
    except DocumentError as error:
        raise ModelError(
            f"{folder / name} cannot be read ({error.problem}): fetch or save the model again."
        ) from None
    if not isinstance(content, dict):
        raise ModelError(
            f"{folder / name} does not hold a JSON object: fetch or save the model again."
        )
    return content


def _locate(spec: ModelSpec, name: str, *, weights: bool) -> ModelFiles:
    """Find one folder: bundled, local (with its latest checkpoint) or on the hub."""
    if name == BUNDLED or name.startswith(f"{BUNDLED}/"):
        return _bundled(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local(name, path)
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model folder {name!r}: check the path.")
    folder = _download(spec, name, weights=weights)
    return ModelFiles(id=name, folder=folder, tokenizer_folder=folder)


def _bundled(name: str) -> ModelFiles:
    root = Path(__file__).parent.parent / "tiny"
    folder = root / Path(name).relative_to(BUNDLED)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"There is no bundled model {name!r} in this installation: install pvec from its wheel."
        )
    tokenizer = folder if (folder / "tokenizer.json").exists() else root
    return ModelFiles(id=name, folder=folder, tokenizer_folder=tokenizer, bundled=True)


def _local(name: str, path: Path) -> ModelFiles:
    if any((path / file).exists() for file in ("config.json", _ADAPTER_CONFIG)):
        return ModelFiles(id=name, folder=path, tokenizer_folder=path)
    numbered = {
        int(match[1]): child
        for child in path.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name)) and child.is_dir()
    }
    if not numbered:
        return ModelFiles(id=name, folder=path, tokenizer_folder=path)
    latest = numbered[max(numbered)]
    note = f"{latest.name}: the latest of {len(numbered)} checkpoints in {name}"
    return ModelFiles(
        id=f"{name.rstrip('/')}/{latest.name}",
        folder=latest,
        tokenizer_folder=latest,
        notes=(note,),
    )


def _base_of(spec: ModelSpec, adapter: ModelFiles, *, weights: bool) -> ModelFiles:
    base = read_config(adapter.folder, _ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"The adapter {adapter.id!r} does not say which model it was trained on: give that "
            f"model as the model and the adapter with --adapter."
        )
    try:
        # A revision names a commit of the adapter's repository, not of its base.
        return _locate(replace(spec, revision=None), _near(base, adapter.folder), weights=weights)
    except ModelError as error:
        raise ModelError(
            f"The base model {base!r} of the adapter {adapter.id!r} was not found: give it as the "
            f"model, and the adapter with --adapter."
        ) from error


def _near(base: str, adapter: Path) -> str:
    """Return the path of a base model, relative to the adapter or a folder around it if need be.

    An adapter records the path from the folder in which it was trained, which is usually one of
    those around it.
    """
    if Path(base).is_absolute() or Path(base).is_dir():
        return base
    around = adapter.resolve()
    places = (folder / base for folder in (around, *around.parents))
    return next((str(place) for place in places if (place / "config.json").exists()), base)


def _with_adapter(base: ModelFiles, adapter: ModelFiles) -> ModelFiles:
    has_tokenizer = (adapter.folder / "tokenizer_config.json").exists()
    return ModelFiles(
        id=base.id,
        folder=base.folder,
        tokenizer_folder=adapter.folder if has_tokenizer else base.tokenizer_folder,
        adapter_folder=adapter.folder,
        bundled=base.bundled,
        notes=(*base.notes, *adapter.notes, f"adapter {adapter.id} on {base.id}"),
    )


def _download(spec: ModelSpec, name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*_METADATA, *(_SAFE_WEIGHTS if weights else [])]
    patterns += _PICKLED_WEIGHTS if weights and spec.allow_pickle else []
    patterns += _CODE if spec.trust_remote_code else []
    try:
        folder = snapshot_download(
            name,
            revision=spec.revision,
            allow_patterns=patterns,
            ignore_patterns=_OTHER_COPIES,
        )
        return Path(folder)
    except GatedRepoError as error:
        raise ModelError(
            f"The model {name!r} is gated: accept its terms on the hub and log in with "
            f"`hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            f"The model {name!r} has no revision {spec.revision!r}: check the name of the revision."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(_unknown(name)) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"The model {name!r} is not a local folder or in the hub cache, and the hub cannot "
            f"be reached: check the name and the network.{did_you_mean(name, [BUNDLED])}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"The model {name!r} could not be downloaded ({error}): try again."
        ) from error


def _unknown(name: str) -> str:
    return (
        f"There is no model {name!r}: it is neither a local folder nor on the hub (a private one "
        f"needs `hf auth login`).{did_you_mean(name, [BUNDLED])}"
    )
