from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import save_adapter, saved_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from pvec.errors import ModelError
from pvec.models.files import ModelSpec, locate_model
from pvec.models.fingerprint import chat_fingerprint, model_fingerprint


def fingerprint(folder: Path) -> str:
    return model_fingerprint(locate_model(ModelSpec(model=str(folder))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_model("qwen2"), tmp_path / "model"))


def test_a_copy_has_the_same_fingerprint(folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(saved_model("qwen2"))


def test_a_finetune_has_another(folder: Path) -> None:
    before = fingerprint(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] + 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_the_split_into_files_does_not_matter(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "many")


def test_the_configuration_counts_but_not_the_library_version(folder: Path) -> None:
    before = fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert fingerprint(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert fingerprint(folder) != before


def test_adapters_differ_by_their_weights(tmp_path: Path) -> None:
    base = saved_model("qwen2")
    one, two = (save_adapter(base, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert len({fingerprint(base), fingerprint(one), fingerprint(two)}) == 3


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        fingerprint(folder)


def test_tokenizer_and_template_have_a_fingerprint_of_their_own() -> None:
    assert chat_fingerprint(tiny_tokenizer()) == chat_fingerprint(tiny_tokenizer())
    other = tiny_tokenizer("{{ messages[0]['content'] }}")
    assert chat_fingerprint(other) != chat_fingerprint(tiny_tokenizer())


def test_an_empty_tensor_is_no_trouble(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors") | {"extra": torch.zeros(0, 4)}
    save_file(weights, folder / "model.safetensors")
    assert len(fingerprint(folder)) == 16
