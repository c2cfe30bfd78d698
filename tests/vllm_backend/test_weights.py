"""What vLLM loads is what the checkpoint and the adapter hold, or it is refused with names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import save_adapter
from safetensors.torch import load_file, save_file

from pvec.backends.vllm import engine
from pvec.backends.vllm.engine import VLLMBackend
from pvec.errors import ModelError
from pvec.models.files import ModelSpec
from pvec.settings.sections import VLLMSettings
from vllm_backend.conftest import CACHE_BYTES

Tensors = dict[str, torch.Tensor]
Models = Callable[[str], Path]


def rewritten(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def options(**settings: Any) -> VLLMSettings:
    return VLLMSettings(
        enforce_eager=True, kv_cache_memory_bytes=CACHE_BYTES, block_size=32, slots=2, **settings
    )


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("layers.1.self_attn.k_proj.weight", r"layers\.1\.self_attn\.qkv_proj\.weight"),
        ("layers.2.", r"layers\.2\.\S+ and \d more"),
        ("layers.0.mlp.down_proj", r"layers\.0\.mlp\.down_proj\.weight"),
        ("lm_head.weight", r"lm_head\.weight"),
        ("embed_tokens.weight", r"embed_tokens\.weight"),
    ],
)
def test_what_vllm_did_not_load_is_refused_by_the_worker_itself(
    lost: str, named: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM starts with such a checkpoint, and computes with whatever was in memory."""
    folder = Path(shutil.copytree(models("qwen2"), tmp_path / "model"))
    rewritten(
        folder / "model.safetensors", lambda read: {k: t for k, t in read.items() if lost not in k}
    )
    monkeypatch.setattr(engine, "check_checkpoint", lambda *_args, **_kwargs: None)
    with pytest.raises(ModelError, match=rf"\d+ tensors are missing \(.*{named}"):
        VLLMBackend(str(folder), options=options())


def test_a_damaged_checkpoint_is_refused_before_vllm_starts(models: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models("qwen2"), tmp_path / "model"))
    rewritten(
        folder / "model.safetensors",
        lambda read: read | {k.replace(".2.", ".3."): t.clone() for k, t in read.items()},
    )
    with pytest.raises(ModelError, match=r"do not belong to the model \(model\.layers\.3\."):
        VLLMBackend(str(folder), options=options())


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("another layer", r"do not belong to the model \(model\.layers\.7\."),
        ("no name fits", "do not belong to the model"),
        ("half", r"tensors are missing \(model\.layers\.1\."),
        ("another size", "size mismatch"),
        ("DoRA", "vLLM cannot serve the adapter .* DoRA"),
        ("an embedding", r"tensors besides LoRA \(base_model\.model\.model\.embed_tokens"),
    ],
)
def test_an_adapter_of_which_vllm_would_serve_nothing_or_a_part_is_refused(
    fault: str, complaint: str, models: Models, tmp_path: Path
) -> None:
    base = models("qwen2")
    adapter = save_adapter(base, tmp_path / "adapter")
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        "another layer": lambda read: {k.replace(".2.", ".7."): t for k, t in read.items()},
        "no name fits": lambda read: {k.replace("layers", "blocks"): t for k, t in read.items()},
        "half": lambda read: {k: t for k, t in read.items() if ".1." not in k},
        "another size": lambda read: {
            k: t[:-1].clone() if "v_proj.lora_B" in k else t for k, t in read.items()
        },
        "an embedding": lambda read: (
            read | {"base_model.model.model.embed_tokens.weight": torch.ones(4, 2)}
        ),
        "DoRA": lambda read: read,
    }
    rewritten(adapter / "adapter_model.safetensors", changes[fault])
    if fault == "DoRA":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match=complaint):
        VLLMBackend(ModelSpec(model=str(base), adapter=str(adapter)), options=options())
