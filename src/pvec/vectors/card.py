"""The card of a repository of vectors: what each is, how it was made, and how to use it.

Each vector's section stands between two comments, so that pushing another one, or the same again,
leaves the rest of a card as it is, whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvec.vectors.vector import PersonaVector

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
