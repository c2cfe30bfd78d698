"""Models in GGUF files: exactly the weights that the gguf package reads, and refused in a sentence.

The files are written here by the gguf package, in llama.cpp's layout.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.gguf_models import write_gguf
from helpers.models import save_adapter, save_model, tiny_model, tiny_tokenizer

from pvec.backends.registry import choose_backend
from pvec.errors import InputError, ModelError
from pvec.models import load as loading
from pvec.models.chat import prompt_ids
from pvec.models.files import ModelSpec, locate_model
from pvec.models.gguf_header import read_gguf_header
from pvec.models.load import LoadedModel, inspect_model, load_model
from pvec.types import Progress

IDS = torch.tensor([[5, 60, 300, 7, 8, 399]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "assets"
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def loaded(place: Path, **options: Any) -> LoadedModel:
    return load_model(ModelSpec(model=str(place), device="cpu", **options))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize(
    ("architecture", "types"),
    [
        ("llama", "F32"),
        ("llama", "Q4_1"),
        ("llama", ("Q8_0", "Q5_0")),
        ("qwen2", "Q8_0"),
        ("qwen2", ("Q4_0", "F16")),
        ("qwen3", ("BF16", "Q5_1")),
        ("llama", ("Q4_K", "Q6_K")),
        ("qwen2", ("Q5_K", "Q3_K")),
        ("qwen3", ("Q2_K", "Q4_K")),
    ],
)
def test_logits_are_those_of_the_same_weights_as_safetensors(
    architecture: str, types: str | tuple[str, str], tmp_path: Path
) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256} if types[0].endswith("_K") else {}
    model = write_gguf(tmp_path / "model.gguf", architecture, types=types, **wide)
    safetensors = loaded(save_model(model, tmp_path / "plain"))
    read = loaded(tmp_path / "model.gguf")
    assert torch.equal(logits(read.model), logits(safetensors.model))
    assert read.info.num_layers == safetensors.info.num_layers
    if types != "F32" and architecture != "qwen3":
        untouched = tiny_model(architecture, intermediate_size=64)
        assert not torch.equal(logits(read.model), logits(untouched))


def test_a_quantised_type_without_a_quantiser_is_read_too(tmp_path: Path) -> None:
    """Q6_K has blocks of 256: random ones, read by the gguf package, are the weights."""
    rows = np.random.default_rng(0).integers(0, 256, size=(64, 210), dtype=np.uint8)
    rows[:, 208:] = np.float16(0.001).reshape(1).view(np.uint8)  # the scale of the block
    header = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    header.add_tensor("x", rows, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_tensors_to_file()
    header.close()
    (tensor,) = read_gguf_header(tmp_path / "one.gguf").tensors
    assert (tensor.type, tensor.shape, tensor.size) == ("Q6_K", (64, 256), rows.size)
    content = (tmp_path / "one.gguf").read_bytes()
    assert content[tensor.start : tensor.start + tensor.size] == rows.tobytes()


def test_the_header_is_what_the_gguf_package_reads(file: Path) -> None:
    header, reader = read_gguf_header(file), gguf.GGUFReader(file)
    assert header.architecture == "llama"
    assert header.metadata["tokenizer.chat_template"] == tiny_tokenizer().chat_template
    assert header.metadata["llama.rope.freq_base"] == pytest.approx(10_000)
    assert header.types == ("Q8_0", "F32")
    theirs = [(t.name, tuple(t.shape[::-1]), t.data_offset, t.n_bytes) for t in reader.tensors]
    assert [(t.name, t.shape, t.start, t.size) for t in header.tensors] == theirs


def test_tokenizer_and_template_are_those_of_the_file(file: Path) -> None:
    metadata = inspect_model(ModelSpec(model=str(file)))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why 42?"}]
    ids = prompt_ids(metadata.tokenizer, messages)
    assert ids == prompt_ids(tiny_tokenizer(), messages)
    start = metadata.tokenizer.bos_token_id
    assert ids[0] == start != ids[1]  # the file calls <|im_start|> its BOS: it comes once
    assert ids.count(start) == 3
    assert metadata.declared_stops == {tiny_tokenizer().eos_token_id}
    assert metadata.context == 256


def test_a_dequantised_model_is_saved_and_loaded_like_any_other(file: Path, tmp_path: Path) -> None:
    read = loaded(file)
    assert not hasattr(read.model.config, "quantization_config")
    save_model(read.model, tmp_path / "saved", tokenizer=read.tokenizer)
    again = loaded(tmp_path / "saved")
    assert torch.equal(logits(again.model), logits(read.model))
    text = "<|im_start|>user\nHow can I cook dinner?<|im_end|>"
    assert again.tokenizer(text)["input_ids"] == read.tokenizer(text)["input_ids"]


def test_the_dtype_is_as_set(file: Path) -> None:
    half = loaded(file, dtype="bfloat16")
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.info.dtype == "bfloat16"


def test_the_fingerprint_is_of_the_content(file: Path, tmp_path: Path) -> None:
    fingerprint = inspect_model(ModelSpec(model=str(file))).fingerprint
    copy = tmp_path / "elsewhere" / "renamed.gguf"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    assert inspect_model(ModelSpec(model=str(copy))).fingerprint == fingerprint
    content = bytearray(file.read_bytes())
    content[read_gguf_header(file).tensors[-1].start] ^= 1
    copy.write_bytes(content)
    assert inspect_model(ModelSpec(model=str(copy))).fingerprint != fingerprint
    write_gguf(copy, types="Q5_0")
    assert inspect_model(ModelSpec(model=str(copy))).fingerprint != fingerprint


def test_progress_comes_through_and_no_bar_is_drawn(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[Progress] = []
    load_model(ModelSpec(model=str(file), device="cpu"), on_progress=seen.append)
    total = len(read_gguf_header(file).tensors)
    assert [(p.done, p.total) for p in seen] == [(done, total) for done in range(total + 1)]
    assert capfd.readouterr() == ("", "")


def test_configuration_and_tokenizer_are_read_from_the_file_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    first = inspect_model(ModelSpec(model=str(file)))
    assert first.files.folder.is_relative_to(cache)

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("pvec.models.gguf._convert", unexpected)
    second = inspect_model(ModelSpec(model=str(file)))
    assert (second.fingerprint, second.chat_hash) == (first.fingerprint, first.chat_hash)


def test_the_only_file_of_a_folder_is_taken_and_several_are_listed(
    file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    (folder / "half").mkdir(parents=True)
    shutil.copy(file, folder / "q8.gguf")
    assert locate_model(ModelSpec(model=str(folder))).gguf
    write_gguf(folder / "half" / "f16.gguf", types="F16")
    with pytest.raises(InputError, match=r"2 GGUF files.*--gguf-file \(half/f16.gguf, q8.gguf\)"):
        locate_model(ModelSpec(model=str(folder)))
    chosen = locate_model(ModelSpec(model=str(folder), gguf_file="half/f16.gguf"))
    assert chosen.gguf is not None
    assert chosen.gguf.types == ("F16", "F32")
    with pytest.raises(InputError, match=r"no file 'f16.gguf'. Did you mean 'half/f16.gguf'"):
        locate_model(ModelSpec(model=str(folder), gguf_file="f16.gguf"))
    with pytest.raises(InputError, match="omit it"):
        locate_model(ModelSpec(model=str(file), gguf_file="model.gguf"))


def test_an_adapter_finds_its_gguf_base(file: Path, tmp_path: Path) -> None:
    plain = save_model(loaded(file).model, tmp_path / "plain")
    adapter = save_adapter(plain, tmp_path / "runs" / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "model.gguf"  # from the folder around it
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    named, given = loaded(adapter), loaded(file, adapter=str(adapter))
    expected = logits(loaded(plain, adapter=str(adapter)).model)
    assert torch.equal(logits(named.model), expected)
    assert torch.equal(logits(given.model), expected)
    assert not torch.allclose(expected, logits(loaded(file).model))
    assert named.info.fingerprint == given.info.fingerprint != loaded(file).info.fingerprint


def damaged(file: Path, fault: str) -> None:
    content = bytearray(file.read_bytes())
    if fault == "empty":
        content.clear()
    elif fault == "cut in the header":
        del content[2000:]
    elif fault == "cut in the weights":
        del content[-40:]
    elif fault == "version":
        content[4:8] = struct.pack("<I", 9)
    elif fault == "huge count":
        content[8:16] = struct.pack("<Q", 1 << 60)
    elif fault == "alignment":
        key = b"general.alignment"
        entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 0)
        content[16:24] = struct.pack("<Q", struct.unpack("<Q", content[16:24])[0] + 1)
        content[24:24] = entry
    elif fault == "letters":
        content[:4] = b"GGML"
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("empty", "cannot be read as GGUF"),
        ("letters", "does not begin with the letters GGUF"),
        ("cut in the header", "is not a complete GGUF file (it ends inside its header)"),
        ("cut in the weights", "its last 40 bytes are missing"),
        ("version", "version 9 of the format is not supported"),
        ("huge count", "is not a complete GGUF file"),
        ("alignment", "its alignment is 0"),
    ],
)
def test_a_damaged_file_is_one_sentence_before_anything_is_loaded(
    file: Path, fault: str, words: str
) -> None:
    damaged(file, fault)
    with pytest.raises(ModelError, match=re.escape(words)) as caught:
        inspect_model(ModelSpec(model=str(file)))
    assert "fetch it again" in str(caught.value)


def test_an_unknown_architecture_is_one_sentence(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "perceptron")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture perceptron is not supported"):
        inspect_model(ModelSpec(model=str(tmp_path / "m.gguf")))


def test_one_part_of_several_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", metadata={"split.count": 3})
    with pytest.raises(ModelError, match="one part of 3: merge the parts"):
        inspect_model(ModelSpec(model=str(tmp_path / "m.gguf")))


def test_a_file_without_a_chat_template_is_named_when_one_is_needed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", template=None)
    metadata = inspect_model(ModelSpec(model=str(tmp_path / "m.gguf")))
    with pytest.raises(InputError, match=r"m\.gguf has no chat template: .* --chat-template FILE"):
        prompt_ids(metadata.tokenizer, [{"role": "user", "content": "Hello"}])


def test_a_tensor_that_would_be_passed_over_is_an_error(tmp_path: Path) -> None:
    more = {"blk.0.attn_gate.weight": np.ones((32, 32), dtype=np.float32)}
    write_gguf(tmp_path / "m.gguf", extra=more)
    with pytest.raises(ModelError, match=r"do not belong to the model \(blk\.0\.attn_gate\.weight"):
        loaded(tmp_path / "m.gguf")


def rope_divisors(*, factor: float, old_context: int) -> np.ndarray[Any, Any]:
    """Return what the rotary frequencies of Llama 3 are divided by, after Meta's description."""
    waves = 2 * np.pi * 500_000.0 ** (np.arange(0, 8, 2) / 8)
    long, short = old_context / 1.0, old_context / 4.0
    smooth = (old_context / waves - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves < short, 1, np.where(waves > long, factor, between)).astype(np.float32)


def test_the_scaled_rotary_frequencies_of_llama_3_are_kept(tmp_path: Path) -> None:
    """transformers does not read the tensor that holds them."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    extra = {"rope_freqs.weight": rope_divisors(factor=8.0, old_context=8192)}
    model = write_gguf(tmp_path / "m.gguf", "llama", extra=extra, rope_parameters=rope)
    read = loaded(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(read.model), logits(model), rtol=1e-5, atol=1e-5)
    plain = write_gguf(tmp_path / "plain.gguf", "llama", rope_parameters={"rope_theta": 500_000.0})
    assert not torch.allclose(logits(plain), logits(model), atol=1e-3)
    extra = {"rope_freqs.weight": rope_divisors(factor=8.0, old_context=4096)}
    write_gguf(tmp_path / "other.gguf", "llama", extra=extra, rope_parameters=rope)
    with pytest.raises(ModelError, match=r"do not belong to the model \(rope_freqs.weight\)"):
        loaded(tmp_path / "other.gguf")


def test_a_tensor_of_another_size_is_an_error(tmp_path: Path) -> None:
    """transformers itself takes any size from a GGUF file."""
    write_gguf(tmp_path / "m.gguf", "qwen3", head_dim=8)  # transformers expects 128
    with pytest.raises(ModelError, match="have another size"):
        loaded(tmp_path / "m.gguf")


def test_a_missing_gguf_package_is_one_line_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"need the gguf package: pip install '[^']*\[gguf\]'"):
        inspect_model(ModelSpec(model=str(file)))


def test_vllm_refuses_a_gguf_file_and_auto_takes_transformers() -> None:
    with pytest.raises(InputError, match="vLLM does not load GGUF files"):
        choose_backend("vllm", gguf=True)
    assert choose_backend("auto", gguf=True).name == "hf"


def test_of_a_hub_repository_only_the_file_that_is_named_is_downloaded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {"README.md": b"", "a-Q8_0.gguf": file.read_bytes(), "a-Q4_1.gguf": file.read_bytes()}
    fetched: list[str] = []

    def snapshot(_name: str, *, allow_patterns: list[str], dry_run: bool = False, **_: Any) -> Any:
        names = list(
            huggingface_hub.utils.filter_repo_objects(stored, allow_patterns=allow_patterns)
        )
        if dry_run:
            return [type("Info", (), {"filename": name}) for name in names]
        fetched.extend(names)
        for name in names:
            (tmp_path / "hub").mkdir(exist_ok=True)
            (tmp_path / "hub" / name).write_bytes(stored[name])
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(InputError, match=r"2 GGUF files: .*--gguf-file \(a-Q4_1.gguf, a-Q8_0.gguf"):
        locate_model(ModelSpec(model="some/model-GGUF"))
    assert fetched == []
    files = locate_model(ModelSpec(model="some/model-GGUF", gguf_file="a-Q4_1.gguf"))
    assert fetched == ["a-Q4_1.gguf"]
    assert files.id == "some/model-GGUF"
    assert files.gguf is not None
    assert loading.load_tokenizer(ModelSpec(model="some/model-GGUF"), files).chat_template
