"""Locate the files of a model: bundled, a folder, a GGUF file, a hub id, checkpoints, an adapter.

Loads no weights. Hub models are downloaded to the local cache and are folders from then on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pvec.documents import DocumentError, read_json
from pvec.errors import InputError, ModelError, did_you_mean
from pvec.models.gguf import transformers_folder
from pvec.models.gguf_header import GGUFHeader, is_gguf, read_gguf_header
from pvec.models.hub import download, gguf_files, gguf_inside
from pvec.models.precision import Quantisation

BUNDLED = "tiny"
"""The word for the model that ships with pvec; its own judge, if it has one, is ``tiny/judge``."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_ADAPTER_CONFIG = "adapter_config.json"
_METADATA = ["*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]
_SAFE_WEIGHTS = ["*.safetensors"]
_PICKLED_WEIGHTS = ["*.bin"]
_CODE = ["*.py"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the user names it, with how to load it."""

    model: str
    gguf_file: str | None = None
    """The GGUF file of a folder or hub repository that holds several."""
    adapter: str | None = None
    merge_adapter: bool = False
    dtype: Dtype = "auto"
    quantize: Quantisation | None = None
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
    """The folders of a model, and notes on choices made while locating them.

    With ``gguf`` the weights are in that file, and the folders have what transformers reads of it.
    """

    id: str
    folder: Path
    tokenizer_folder: Path
    gguf: GGUFHeader | None = None
    adapter_folder: Path | None = None
    bundled: bool = False
    notes: tuple[str, ...] = ()


def locate_model(spec: ModelSpec, *, weights: bool = True) -> ModelFiles:
    """Find (and if needed download) the files of a model; ``ModelError`` in one sentence.

    ``weights=False`` leaves the weights of a hub model where they are.
    """
    named = _locate(spec, spec.model, weights=weights)
    if spec.adapter is not None:
        adapter = _locate(replace(spec, gguf_file=None), spec.adapter, weights=True)
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
            f"{_ADAPTER_CONFIG}, a GGUF file nor checkpoint-N folders."
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
    """Find one folder or file: bundled, local (with its latest checkpoint) or on the hub."""
    path = Path(name).expanduser()
    bundled = name == BUNDLED or name.startswith(f"{BUNDLED}/")
    if spec.gguf_file is not None and (bundled or path.is_file()):
        raise InputError(
            f"--gguf-file names a file in a folder or hub repository, and {name!r} is neither: "
            f"omit it."
        )
    if bundled:
        return _bundled(name)
    if path.is_dir():
        return _local(name, path, gguf_file=spec.gguf_file)
    if path.is_file() and is_gguf(path):
        return _gguf(name, path)
    if path.suffix == ".gguf" and not path.exists():
        raise ModelError(f"There is no GGUF file {name!r}: check the path.")
    if path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model folder {name!r}: check the path.")
    return _on_hub(spec, name, weights=weights)


def _gguf(name: str, path: Path) -> ModelFiles:
    """Check a GGUF file and give it the folder that transformers needs."""
    header = read_gguf_header(path)
    folder = transformers_folder(header)
    note = f"GGUF file {path.name} ({', '.join(header.types)}): its weights are dequantised"
    return ModelFiles(id=name, folder=folder, tokenizer_folder=folder, gguf=header, notes=(note,))


def _choose_gguf(name: str, available: Sequence[str], wanted: str | None) -> str:
    """Return the GGUF file that is wanted, or the only one."""
    if wanted is not None and wanted not in available:
        raise InputError(
            f"{name!r} has no file {wanted!r}.{did_you_mean(wanted, available)} "
            f"Its GGUF files: {', '.join(available) or 'none'}."
        )
    if wanted is None and len(available) > 1:
        raise InputError(
            f"{name!r} holds {len(available)} GGUF files: choose one with --gguf-file "
            f"({', '.join(available)})."
        )
    return wanted or available[0]


def _bundled(name: str) -> ModelFiles:
    root = Path(__file__).parent.parent / "tiny"
    folder = root / Path(name).relative_to(BUNDLED)
    if not (folder / "config.json").exists():
        raise ModelError(
            f"There is no bundled model {name!r} in this installation: install pvec from its wheel."
        )
    tokenizer = folder if (folder / "tokenizer.json").exists() else root
    return ModelFiles(id=name, folder=folder, tokenizer_folder=tokenizer, bundled=True)


def _local(name: str, path: Path, *, gguf_file: str | None) -> ModelFiles:
    adapter = (path / _ADAPTER_CONFIG).exists()
    if gguf_file is not None and not adapter:
        return _gguf(name, path / _choose_gguf(name, gguf_inside(path), gguf_file))
    if adapter or (path / "config.json").exists():
        return ModelFiles(id=name, folder=path, tokenizer_folder=path)
    numbered = {
        int(match[1]): child
        for child in path.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name)) and child.is_dir()
    }
    if not numbered and (files := gguf_inside(path)):
        return _gguf(name, path / _choose_gguf(name, files, None))
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
    return next((str(place) for place in places if _is_model(place)), base)


def _is_model(place: Path) -> bool:
    return (place / "config.json").exists() or (place.suffix == ".gguf" and place.is_file())


def _with_adapter(base: ModelFiles, adapter: ModelFiles) -> ModelFiles:
    has_tokenizer = (adapter.folder / "tokenizer_config.json").exists()
    return ModelFiles(
        id=base.id,
        folder=base.folder,
        tokenizer_folder=adapter.folder if has_tokenizer else base.tokenizer_folder,
        gguf=base.gguf,
        adapter_folder=adapter.folder,
        bundled=base.bundled,
        notes=(*base.notes, *adapter.notes, f"adapter {adapter.id} on {base.id}"),
    )


def _on_hub(spec: ModelSpec, name: str, *, weights: bool) -> ModelFiles:
    """Download a model; of a GGUF repository only the one file that is used."""
    if spec.gguf_file is None:
        patterns = _patterns(spec, weights=weights)
        folder = download(name, revision=spec.revision, patterns=patterns)
        plain = ModelFiles(id=name, folder=folder, tokenizer_folder=folder)
        if (folder / _ADAPTER_CONFIG).exists():
            return plain
        needed = ["config.json"] if not weights else [*_SAFE_WEIGHTS, *_PICKLED_WEIGHTS]
        if any(next(folder.glob(pattern), None) for pattern in needed):
            return plain
    files = gguf_files(name, revision=spec.revision)
    if spec.gguf_file is None and not files:
        return plain
    file = _choose_gguf(name, files, spec.gguf_file)
    return _gguf(name, download(name, revision=spec.revision, patterns=[file]) / file)


def _patterns(spec: ModelSpec, *, weights: bool) -> list[str]:
    """Return which files of a repository are needed."""
    patterns = [*_METADATA, *(_SAFE_WEIGHTS if weights else [])]
    patterns += _PICKLED_WEIGHTS if weights and spec.allow_pickle else []
    return patterns + (_CODE if spec.trust_remote_code else [])
