"""``pvec vector find``: is a known vector in the difference of two checkpoints' weights?

What a block adds to the residual stream is written by its output projections (``o_proj``,
``down_proj`` and their like). For the difference ``D`` ``[H, in]`` of such a weight, and the unit
vector ``u`` at the block's layer, the share of ``|D|^2`` that writes along ``u`` is
``|u D|^2 / |D|^2``; it averages ``1 / H`` over all directions. It is compared with something harder
to exceed: directions that the base model's own weight writes anyway, random mixtures of its
columns. A bias has one direction: its share is its squared cosine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvec.backends.session import ModelSession, Notify, ignore, model_spec, require_this_process
from pvec.errors import InputError, ModelError
from pvec.models.adapters import find_adapter
from pvec.models.decoder import find_decoder
from pvec.models.files import ModelSpec
from pvec.projection.shift import on_base, whole_model
from pvec.settings import Settings
from pvec.types import VectorKind
from pvec.vectors.files import labels, load_vectors

if TYPE_CHECKING:
    import torch

CONTROLS = 999
"""Random directions that each share is compared with."""

_WRITERS = re.compile(r"(^|\.)(o_proj|out_proj|c_proj|down_proj|dense|dense_4h_to_h|fc2|wo|w2)$")
"""Names of the projections in a block whose output goes to the residual stream."""


@dataclass(frozen=True, kw_only=True)
class FoundVector:
    """One vector in the change of one tensor of a block.

    ``change`` is the norm of the tensor's change relative to the tensor (infinite where it was
    zero), ``share`` the part of its square that writes along the vector, ``control`` the mean of
    that over ``CONTROLS`` random directions, and ``above`` the share of them that is less. ``coef``
    is what a bias adds along the vector, in vectors.
    """

    vector: str
    layer: int
    tensor: str
    change: float
    share: float
    control: float
    above: float
    coef: float | None = None


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """What changed between two checkpoints, and the vectors in it, by layer.

    ``searched`` is the share of the squared change of all weights that is in the projections which
    write to the residual stream; the vectors are looked for in these alone.
    """

    base: str
    finetuned: str
    changed: int
    tensors: int
    searched: float
    found: tuple[FoundVector, ...]

    @property
    def chance(self) -> float:
        """How many rows would lie above every control if no vector were there."""
        return len(self.found) / (CONTROLS + 1)


def run(
    settings: Settings,
    finetuned: str,
    vectors: Sequence[Path],
    *,
    kind: VectorKind | None = None,
    layer: int | None = None,
    seed: int = 0,
    notify: Notify = ignore,
) -> WeightChange:
    """Look for ``vectors`` in the weights of ``finetuned`` minus those of the settings' model.

    ``finetuned`` is an adapter of it or a whole model of its shape. Each block's change is compared
    with the vector's row at its own layer, or with that at ``layer``. Raises ``InputError`` for a
    vector or layer that cannot be used and models that are equal, and ``ModelError`` for models of
    different shapes.
    """
    require_this_process(settings, "Finding a vector in a finetuned model's weights")
    settings = on_base(settings, settings.model.id)
    session = ModelSession(settings, notify=notify)
    base = session.metadata.id
    adapter = find_adapter(base, finetuned)
    spec = model_spec(settings)
    if adapter is None:
        spec = model_spec(whole_model(finetuned, session).settings)
    else:
        spec = replace(spec, adapter=finetuned, merge_adapter=True)
    loaded = load_vectors(vectors, model=session.metadata, layer=layer, notify=notify)
    names = labels(loaded)
    rows = {
        names[path]: {
            block: vector.direction(at, kind=kind or vector.main_kind)
            for block in range(1, session.metadata.num_layers + 1)
            for at in [block if layer is None else layer]
            if layer is not None or block in vector.steering_layers
        }
        for path, vector in loaded.items()
    }
    before, after = (_weights(each) for each in (model_spec(settings), spec))
    return search(before, after, rows, base=base, finetuned=finetuned, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters by name, those of projections ``[out, in]``; ``blocks`` is the prefix of
    the names of its decoder blocks.
    """

    parameters: Mapping[str, torch.Tensor]
    blocks: str

    def writer(self, name: str) -> tuple[int, str] | None:
        """Return the layer and the name in its block of a projection that writes to the stream."""
        if not name.startswith(f"{self.blocks}."):
            return None
        number, _, rest = name.removeprefix(f"{self.blocks}.").partition(".")
        return (int(number) + 1, rest) if _WRITERS.search(rest.rpartition(".")[0]) else None


def search(
    before: Weights,
    after: Weights,
    rows: Mapping[str, Mapping[int, np.ndarray]],
    *,
    base: str,
    finetuned: str,
    seed: int = 0,
) -> WeightChange:
    """Compare two models of one architecture; a bias that only one has is zero in the other.

    ``rows`` are the vectors ``[H]`` by name and layer. Raises as ``run`` does.
    """
    rng = np.random.default_rng(seed)
    names = list(dict.fromkeys((*before.parameters, *after.parameters)))
    changed, total, searched = 0, 0.0, 0.0
    found: list[FoundVector] = []
    for name in names:
        old, new = _pair(before.parameters, after.parameters, name)
        difference = new - old
        square = float(difference.square().sum())
        if square == 0.0:
            continue
        changed, total = changed + 1, total + square
        writer = before.writer(name)
        if writer is None:
            continue
        searched += square
        weight = before.parameters[f"{name.rpartition('.')[0]}.weight"].float().numpy()
        controls = _written_directions(weight, rng)
        norm = float(old.norm())
        found += [
            _found(
                difference,
                by_layer[writer[0]],
                controls,
                name=vector,
                layer=writer[0],
                tensor=writer[1],
                change=square**0.5 / norm if norm else float("inf"),
            )
            for vector, by_layer in rows.items()
            if writer[0] in by_layer
        ]
    if not changed:
        raise InputError(
            f"{finetuned} has the weights of {base}: there is no difference to search."
        )
    return WeightChange(
        base=base,
        finetuned=finetuned,
        changed=changed,
        tensors=len(names),
        searched=searched / total,
        found=tuple(sorted(found, key=lambda f: (f.vector, f.layer, f.tensor))),
    )


def shares(difference: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return which part of ``|D|^2`` writes along each of ``directions``, ``[N]``.

    ``difference`` is ``[H, in]``, ``directions`` are unit vectors ``[N, H]``.
    """
    along = np.square(directions @ difference, dtype=np.float64).sum(axis=1)
    parts: np.ndarray = along / np.square(difference, dtype=np.float64).sum()
    return parts


def _found(
    difference: torch.Tensor,
    vector: np.ndarray,
    controls: np.ndarray,
    *,
    name: str,
    layer: int,
    tensor: str,
    change: float,
) -> FoundVector:
    unit = vector / np.linalg.norm(vector)
    matrix = difference.numpy().reshape(len(difference), -1)  # [H, in], of a bias [H, 1]
    share = float(shares(matrix, unit[None])[0])
    random = shares(matrix, controls)
    along = difference.numpy().astype(np.float64) @ vector if difference.dim() == 1 else None
    return FoundVector(
        vector=name,
        layer=layer,
        tensor=tensor,
        change=change,
        share=share,
        control=float(random.mean()),
        above=float((random < share).mean()),
        coef=None if along is None else float(along / np.square(vector, dtype=np.float64).sum()),
    )


def _written_directions(weight: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return unit vectors ``[CONTROLS, H]`` that a weight ``[H, in]`` writes for random input."""
    draws = rng.standard_normal((CONTROLS, weight.shape[1]), dtype=np.float32) @ weight.T
    directions: np.ndarray = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    return directions


def _pair(
    before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a parameter of both models in float32; a bias that one lacks is zero."""
    old, new = before.get(name), after.get(name)
    if name.endswith(".bias"):
        old = new.new_zeros(new.shape) if old is None and new is not None else old
        new = old.new_zeros(old.shape) if new is None and old is not None else new
    if old is None or new is None or old.shape != new.shape:
        raise ModelError(
            f"The two models do not have the same weights ({name} differs in shape or is in one "
            f"only): give a finetune of the base."
        )
    return old.float(), new.float()


def _weights(spec: ModelSpec) -> Weights:
    """Load a model on the CPU and return its parameters; tied ones count once."""
    from transformers.pytorch_utils import Conv1D

    from pvec.models.load import load_model

    model = load_model(replace(spec, device="cpu", device_map=None)).model
    blocks = find_decoder(model).blocks
    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    return Weights(
        parameters={
            name: parameter.T if name in turned else parameter.data
            for name, parameter in model.named_parameters()
        },
        blocks=next(name for name, module in model.named_modules() if module is blocks),
    )
