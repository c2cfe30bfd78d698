"""Finding, inspecting and loading models from real folders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.models import save_adapter, save_model, saved_model, tiny_model, tiny_tokenizer

from pvec.errors import InputError, ModelError
from pvec.models import files as modelfiles
from pvec.models import load as loading
from pvec.models.files import ModelSpec, locate_model
from pvec.models.fingerprint import model_fingerprint
from pvec.models.load import inspect_model, load_model
from pvec.models.precision import bfloat16_speed, choose_dtype


def copied(folder: Path) -> Path:
    shutil.copytree(saved_model("qwen2"), folder)
    return folder


def test_inspecting_reads_everything_but_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_weights", lambda *_a, **_k: pytest.fail("weights loaded"))
    metadata = inspect_model(ModelSpec(model=str(saved_model("gemma3"))))
    assert (metadata.num_layers, metadata.hidden_size, metadata.context) == (3, 32, 256)
    assert len(metadata.fingerprint) == len(metadata.chat_hash) == 16
    assert metadata.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert metadata.adapter is None


def test_threads_may_load_at_once() -> None:
    # in a process of its own: the first import of transformers is part of it
    code = """if True:
        from concurrent.futures import ThreadPoolExecutor
        from pvec.models.files import ModelSpec
        from pvec.models.load import load_model
        with ThreadPoolExecutor(4) as threads:
            specs = [ModelSpec(model=name) for name in ("tiny", "tiny/judge") * 2]
            loaded = list(threads.map(load_model, specs))
        print(*(model.info.fingerprint for model in loaded))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, *others = done.stdout.split()
    assert others == [first, second]


def test_a_loaded_model_says_what_was_chosen_and_why() -> None:
    loaded = load_model(ModelSpec(model=str(saved_model("qwen2"))))
    metadata = inspect_model(ModelSpec(model=str(saved_model("qwen2"))))
    assert loaded.info.fingerprint == metadata.fingerprint
    assert loaded.info.dtype == str(loaded.model.dtype).removeprefix("torch.")
    assert any(note.startswith(f"{loaded.info.dtype}: ") for note in loaded.info.notes)
    assert any(note.startswith(f"{loaded.info.device}: ") for note in loaded.info.notes)
    assert not loaded.model.training


def test_a_dtype_is_taken_as_asked() -> None:
    loaded = load_model(ModelSpec(model=str(saved_model("qwen2")), dtype="bfloat16", device="cpu"))
    assert loaded.model.dtype == torch.bfloat16
    assert "bfloat16: as set" in loaded.info.notes


@pytest.mark.parametrize(
    ("cuda", "bf16", "dtype"),
    [(False, False, "float32"), (True, True, "bfloat16"), (True, False, "float16")],
)
def test_the_dtype_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, bf16: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "A GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device, reason = loading.choose_device("auto")
    assert (device, reason) == (("cuda:0", "A GPU") if cuda else ("cpu", "no accelerator found"))
    assert str(choose_dtype("auto", device)[0]) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("stored", "speed", "dtype"),
    [
        ("float32", 2.0, "float32"),
        ("bfloat16", 2.0, "bfloat16"),
        ("float16", 2.0, "bfloat16"),
        ("bfloat16", 0.5, "float32"),
    ],
)
def test_on_a_cpu_half_precision_weights_run_in_bfloat16_where_that_is_faster(
    stored: str, speed: float, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pvec.models.precision.bfloat16_speed", lambda: speed)
    tiny_model("qwen2").to(getattr(torch, stored)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(ModelSpec(model=str(tmp_path), device="cpu"))
    assert loaded.model.dtype == getattr(torch, dtype)
    assert any(note.startswith(f"{dtype}: ") for note in loaded.info.notes)


def test_the_processor_is_asked_how_fast_it_multiplies_bfloat16() -> None:
    start = time.process_time()
    assert 0.01 < bfloat16_speed.__wrapped__() < 10
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("device", ["cuda:99", "mps", "tpu9"])
def test_a_device_that_is_not_there_is_refused(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match="device"):
        loading.choose_device(device)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no/such/folder", "tinny", "bad name!"])
def test_an_unknown_model_is_one_sentence_even_offline(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        inspect_model(ModelSpec(model=name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    if name == "tinny":
        assert "Did you mean 'tiny'" in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not hold a model"):
        inspect_model(ModelSpec(model=str(tmp_path)))


def test_the_latest_checkpoint_of_a_folder_is_taken_and_said(tmp_path: Path) -> None:
    for number, seed in ((20, 1), (100, 2), (3, 3)):
        save_model(tiny_model(seed=seed), tmp_path / f"checkpoint-{number}")
    metadata = inspect_model(ModelSpec(model=str(tmp_path)))
    assert metadata.id == f"{tmp_path}/checkpoint-100"
    assert f"checkpoint-100: the latest of 3 checkpoints in {tmp_path}" in metadata.notes
    direct = inspect_model(ModelSpec(model=str(tmp_path / "checkpoint-100")))
    assert metadata.fingerprint == direct.fingerprint


def test_an_adapter_finds_its_base_and_is_the_same_active_or_merged(tmp_path: Path) -> None:
    base = saved_model("qwen2")
    adapter = save_adapter(base, tmp_path / "adapter")
    by_folder = load_model(ModelSpec(model=str(adapter)))
    by_option = load_model(ModelSpec(model=str(base), adapter=str(adapter)))
    merged = load_model(ModelSpec(model=str(adapter), merge_adapter=True))
    plain = load_model(ModelSpec(model=str(base)))
    ids = torch.tensor([[5, 60, 300, 7]])
    with torch.no_grad():
        active = by_folder.model(ids).logits
        assert torch.equal(active, by_option.model(ids).logits)
        torch.testing.assert_close(active, merged.model(ids).logits, rtol=1e-4, atol=1e-4)
        assert (active - plain.model(ids).logits).abs().max() > 0.1
    assert by_folder.info.adapter == str(adapter)
    assert by_folder.info.fingerprint == by_option.info.fingerprint != plain.info.fingerprint
    assert not hasattr(merged.model, "peft_config")


def test_an_adapter_whose_base_is_gone_says_what_to_give(tmp_path: Path) -> None:
    adapter = save_adapter(saved_model("qwen2"), tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/no/such/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="base model '/no/such/base' of the adapter"):
        inspect_model(ModelSpec(model=str(adapter)))
    assert inspect_model(ModelSpec(model=str(saved_model("qwen2")), adapter=str(adapter))).adapter


def test_a_model_given_as_adapter_is_refused() -> None:
    base = str(saved_model("qwen2"))
    with pytest.raises(ModelError, match="is not an adapter"):
        inspect_model(ModelSpec(model=base, adapter=base))


def test_an_adapter_of_another_shape_is_one_sentence(tmp_path: Path) -> None:
    adapter = save_adapter(saved_model("qwen2"), tmp_path / "adapter")
    narrow = save_model(tiny_model(hidden_size=16), tmp_path / "narrow")
    with pytest.raises(ModelError, match="does not fit its base model"):
        load_model(ModelSpec(model=str(narrow), adapter=str(adapter)))


def test_pickled_weights_are_refused_unless_asked_for(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    model = tiny_model()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="--allow-pickle"):
        load_model(ModelSpec(model=str(folder)))
    loaded = load_model(ModelSpec(model=str(folder), allow_pickle=True))
    ids = torch.tensor([[5, 6]])
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:20])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        inspect_model(ModelSpec(model=str(folder)))
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        load_model(ModelSpec(model=str(folder)))
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        inspect_model(ModelSpec(model=str(folder)))


def test_a_missing_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        inspect_model(ModelSpec(model=str(tmp_path)))


def test_a_chat_template_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    base = str(saved_model("qwen2"))
    metadata = inspect_model(ModelSpec(model=base, chat_template=str(template)))
    plain = inspect_model(ModelSpec(model=base))
    assert metadata.tokenizer.chat_template == template.read_text()
    assert metadata.chat_hash != plain.chat_hash
    assert metadata.fingerprint == plain.fingerprint
    with pytest.raises(InputError, match="There is no chat template"):
        inspect_model(ModelSpec(model=base, chat_template=str(tmp_path / "absent")))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "model")
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not a decoder-only language model"):
        inspect_model(ModelSpec(model=str(folder)))


def test_a_model_that_caps_attention_logits_runs_with_its_caps(tmp_path: Path) -> None:
    capped = tiny_model("gemma2", attn_logit_softcapping=0.5)
    folder = save_model(capped, tmp_path)
    loaded = load_model(ModelSpec(model=str(folder), device="cpu"))
    capped.set_attn_implementation("eager")
    ids = torch.tensor([[5, 60, 300, 7]])
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, capped(ids).logits)
        capped.set_attn_implementation("sdpa")
        assert not torch.allclose(loaded.model(ids).logits, capped(ids).logits, atol=1e-3)
    assert any("caps" in note for note in loaded.info.notes)


def test_the_bundled_model_is_found_by_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelfiles, "__file__", str(tmp_path / "backends" / "modelfiles.py"))
    with pytest.raises(ModelError, match="no bundled model 'tiny'"):
        locate_model(ModelSpec(model="tiny"))
    copied(tmp_path / "tiny")
    tiny_model(seed=5).save_pretrained(tmp_path / "tiny" / "judge")
    files = locate_model(ModelSpec(model="tiny"))
    judge = locate_model(ModelSpec(model="tiny/judge"))
    assert files.bundled
    assert judge.folder == tmp_path / "tiny" / "judge"
    assert judge.tokenizer_folder == tmp_path / "tiny"
    assert model_fingerprint(files) != model_fingerprint(judge)
