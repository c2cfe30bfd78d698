"""Inspect a model without loading its weights, and load it: dtype, device, adapter, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pvec.documents import read_text
from pvec.errors import InputError, ModelError
from pvec.models.adapters import attach_adapter
from pvec.models.decoder import check_supported
from pvec.models.files import ModelFiles, ModelSpec, locate_model, read_config
from pvec.models.fingerprint import chat_fingerprint, model_fingerprint
from pvec.models.libraries import explained, quiet_transformers
from pvec.models.precision import check_quantise, choose_dtype, quantise_config, stored_dtype
from pvec.models.template import chat_format, end_of_turn
from pvec.models.weights import load_weights, model_config
from pvec.types import ModelInfo, Progress

P = ParamSpec("P")
T = TypeVar("T")

_LOADING = RLock()


def _one_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Let one thread at a time into the functions that load.

    transformers imports its modules lazily and switches initialisation and number format for the
    whole process while it loads: of two threads, one would miss a name or its tied weights.
    """

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOADING:
            return function(*args, **kwargs)

    return alone


_TOKENIZER_FILES = (
    "tokenizer*.json",
    "*.model",
    "vocab.*",
    "tokenizer*.py",
    "*.tiktoken",
    "tekken.json",
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelMetadata:
    """What is known about a model before its weights are loaded.

    ``context`` is the number of tokens that prompt and answer may have together, or None when the
    configuration does not say. ``chat_hash`` covers tokenizer and chat template; ``model_type`` is
    the architecture in transformers' words, ``stored_dtype`` the number format on disk.
    """

    id: str
    model_type: str
    fingerprint: str
    chat_hash: str
    num_layers: int
    hidden_size: int
    context: int | None
    stored_dtype: str
    tokenizer: PreTrainedTokenizerBase
    files: ModelFiles
    quantize: str | None
    bundled: bool
    adapter: str | None
    notes: tuple[str, ...]

    @property
    def thinking_switch(self) -> bool:
        """Whether the chat template can switch thinking on and off."""
        return bool(self.tokenizer.chat_template) and (
            chat_format(self.tokenizer).thinking is not None
        )

    def info(self, *, dtype: torch.dtype, device: str, notes: Sequence[str] = ()) -> ModelInfo:
        """Return what is known of the model once it is loaded."""
        return ModelInfo(
            id=self.id,
            fingerprint=self.fingerprint,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            dtype=str(dtype).removeprefix("torch."),
            device=device,
            adapter=self.adapter,
            bundled=self.bundled,
            quantize=self.quantize,
            notes=tuple(notes),
        )

    @cached_property
    def declared_stops(self) -> frozenset[int]:
        """The tokens that end an answer by the model's own files."""
        from transformers import AutoConfig, GenerationConfig

        try:
            declared = GenerationConfig.from_pretrained(self.files.folder).eos_token_id
        except OSError:  # no such file
            config = AutoConfig.from_pretrained(self.files.folder)
            declared = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
        stops: set[int] = set()
        for ids in (declared, self.tokenizer.eos_token_id):
            stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(stops)

    @cached_property
    def added_stop(self) -> int | None:
        """The token that ends an assistant's turn where the model's files do not say that."""
        turn = end_of_turn(self.tokenizer)
        return None if turn in self.declared_stops else turn


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model that is ready to run, in eval mode, and its metadata."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo


@_one_at_a_time
def inspect_model(spec: ModelSpec, *, weights: bool = True) -> ModelMetadata:
    """Read configuration, tokenizer and fingerprint of a model; no weights are loaded.

    Raises ``ModelError`` or ``InputError`` for a model that could not be loaded later.
    ``weights=False`` does not fetch a hub model's weights either; its fingerprint is then empty.
    """
    files = locate_model(spec, weights=weights)
    config = _load_config(spec, files)
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(text, "num_hidden_layers"):
        raise ModelError(
            f"{spec.model!r} ({config.model_type}) is not a decoder-only language model: "
            f"choose a causal LM."
        )
    check_supported(text)
    tokenizer = load_tokenizer(spec, files)
    notes = chat_format(tokenizer).notes if tokenizer.chat_template else ()
    metadata = ModelMetadata(
        id=files.id,
        model_type=text.model_type,
        fingerprint=model_fingerprint(files) if weights else "",
        chat_hash=chat_fingerprint(tokenizer),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        context=getattr(text, "max_position_embeddings", None),
        stored_dtype=stored_dtype(files, config),
        tokenizer=tokenizer,
        files=files,
        quantize=spec.quantize,
        bundled=files.bundled,
        adapter=str(files.adapter_folder) if files.adapter_folder else None,
        notes=(*files.notes, *notes),
    )
    if metadata.added_stop is None:
        return metadata
    token = tokenizer.convert_ids_to_tokens(metadata.added_stop)
    note = f"{token} ends an assistant's turn in the chat template: answers stop there, too"
    return replace(metadata, notes=(*metadata.notes, note))


@_one_at_a_time
def load_model(
    spec: ModelSpec,
    *,
    metadata: ModelMetadata | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> LoadedModel:
    """Load a model for inference; with ``metadata`` its files are not inspected again.

    ``on_progress`` sees the tensors of a GGUF file while they are dequantised.
    """
    metadata = metadata or inspect_model(spec)
    device, device_note = choose_device(spec.device)
    dtype, dtype_note = choose_dtype(spec.dtype, device, stored=metadata.stored_dtype)
    files = metadata.files
    config = read_config(files.folder)
    check_quantise(spec, config, device=device, gguf=files.gguf is not None)
    placement = _device_map(spec, files, device, itemsize=dtype.itemsize)
    notes = [*metadata.notes, f"{str(dtype).removeprefix('torch.')}: {dtype_note}"]
    if not (files.gguf or spec.allow_pickle or any(files.folder.glob("*.safetensors"))):
        raise ModelError(
            f"{spec.model!r} has no safetensors weights, and .bin weights can run code when "
            f"loaded: convert them, or use --allow-pickle if you trust them."
        )
    options: dict[str, Any] = {"device_map": placement}
    quantised = spec.quantize is not None or "quantization_config" in config
    if quantised:  # what packs the weights puts them where they stay
        options["device_map"] = placement or device
    if spec.quantize is not None:
        options["quantization_config"] = quantise_config(spec.quantize, dtype)
        notes.append(f"{spec.quantize} weights: activations differ from the full-precision model's")
    model: Any
    model, weight_notes = load_weights(
        files.folder,
        name=spec.model,
        gguf=files.gguf,
        on_progress=on_progress,
        pickle=spec.allow_pickle,
        dtype=dtype,
        trust_remote_code=spec.trust_remote_code,
        **options,
    )
    notes += weight_notes
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
        notes.append("eager attention: faster kernels leave out this model's logit caps")
    if files.adapter_folder is not None:
        model, adapter_notes = attach_adapter(model, files.adapter_folder)
        notes += adapter_notes
        if spec.merge_adapter:
            model = model.merge_and_unload()
    if placement is None and not quantised:
        model.to(device)
    elif placement is not None:
        device_note = f"spread by device_map {placement!r}"
    model.eval().requires_grad_(False)
    notes.append(f"{device}: {device_note}")
    info = metadata.info(dtype=dtype, device=device, notes=notes)
    return LoadedModel(model=model, tokenizer=metadata.tokenizer, info=info)


def choose_device(name: str) -> tuple[str, str]:
    """Return the device and the reason for it; ``ModelError`` when it is not available."""
    import torch

    have_mps = torch.backends.mps.is_available()
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda:0", torch.cuda.get_device_name(0)
        return ("mps", "Apple GPU") if have_mps else ("cpu", "no accelerator found")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"There is no device {name!r}: use cpu, cuda, cuda:N or mps.") from error
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not have_mps
    )
    if missing:
        raise ModelError(f"The device {name!r} is not available here: use --device auto or cpu.")
    return name, "as set"


def load_tokenizer(spec: ModelSpec, files: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with the chat template of ``spec`` if it names a file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Of a GGUF file its own: transformers takes that of the architecture for some models.
    tokenizer_class: Any = AutoTokenizer if files.gguf is None else PreTrainedTokenizerFast
    # Without any of its files transformers would hand out an empty tokenizer.
    if not any(next(files.tokenizer_folder.glob(p), None) for p in _TOKENIZER_FILES):
        raise ModelError(
            f"The model {spec.model!r} has no tokenizer in {str(files.tokenizer_folder)!r}: save "
            f"its tokenizer there too."
        )
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = explained(
            lambda: tokenizer_class.from_pretrained(
                files.tokenizer_folder, trust_remote_code=spec.trust_remote_code
            ),
            problem=f"The tokenizer of {spec.model!r} cannot be loaded",
            remedy="the folder must hold a transformers tokenizer",
        )
    if files.gguf is not None:
        tokenizer.name_or_path = files.id  # in messages, not the folder of the cache
    if spec.chat_template is not None:
        try:
            tokenizer.chat_template = read_text(Path(spec.chat_template))
        except FileNotFoundError:
            raise InputError(
                f"There is no chat template {spec.chat_template!r}: check the path."
            ) from None
    return tokenizer


def _load_config(spec: ModelSpec, files: ModelFiles) -> PretrainedConfig:
    declared = read_config(files.folder)
    if "auto_map" in declared and not spec.trust_remote_code and "model_type" not in declared:
        raise ModelError(
            f"{spec.model!r} brings its own code: read it, then use --trust-remote-code."
        )
    config: PretrainedConfig = explained(
        lambda: model_config(files.folder, trust_remote_code=spec.trust_remote_code),
        problem=f"The configuration of {spec.model!r} cannot be used",
        remedy="it may need a newer transformers or --trust-remote-code",
    )
    return config


def _device_map(spec: ModelSpec, files: ModelFiles, device: str, *, itemsize: int) -> str | None:
    """Return the map that is set, or ``auto`` when the weights need several GPUs."""
    import torch

    if spec.device_map is not None:
        return spec.device_map
    if spec.device != "auto" or not device.startswith("cuda") or torch.cuda.device_count() < 2:
        return None
    weights = sum(path.stat().st_size for path in files.folder.glob("*.safetensors"))
    if files.gguf is not None:
        weights = files.gguf.parameters * itemsize
    free, _ = torch.cuda.mem_get_info(0)
    return "auto" if weights * 1.3 > free else None
