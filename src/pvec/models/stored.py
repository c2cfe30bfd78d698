"""Compare the weights in memory with the checkpoint that they were loaded from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvec.models.weights import WRAPPERS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WeightComparison:
    """How many tensors of a checkpoint were ``compared``, and the names of those that differ.

    ``others`` were not: they are packed (quantised), offloaded, or not used by the model.
    """

    compared: int
    others: int
    different: tuple[str, ...]


def compare_weights(model: Any, folder: Path) -> WeightComparison:
    """Compare every tensor in ``folder`` with the one in memory: its first, middle and last row.

    Names and layouts that transformers changes on loading (prefixes, fused experts) are changed
    back by transformers itself. Weights under an adapter are found; merged ones differ.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as opened:
        files = [
            opened.enter_context(safe_open(path, framework="pt"))
            for path in sorted(folder.glob("*.safetensors"))
        ]
        stored = {WRAPPERS.sub("", key): (file, key) for file in files for key in file.keys()}  # noqa: SIM118
        equal: dict[str, bool] = {}
        for name, tensor in _as_stored(model):
            plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # torchao's are not
            if name in stored and plain and not tensor.is_meta and tensor.is_floating_point():
                file, key = stored[name]
                same = _same_rows(tensor, file.get_slice(key))
                if same is not None:
                    equal[name] = same
    return WeightComparison(
        compared=len(equal),
        others=len(stored) - len(equal),
        different=tuple(name for name, same in equal.items() if not same),
    )


def _as_stored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors under the names and in the layout of its checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    state = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in base.state_dict().items()
    }
    # one block at a time, since fused experts are copied when they are taken apart
    for _, names in groupby(sorted(state, key=_block), key=_block):
        block = {name: state[name] for name in names}
        try:
            yield from revert_weight_conversion(base, block).items()
        except NotImplementedError:  # packed weights, which are not compared, have no way back
            yield from block.items()


def _block(name: str) -> str:
    """Return what a tensor's name begins with, up to the number of its block."""
    words = name.split(".")
    place = next((index for index, word in enumerate(words) if word.isdigit()), -1)
    return ".".join(words[: place + 1])


def _same_rows(tensor: torch.Tensor, stored: Any) -> bool | None:
    """Whether three rows are equal in memory and in the file; None for packed numbers."""
    shape = stored.get_shape()
    if len(shape) != tensor.dim() or shape[1:] != list(tensor.shape[1:]):
        return None
    if stored.get_dtype().startswith("F8") and tensor.itemsize > 1:  # dequantised on loading
        return None
    if shape and shape[0] > tensor.shape[0]:  # rows of added tokens come last
        return False
    rows = {0, shape[0] // 2, shape[0] - 1} if shape and shape[0] else {None}
    return all(
        bool(
            (
                (stored[:] if row is None else stored[row]).to(tensor.dtype).float()
                == (tensor if row is None else tensor[row]).cpu().float()
            ).all()
        )
        for row in rows
    )
