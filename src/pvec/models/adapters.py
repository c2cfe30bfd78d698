"""LoRA adapters put on a loaded model and taken off again, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pvec.errors import ModelError
from pvec.models.files import ModelFiles, ModelSpec, locate_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def find_adapter(base: str, name: str) -> ModelFiles | None:
    """Return the files of the adapter ``name``, or None when it is a whole model.

    Raises ``ModelError`` when it is neither.
    """
    found = locate_model(ModelSpec(model=name))
    if found.adapter_folder is None:
        return None
    return locate_model(ModelSpec(model=base, adapter=name))


@contextmanager
def adapted(model: PreTrainedModel, files: ModelFiles) -> Iterator[PeftModel]:
    """Put an adapter on ``model`` while the context lasts; afterwards it is what it was.

    Raises ``ModelError`` for an adapter that does not fit or does more than change weights.
    """
    from peft import PeftConfig, PeftModel

    folder = str(files.adapter_folder)
    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ModelError(
            f"The adapter {folder!r} is a {config.peft_type} adapter, which adds virtual tokens: "
            f"only adapters that change weights (LoRA and its kin) can be used."
        )
    try:
        wrapped = PeftModel.from_pretrained(model, folder, config=config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise ModelError(
            f"The adapter {folder!r} does not fit its base model ({first}): give the model it was "
            f"trained on."
        ) from error
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()
