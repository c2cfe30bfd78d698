"""Locate a model's decoder blocks by its structure.

The only module that turns a layer number into a block index (``layer - 1``). Importing it loads no
torch: layer numbers are checked and named before any model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pvec.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PretrainedConfig

_KEY_VALUE_LAYERS = frozenset(("full_attention", "sliding_attention"))

HiddenHook = Callable[["torch.Tensor"], "torch.Tensor | None"]
"""Sees the hidden state ``[B, T, H]`` of a layer; a returned tensor replaces it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """The parts of a causal language model that pvec works on.

    ``body`` runs embedding and blocks without the LM head. ``embed`` maps token ids to vectors;
    it is not layer 0 for every architecture (GPT-2 adds positions, Gemma scales), the input of
    ``blocks[0]`` is.
    """

    body: nn.Module
    embed: nn.Module
    blocks: nn.ModuleList
    config: PretrainedConfig
    """Of the text model: a multimodal model's inner one."""

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.config.hidden_size)

    @cached_property
    def max_tokens(self) -> int | None:
        """The most tokens a sequence can have where positions are learned; None: no hard limit."""
        from torch import nn

        limit = getattr(self.config, "max_position_embeddings", None)
        tables = [m for m in self.body.modules() if isinstance(m, nn.Embedding)]
        learned = any(t is not self.embed and t.num_embeddings - 2 <= (limit or 0) for t in tables)
        return limit if learned else None

    @property
    def vocabulary(self) -> int:
        """The number of token ids that have an embedding."""
        return int(next(self.embed.parameters()).shape[0])

    def check_tokens(self, token_ids: Sequence[int], *, name: str) -> None:
        """Raise ``ModelError`` when ``name`` has a token that the model has no embedding of."""
        if token_ids and max(token_ids) >= self.vocabulary:
            raise ModelError(
                f"{name} has the token id {max(token_ids):,}, but the model's embedding has "
                f"{self.vocabulary:,} rows: use the tokenizer that belongs to the model, or resize "
                f"the model's embedding for its tokenizer."
            )

    @property
    def num_layers(self) -> int:
        """How many decoder blocks there are; layers run from 0 to this number."""
        return len(self.blocks)

    @property
    def keys_and_values_only(self) -> bool:
        """Whether the state of every layer is keys and values of earlier tokens.

        Only then can sequences of different lengths share a cache. Other layers (state-space,
        convolution, linear or chunked attention) keep a state that padding would change.
        """
        return set(getattr(self.config, "layer_types", None) or ()) <= _KEY_VALUE_LAYERS

    @property
    def device(self) -> torch.device:
        """Where the token ids must be put."""
        return next(self.embed.parameters()).device

    def on_layer(self, layer: int, hook: HiddenHook) -> RemovableHandle:
        """Call ``hook`` with the hidden state of ``layer`` (0 … num_layers) in every forward.

        Hooks of one layer run in the order they were added, each on what the one before returned.
        """
        if layer == 0:
            return self.blocks[0].register_forward_pre_hook(_input_hook(hook), with_kwargs=True)
        return self.blocks[block_index(layer)].register_forward_hook(_output_hook(hook))

    def hooks_on(self, layer: int) -> list[HiddenHook]:
        """Return what ``on_layer`` has put on a layer (1 … num_layers) and nobody removed."""
        registered = self.blocks[block_index(layer)]._forward_hooks.values()  # noqa: SLF001
        return [hook.hidden_hook for hook in registered if hasattr(hook, "hidden_hook")]


def block_index(layer: int) -> int:
    """Return the index of the block whose output is ``layer`` (1-based)."""
    assert layer >= 1, "layer 0 is the embedding output: no block makes it"
    return layer - 1


def describe_layer(layer: int) -> str:
    """Return how messages name a layer: ``layer 20 (block 19)``, ``layer 0 (embedding)``."""
    return f"layer {layer} (block {block_index(layer)})" if layer else "layer 0 (embedding)"


def check_layer(layer: int, num_layers: int) -> int:
    """Return ``layer`` if a block makes it; raise ``ModelError`` telling the range otherwise."""
    if 1 <= layer <= num_layers:
        return layer
    why = "layer 0 is the embedding output, which no block makes: " if layer == 0 else ""
    raise ModelError(
        f"Layer {layer} cannot be used: {why}this model has layers 1 to {num_layers} "
        f"(layer 1 is the output of block 0): choose a layer in that range."
    )


def recorded_layers(layers: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers to record, 0 among them or not, each checked; None: all of the model."""
    chosen = tuple(range(num_layers + 1) if layers is None else layers)
    for layer in chosen:
        if layer != 0:
            check_layer(layer, num_layers)
    return chosen


_NO_STREAM = {
    "gemma3n_text": "its blocks pass on several streams (AltUp) and not one residual stream",
    "recurrent_gemma": "its recurrent blocks keep their state in the model, not by sequence",
}
"""Architectures on which steering, capture or generation would be wrong, and why."""


def check_supported(config: PretrainedConfig) -> None:
    """Raise ``ModelError`` for the text configuration of a model that pvec would run wrongly."""
    reason = _NO_STREAM.get(config.model_type)
    if reason is not None:
        raise ModelError(
            f"{config.model_type} models are not supported ({reason}): choose another model."
        )


def find_decoder(model: nn.Module) -> Decoder:
    """Find embedding, decoder blocks and body of a causal language model by its structure.

    Works through any wrapper (PEFT adapters, data parallel, a multimodal model's text part): the
    blocks are the ``ModuleList`` with ``config.num_hidden_layers`` entries, and the body is the
    smallest module around them that holds the token embedding too. Raises ``ModelError``.
    """
    _refuse_virtual_tokens(model)
    config = _text_config(model)
    check_supported(config)
    embed = _token_embedding(model)
    candidates = list(_candidates(model, embed=embed, length=config.num_hidden_layers))
    if not candidates:
        raise ModelError(
            f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder blocks next "
            f"to a token embedding: pvec needs a decoder-only causal language model."
        )
    # a vision tower of equal depth meets the token embedding only in a larger module
    body, blocks = min(candidates, key=lambda pair: (_size(pair[0]), -_size(pair[1])))
    return Decoder(body=body, embed=embed, blocks=blocks, config=config)


def _refuse_virtual_tokens(model: nn.Module) -> None:
    adapters = getattr(model, "peft_config", {})
    if any(getattr(config, "is_prompt_learning", False) for config in adapters.values()):
        raise ModelError(
            "This adapter adds virtual tokens (prompt or prefix tuning), which shift every "
            "position: use a LoRA adapter."
        )


def _text_config(model: nn.Module) -> PretrainedConfig:
    from transformers import PretrainedConfig

    config = getattr(_pretrained(model), "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"{type(model).__name__} is not a transformers model (it has no config): "
            f"load it with AutoModelForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder: pvec needs a decoder-only causal "
            f"language model."
        )
    return config.get_text_config(decoder=True)


def _pretrained(model: nn.Module) -> nn.Module:
    """Return the transformers model inside any wrapper."""
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _token_embedding(model: nn.Module) -> nn.Module:
    embed: nn.Module = _pretrained(model).get_input_embeddings()  # type: ignore[operator]
    return embed


def _candidates(
    model: nn.Module, *, embed: nn.Module, length: int
) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yield every (smallest module holding blocks and embedding, blocks) of the expected length."""
    from torch import nn

    modules = dict(model.named_modules())
    for name, blocks in modules.items():
        if not isinstance(blocks, nn.ModuleList) or len(blocks) != length:
            continue
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            if any(module is embed for module in modules[parent].modules()):
                break
        body = modules[parent]
        if any(module is embed for module in body.modules()) and "forward" in dir(type(body)):
            yield body, blocks


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _output_hook(hook: HiddenHook) -> Callable[[nn.Module, Any, Any], Any]:
    def replace(_block: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            changed = hook(output[0])
            return None if changed is None else (changed, *output[1:])
        return hook(output)

    replace.hidden_hook = hook  # type: ignore[attr-defined] # so that ``hooks_on`` can name it
    return replace


def _input_hook(hook: HiddenHook) -> Callable[[nn.Module, Any, dict[str, Any]], Any]:
    def replace(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        changed = hook(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return None
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": changed}

    return replace


def module_after(model: nn.Module, blocks: nn.ModuleList, token_ids: torch.Tensor) -> nn.Module:
    """Return the module that runs first after the last block: the final norm.

    Found by running ``token_ids`` ``[1, T]`` once and watching the order of calls.
    """
    import torch

    inside = {id(module) for block in blocks for module in block.modules()}
    called: list[nn.Module] = []
    passed: list[bool] = []

    def watch(module: nn.Module, _args: Any) -> None:
        if passed and not called:
            called.append(module)

    with ExitStack() as hooks, torch.inference_mode():
        hooks.enter_context(blocks[-1].register_forward_hook(lambda *_: passed.append(True)))
        for module in model.modules():
            if id(module) not in inside:
                hooks.enter_context(module.register_forward_pre_hook(watch))
        model(input_ids=token_ids)
    if not called:
        raise ModelError(f"{type(model).__name__} runs no module after its last block.")
    return called[0]
