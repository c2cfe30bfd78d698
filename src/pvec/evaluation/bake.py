"""``pvec vector bake``: a model whose weights do what steering would do.

Adding ``coef * v`` to the residual stream after a block, at every token, is a bias of the last
projection in that block, where nothing but the addition to the stream follows it. Blocks that have
such a bias get it added; Llama's can be given one; Qwen2 and Mistral are Llama with other defaults
and are written as Llama. Whether the written model is the steered one is measured, not assumed: its
logits, loaded again from disk, must be those of the original under steering hooks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np

from pvec.backends.session import (
    ModelSession,
    Notify,
    ignore,
    model_spec,
    on_backend,
    require_this_process,
)
from pvec.errors import InputError, ModelError
from pvec.evaluation.chat import load_steering_vectors
from pvec.evaluation.conditions import steered_conditions
from pvec.models.chat import encode_prompt, prompt_ids
from pvec.models.decoder import block_index, find_decoder
from pvec.models.files import ModelSpec
from pvec.models.libraries import quiet_transformers
from pvec.settings import Settings
from pvec.types import Instruction

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIKE_LLAMA = ("mistral", "qwen2")
"""Architectures whose weights and computation are those of Llama with some biases."""

TOLERANCE = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}
"""Largest difference of the logits, as a share of what steering changes in them (root mean square).
A bias in the wrong place is off by about 1; half precision rounds the two sums differently."""

_QUESTIONS = (
    "How do I make friends in a new town?",
    "What should I do with my old books?",
    "Please describe a walk in the rain in three sentences.",
)
"""On whose tokens the two models are compared."""


@dataclass(frozen=True, kw_only=True)
class BakeResult:
    """The model that was written, and how its logits compare with those of the steered original.

    ``effect`` is the root mean square of what steering changes in the logits of ``tokens`` tokens,
    ``error`` that of the difference between both models, ``largest_error`` its largest entry, and
    ``same_top`` the share of tokens with the same most likely next token.
    """

    out: Path
    model: str
    architecture: str
    layers: tuple[int, ...]
    biases: tuple[str, ...]
    dtype: str
    tokens: int
    effect: float
    error: float
    largest_error: float
    same_top: float
    notes: tuple[str, ...] = ()


def run(
    settings: Settings, vectors: Sequence[Path], *, out: Path, notify: Notify = ignore
) -> BakeResult:
    """Write the model of ``settings`` with ``vectors`` in its weights into the folder ``out``.

    Layers, coefficient and unit are those of ``settings.steer``, one choice of each; the operator
    is ``add`` and the positions ``all``, as a bias knows neither condition nor position. Raises
    ``InputError`` for settings that are no single addition and an ``out`` that exists, and
    ``ModelError`` for an architecture without a place for the bias, and when the logits of the
    written model differ from those of the steered one; then nothing is left on disk.
    """
    from pvec.models.load import load_model

    if out.exists():
        raise InputError(f"{out} exists already: give another --out.")
    require_this_process(settings, "Baking a vector into a model")
    session = ModelSession(on_backend(settings, "hf"), notify=notify)
    steering = _single_addition(session, vectors)
    spec = replace(model_spec(settings), merge_adapter=True)
    loaded = load_model(spec, metadata=session.metadata)
    if getattr(loaded.model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"The weights of {session.metadata.id!r} are quantised, and a bias cannot be added to "
            f"them: use the full-precision model."
        )
    prompts = _prompts(loaded.tokenizer)
    plain = _logits(loaded.model, prompts)
    steered = _logits(loaded.model, prompts, steering=steering)
    baked, names = with_biases(loaded.model, _sums(steering), prompts[0])
    dtype: Any = loaded.info.dtype
    device = loaded.info.device
    stored = dtype if settings.model.dtype != "auto" else session.metadata.stored_dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        _save(baked, folder, loaded.tokenizer, steering, dtype=stored)
        del baked, loaded
        again = load_model(ModelSpec(model=str(folder), dtype=dtype, device=device))
        result = _compare(plain, steered, _logits(again.model, prompts))
        _require_equal(result, session.metadata.id, dtype=dtype)
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return BakeResult(
        out=out,
        model=session.metadata.id,
        architecture=type(again.model).__name__,
        layers=tuple(sorted({i.layer for i in steering})),
        biases=names,
        dtype=stored,
        **result,
    )


def with_biases(
    model: PreTrainedModel, additions: Mapping[int, np.ndarray], token_ids: Sequence[int]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return ``model`` with ``additions`` (vector ``[H]`` by layer) as biases, and their names.

    The model itself where its blocks have the bias, else one that shares its weights; on the meta
    device but for its parameters, so it is to be saved. Raises ``ModelError`` where the
    architecture has no place for a bias.
    """
    import torch

    names = {layer: _last_projection(model, layer, token_ids) for layer in additions}
    state = dict(model.state_dict())
    if any(f"{name}.bias" not in state for name in names.values()):
        model = _with_places(model, state)
    for layer, name in names.items():
        bias = model.get_parameter(f"{name}.bias")
        added = torch.from_numpy(additions[layer]).to(bias.device)
        with torch.no_grad():
            bias.copy_((bias.double() + added).to(bias.dtype))
    return model, tuple(f"{name}.bias" for name in names.values())


def _with_places(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Return a model with these weights whose MLPs have biases, zero where they are new."""
    import torch

    model_class, config = _biased_class(model)
    with torch.device("meta"):
        roomy: PreTrainedModel = model_class(config)
    example = next(iter(state.values()))
    missing = {
        key: torch.zeros(tensor.shape, dtype=example.dtype, device=example.device)
        for key, tensor in roomy.state_dict().items()
        if key not in state
    }
    if not all(key.endswith(".bias") for key in missing) or set(state) - set(roomy.state_dict()):
        raise _no_place(model)
    roomy.load_state_dict({**state, **missing}, assign=True)
    roomy.tie_weights()
    roomy.generation_config = model.generation_config
    return roomy


def _biased_class(model: PreTrainedModel) -> tuple[Any, Any]:
    """Return the class and configuration of the same model with biases in its MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = deepcopy(model.config)
    if getattr(config, "mlp_bias", None) is False:
        config.mlp_bias = True
        return type(model), config
    windows = getattr(config, "layer_types", None) or ()
    whole = getattr(config, "sliding_window", None) is None and set(windows) <= {"full_attention"}
    if config.model_type not in LIKE_LLAMA or not whole:
        raise _no_place(model)
    settings = {
        key: value
        for key, value in config.to_dict().items()
        if key in LlamaConfig().to_dict() and key not in {"model_type", "architectures"}
    }
    attention_bias = any(name.endswith("q_proj.bias") for name in model.state_dict())
    settings |= {"attention_bias": attention_bias, "mlp_bias": True}
    return LlamaForCausalLM, LlamaConfig(**settings)


def _no_place(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__} has no place for a bias after its blocks, so steering cannot be "
        f"written into its weights: steer it when it runs (pvec serve, pvec.steer)."
    )


def _last_projection(model: PreTrainedModel, layer: int, token_ids: Sequence[int]) -> str:
    """Return the name of the linear module of the layer's block that runs last and writes to the
    residual stream's width.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    decoder = find_decoder(model)
    called: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, _args, _output: called.append(module))
        for module in decoder.blocks[block_index(layer)].modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _width(module) == decoder.hidden_size
    ]
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(token_ids)], device=decoder.device))
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise _no_place(model)
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[called[-1]]


def _width(module: Any) -> int:
    """Return the width of what a Linear or a Conv1D returns."""
    return int(getattr(module, "out_features", None) or module.nf)


def _single_addition(session: ModelSession, paths: Sequence[Path]) -> tuple[Instruction, ...]:
    """Return the instructions of the one condition that the settings describe."""
    steer = session.settings.steer.model_copy(
        update={"operator": "add", "positions": "all", "together": True}
    )
    vectors = load_steering_vectors(session, paths)
    conditions = steered_conditions(vectors, steer, num_layers=session.metadata.num_layers)
    if len(conditions) != 1:
        raise InputError(
            f"A model can be steered in one way only, and these options describe "
            f"{len(conditions)}: give one --layer (such as 20, 3+4 or all) and one --coef that is "
            f"not 0."
        )
    return conditions[0].steering


def _sums(steering: Sequence[Instruction]) -> dict[int, np.ndarray]:
    """Return what the instructions add together at each layer, float64 ``[H]``."""
    sums: dict[int, np.ndarray] = {}
    for instruction in steering:
        added = instruction.coef * instruction.vector.astype(np.float64)
        sums[instruction.layer] = sums.get(instruction.layer, 0.0) + added
    return sums


def _prompts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    if not tokenizer.chat_template:
        return [encode_prompt(tokenizer, text) for text in _QUESTIONS]
    return [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in _QUESTIONS]


def _logits(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, steering: Sequence[Instruction] = ()
) -> np.ndarray:
    """Return the logits at every token of the prompts, float32 ``[tokens, vocabulary]``."""
    import torch

    from pvec.steering.hooks import steer

    device = find_decoder(model).device
    rows = []
    for ids in prompts:
        batch = torch.tensor([list(ids)], device=device)
        with torch.inference_mode(), steer(model, steering) if steering else nullcontext():
            logits = model(input_ids=batch).logits
        rows.append(logits[0].float().cpu().numpy())
    return np.concatenate(rows)


def _compare(plain: np.ndarray, steered: np.ndarray, baked: np.ndarray) -> dict[str, Any]:
    error = baked - steered
    return {
        "tokens": len(plain),
        "effect": _root_mean_square(steered - plain),
        "error": _root_mean_square(error),
        "largest_error": float(np.abs(error).max()),
        "same_top": float((baked.argmax(axis=1) == steered.argmax(axis=1)).mean()),
    }


def _root_mean_square(values: np.ndarray) -> float:
    return math.sqrt(float(np.square(values, dtype=np.float64).mean()))


def _require_equal(result: Mapping[str, Any], model: str, *, dtype: str) -> None:
    allowed = TOLERANCE[dtype] * result["effect"]
    if result["error"] <= allowed:  # False for NaN, too
        return
    remedy = "steer it when it runs (pvec serve, pvec.steer)"
    if dtype != "float32":
        remedy = f"try --dtype float32, or {remedy}"
    raise ModelError(
        f"{model!r} with the bias is not the steered model: its logits differ by "
        f"{result['error']:.3g}, where steering changes them by {result['effect']:.3g} and "
        f"{allowed:.3g} would be rounding (its blocks do not end with that projection): {remedy}."
    )


def _save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    steering: Sequence[Instruction],
    *,
    dtype: str,
) -> None:
    """Write model and tokenizer; the configuration says what was added (``pvec_steering``)."""
    import torch

    model.to(getattr(torch, dtype))
    model.config.pvec_steering = [instruction.describe() for instruction in steering]
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
