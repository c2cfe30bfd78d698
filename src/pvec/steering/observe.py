"""Reading the residual stream from outside: plain hooks that share nothing with pvec's steering.

What a layer hands on is read at the input of the module that comes next (the following block, or
the final norm), so it does not matter whose hooks ran before or after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pvec.errors import ModelError


class Recording:
    """What passed: ``states()[layer]`` is float32 ``[B, tokens, H]`` over all forwards so far."""

    def __init__(self, num_layers: int) -> None:
        self._pieces: list[list[torch.Tensor]] = [[] for _ in range(num_layers + 1)]

    def add(self, layer: int, hidden: torch.Tensor) -> None:
        """Keep a copy of what one forward handed on at ``layer``."""
        self._pieces[layer].append(hidden.detach().float().cpu().clone())

    def states(self) -> list[torch.Tensor]:
        """Return the residual stream per layer, the tokens of successive forwards joined."""
        return [torch.cat(chunks, dim=1) for chunks in self._pieces]


@contextmanager
def recorded(blocks: nn.ModuleList, *, after: nn.Module) -> Iterator[Recording]:
    """Record the residual stream of every layer while the context lasts.

    ``blocks`` are the decoder blocks in order; ``after`` is the module that the last one's output
    goes to (``module_after``). The batch must keep its rows while it lasts.
    """
    recording = Recording(len(blocks))
    handles: list[RemovableHandle] = []
    try:
        for layer, module in enumerate([*blocks, after]):
            handles.append(
                module.register_forward_pre_hook(_reader(recording, layer), with_kwargs=True)
            )
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def module_after(model: nn.Module, blocks: nn.ModuleList, token_ids: torch.Tensor) -> nn.Module:
    """Return the module that runs first after the last block: the final norm.

    Found by running ``token_ids`` ``[1, T]`` once and watching the order of calls.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    found: list[nn.Module] = []
    passed: list[bool] = []
    handles = [blocks[-1].register_forward_hook(lambda *_: passed.append(True))]
    try:
        for module in outside:

            def watch(called: nn.Module, _args: Any) -> None:
                if passed and not found:
                    found.append(called)

            handles.append(module.register_forward_pre_hook(watch))
        with torch.inference_mode():
            model(input_ids=token_ids)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ModelError(f"{type(model).__name__} runs no module after its last block.")
    return found[0]


def _reader(recording: Recording, layer: int) -> Any:
    def read(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        recording.add(layer, args[0] if args else kwargs["hidden_states"])

    return read
