"""Attach adapters (LoRA and other weight changes) to a loaded model, and remove them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pvec.errors import ModelError
from pvec.models.files import ModelFiles, ModelSpec, locate_model
from pvec.models.libraries import explained
from pvec.models.weights import WRAPPERS, check_tensors, load_weights, tensor_shapes

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

_WEIGHTS = "adapter_model.safetensors"
_COPY = ".modules_to_save"
"""peft stores an embedding that was trained as a whole a second time under this name."""


def find_adapter(base: str, name: str) -> ModelFiles | None:
    """Return the files of the adapter ``name``, or None when it is a whole model.

    Raises ``ModelError`` when it is neither.
    """
    if locate_model(ModelSpec(model=name)).adapter_folder is None:
        return None
    return locate_model(ModelSpec(model=base, adapter=name))


@contextmanager
def adapted(model: PreTrainedModel, files: ModelFiles) -> Iterator[PeftModel]:
    """Attach an adapter to ``model`` inside the context; afterwards the model is unchanged.

    Raises ``ModelError`` as ``attach_adapter`` does.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper

    folder = files.adapter_folder
    assert folder is not None
    embeddings = _embeddings(model)
    if _embedding_rows(model, tensor_shapes(folder, _WEIGHTS)):  # peft loads into them in place
        embeddings = deepcopy(embeddings)
    size = model.config.get_text_config().vocab_size
    wrapped, _ = attach_adapter(model, folder)
    inner = wrapped.get_base_model()
    replaced = {
        name: module.original_module
        for name, module in inner.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    }
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()  # leaves trained copies of whole modules in place of the originals
        for name, original in replaced.items():
            model.set_submodule(name, original)
        model.set_input_embeddings(embeddings[0])
        if embeddings[1] is not None:
            model.set_output_embeddings(embeddings[1])  # type: ignore[no-untyped-call]
        model.config.get_text_config().vocab_size = size


def has_wrapper_names(folder: Path) -> bool:
    """Whether tensor names of an adapter have prefixes of wrappers, which only peft is spared."""
    return any(_unwrapped(name) != name for name in tensor_shapes(folder, _WEIGHTS))


def check_adapter(base: Path, adapter: Path) -> None:
    """Raise ``ModelError`` as ``attach_adapter`` does, for engines that load adapters themselves.

    ``base`` and ``adapter`` are folders; no memory is taken for the weights.
    """
    model, _ = load_weights(base, name=str(base), device_map="meta")
    attach_adapter(model, adapter)


def attach_adapter(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, tuple[str, ...]]:
    """Return ``model`` with the adapter in ``folder``, and notes for the user.

    Embeddings are resized when the adapter brings some of another size (for added tokens). Raises
    ``ModelError`` for an adapter that is damaged, that adds virtual tokens, or whose tensors do not
    match the modules of ``model``: missing, left over or of another size.
    """
    config = _read_config(folder)
    shapes = tensor_shapes(folder, _WEIGHTS)
    notes = _resize_embeddings(model, shapes, config)
    if has_wrapper_names(folder):
        notes.append("removed the prefix of a wrapper from the adapter's tensor names")
    peft_model = _recording_class()
    with _plain_names(folder, shapes) as plain:
        wrapped = explained(
            lambda: peft_model.from_pretrained(
                model,
                str(plain),
                config=config,
                low_cpu_mem_usage=model.device.type == "meta",
            ),
            problem=f"The adapter {str(folder)!r} does not fit its base model",
            remedy="give the model that it was trained on",
        )
    result = wrapped.load_result
    check_tensors(
        str(folder),
        missing=[_short(key) for key in result.missing_keys],
        left_over=[_short(key) for key in result.unexpected_keys if not _is_copy(key, shapes)],
        remedy="give the model that the adapter was trained on, with --adapter for the adapter",
    )
    return wrapped, tuple(notes)


def _unwrapped(name: str) -> str:
    """Return an adapter's tensor name without prefixes of DistributedDataParallel and the like."""
    head, base, rest = WRAPPERS.sub("", name).partition("base_model.model.")
    return head + base + WRAPPERS.sub("", rest)


@contextmanager
def _plain_names(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """Yield the adapter's folder, or a copy whose tensor names have no prefixes of wrappers."""
    if all(_unwrapped(name) == name for name in names):
        yield folder
        return
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / _WEIGHTS)
    with TemporaryDirectory() as copy:
        renamed = {_unwrapped(name): tensor for name, tensor in tensors.items()}
        save_file(renamed, Path(copy, _WEIGHTS))
        yield Path(copy)


def _read_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    config: PeftConfig = explained(
        lambda: PeftConfig.from_pretrained(str(folder)),
        problem=f"The configuration of the adapter {str(folder)!r} cannot be used",
        remedy="save the adapter again, or install a newer peft",
    )
    if config.is_prompt_learning:
        raise ModelError(
            f"The adapter {str(folder)!r} is a {config.peft_type} adapter, which adds virtual "
            f"tokens: only adapters that change weights (such as LoRA) can be used."
        )
    config.task_type = None  # so that ``from_pretrained`` makes the class that it is called on
    return config


def _recording_class() -> Any:
    """Return peft's model class, keeping which keys ``from_pretrained`` only warns about."""
    from peft import PeftModelForCausalLM

    class RecordingPeftModel(PeftModelForCausalLM):
        load_result: Any

        def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
            self.load_result = super().load_adapter(*args, **kwargs)
            return self.load_result._replace(missing_keys=[])  # refused by name, with no warning

    return RecordingPeftModel


def _short(key: str) -> str:
    """Return a tensor's name without what peft puts around it."""
    return key.removeprefix("base_model.model.").replace(".default.", ".")


def _is_copy(key: str, shapes: Mapping[str, Any]) -> bool:
    return _COPY in key and key.replace(_COPY, "") in shapes


def _embeddings(model: Any) -> tuple[nn.Module, nn.Module | None]:
    """Return the input and the output embedding (None for a model that has none)."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _embedding_rows(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> set[int]:
    """Return the numbers of rows of the embeddings that an adapter brings as a whole."""
    ends = [name for name, module in model.named_modules() if module in _embeddings(model)]
    return {
        shape[0]
        for key, shape in shapes.items()
        if len(shape) == 2
        and key.endswith("weight")
        and "lora_" not in key
        and any(f".{end}." in key for end in ends)
    }


def _resize_embeddings(
    model: Any, shapes: Mapping[str, tuple[int, ...]], config: PeftConfig
) -> list[str]:
    """Give the model's embeddings the number of rows that the adapter was trained with."""
    before = int(model.get_input_embeddings().weight.shape[0])
    trained = getattr(config, "trainable_token_indices", None) or []
    if isinstance(trained, Mapping):
        trained = [index for indices in trained.values() for index in indices]
    rows = _embedding_rows(model, shapes)
    if not rows and trained:
        rows = {max(before, *(index + 1 for index in trained))}
        untrained = set(range(before, max(rows))) - set(trained)
        if untrained:
            raise ModelError(
                f"The adapter was trained with an embedding of {max(rows):,} tokens, the model has "
                f"{before:,}, and the adapter does not hold all rows between: save it with "
                f"save_embedding_layers=True."
            )
    if len(rows) != 1 or rows == {before}:
        return []
    (after,) = rows
    model.resize_token_embeddings(after, mean_resizing=False)
    return [f"resized the embeddings from {before:,} to {after:,} tokens, as the adapter needs"]
