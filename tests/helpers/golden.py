"""Golden files: what a command prints and writes, described in small JSON files, and compared.

A description keeps the keys and types of everything, the values that are the same in every run, and
no wording. With ``PVEC_UPDATE_GOLDEN=1`` in the environment the files are written instead.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

UPDATE = os.environ.get("PVEC_UPDATE_GOLDEN") == "1"  # read at import: a fixture removes it
FOLDER = Path(__file__).parents[1] / "golden"

FIRST = 3
"""Values kept of each key."""

REL, ABS = 1e-3, 1e-4
"""How far numbers may be apart: other processors add in another order."""

VOLATILE = frozenset(
    "created started ended timings seconds monitor_seconds tokens_per_second memory_bytes "  # noqa: SIM905
    "free_bytes train_runtime train_samples_per_second train_steps_per_second total_flos".split()
)
"""Keys whose values differ from run to run."""

TEXTS = frozenset(
    "adapter by column condition format group hash judge kind metric model operator output path "  # noqa: SIM905
    "paths role run status trait trait_hash type value vector".split()
)
"""Keys whose text is no wording and is kept; elsewhere only numbers are."""

FOREIGN = ("adapter", "checkpoint-")
"""Folders whose files, except the weights, are written by peft and transformers."""

DESCRIBED = (".jsonl", ".json", ".csv", ".safetensors", ".pt")


def compare(name: str, found: dict[str, Any]) -> None:
    """Assert that ``found`` is what the golden file ``name`` says, or write the file."""
    path = FOLDER / f"{name}.json"
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{_dump(_rounded(found))}\n", encoding="utf-8")
        return
    expected = json.loads(path.read_text(encoding="utf-8"))
    wrong = list(differences(expected, json.loads(json.dumps(found))))
    hint = "If it was changed on purpose, run with PVEC_UPDATE_GOLDEN=1 and read the diff."
    assert not wrong, "\n".join([f"{path.name} does not hold any more:", *wrong[:40], hint])


def differences(expected: Any, found: Any, where: str = "") -> Iterator[str]:
    """Yield one sentence for each place where two JSON values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            place = f"{where} / {key}" if where else key
            if key not in found:
                yield f"{place}: gone (was {_short(expected[key])})"
            elif key not in expected:
                yield f"{place}: new ({_short(found[key])})"
            else:
                yield from differences(expected[key], found[key], place)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (old, new) in enumerate(zip(expected, found, strict=True)):
            yield from differences(old, new, f"{where}[{number}]")
    elif not _same(expected, found):
        yield f"{where}: {_short(expected)} → {_short(found)}"


def tree(value: Any, *, values: bool = True) -> dict[str, list[Any]]:
    """Describe a JSON value: path → type, and the first values, merged over the items of lists.

    Without ``values`` there are only types.
    """
    leaves: dict[str, list[Any]] = {}
    for path, leaf in _leaves(value):
        leaves.setdefault(path, []).append(leaf)
    return {path: _leaf(path, leaves[path], values=values) for path in sorted(leaves)}


def snapshot(folder: Path) -> dict[str, str]:
    """Return path → checksum of the files in ``folder``."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def written(folder: Path, before: dict[str, str]) -> dict[str, Any]:
    """Describe the files that are new or changed since the snapshot ``before``."""
    after = snapshot(folder)
    assert before.keys() <= after.keys(), f"removed: {before.keys() - after.keys()}"
    return {name: file(folder / name) for name in after if after[name] != before.get(name)}


def file(path: Path) -> Any:
    """Describe a file by its kind; of the kinds that no program reads, only that it is there."""
    foreign = path.parent.name.startswith(FOREIGN)
    if path.suffix not in DESCRIBED or (foreign and path.suffix != ".safetensors"):
        return "present"
    if path.suffix == ".csv":
        return _csv(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".pt":
        return _torch(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _rows([json.loads(line) for line in text.splitlines()])
    content = json.loads(text)
    return _manifest(content) if path.name == "manifest.json" else tree(content)


# ── kinds of files ──────────────────────────────────────────────────────────────────────────────


def _rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe JSON lines: the order in which answers finish is no part of the format."""
    rows = sorted(rows, key=lambda row: str(row.get("id", "")))
    kept = [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows[:FIRST]]
    return {"rows": len(rows), "keys": tree(rows, values=False), "first": kept}


def _csv(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8", newline="") as stream:
        header, *rows = list(csv.reader(stream))
    cells = [[_number(cell) for cell in row] for row in rows[:FIRST]]
    return {"rows": len(rows), "header": header, "first": [dict(enumerate(row)) for row in cells]}


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        tensors = {name: _tensor(stream.get_tensor(name)) for name in sorted(stream.keys())}
        metadata = stream.metadata() or {}
    metadata.pop("pvec_version", None)
    return {"tensors": tensors, "metadata": dict(sorted(metadata.items()))}


def _torch(path: Path) -> dict[str, Any]:
    import torch

    content = torch.load(path, weights_only=True)
    named = content if isinstance(content, dict) else {"": content}
    return {name: _tensor(tensor) for name, tensor in named.items()}


def _tensor(tensor: Any) -> list[Any]:
    """Return number format, shape and norm."""
    norm = float(tensor.float().nan_to_num().norm())
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), norm]


def _manifest(content: dict[str, Any]) -> dict[str, Any]:
    """Describe a manifest: `settings` are what `pvec config` shows, versions are the machine's."""
    content = {**content, "settings": "as pvec config", "versions": "of packages"}
    for session in content["sessions"]:
        session["command"] = "the command line"
    return {"identity": content.pop("identity"), "keys": tree(content)}


# ── values ──────────────────────────────────────────────────────────────────────────────────────


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        yield f"{path}#", len(value)
        for item in value:
            yield from _leaves(item, f"{path}[]")
    else:
        yield path, value


def _leaf(path: str, leaves: list[Any], *, values: bool) -> list[Any]:
    names = {None: "null", True: "bool", False: "bool"}
    kinds = {
        names[leaf] if leaf is None or isinstance(leaf, bool) else type(leaf).__name__
        for leaf in leaves
    }
    keys = [key.rstrip("[]#") for key in path.split(".")]
    kept = [
        leaf
        for leaf in leaves
        if isinstance(leaf, int | float) or (isinstance(leaf, str) and keys[-1] in TEXTS)
    ]
    stable = values and VOLATILE.isdisjoint(keys)
    return ["|".join(sorted(kinds)), *(kept[:FIRST] if stable else [])]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, float) and isinstance(found, int | float):
        return math.isclose(expected, found, rel_tol=REL, abs_tol=ABS)
    return type(expected) is type(found) and bool(expected == found)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _dump(value: Any, indent: str = "") -> str:
    """Return JSON with a line for each key, lists on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner = f"{indent}  "
    lines = [
        f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_dump(item, inner)}"
        for key, item in value.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}…"
