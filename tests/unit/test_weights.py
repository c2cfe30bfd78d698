"""What was loaded is what was asked for: every tensor, of the model and of the adapter."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import save_adapter, save_model, saved_model, tiny_model, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from pvec.backends.vllm.weights import check_parameters, mark_parameters
from pvec.errors import InputError, ModelError
from pvec.models import files as modelfiles
from pvec.models.adapters import adapted
from pvec.models.files import ModelSpec, locate_model
from pvec.models.hub import download
from pvec.models.load import inspect_model, load_model
from pvec.models.stored import compare_weights
from pvec.models.weights import check_checkpoint, load_weights, read_header

Tensors = dict[str, torch.Tensor]
IDS = torch.tensor([[5, 60, 300, 7]])


def rewritten(
    folder: Path, change: Callable[[Tensors], Tensors], *, file: str = "model.safetensors"
) -> Path:
    """Return ``folder`` after ``change`` was applied to the tensors of one of its files."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    save_file(change(tensors), folder / file, metadata={"format": "pt"})
    return folder


def copy_of(architecture: str, folder: Path) -> Path:
    return Path(shutil.copytree(saved_model(architecture), folder))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model(ids).logits
    return result


def without_block(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".1." not in name}


def with_a_fourth_block(tensors: Tensors) -> Tensors:
    return tensors | {n.replace(".2.", ".3."): t.clone() for n, t in tensors.items() if ".2." in n}


def narrower(tensors: Tensors) -> Tensors:
    return {n: t[:-1] if t.shape[0] == 400 else t for n, t in tensors.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without_block, r"\d+ tensors are missing \(\S+\.1\.\S+"),
        (with_a_fourth_block, r"\d+ tensors do not belong to the model \(\S+\.3\.\S+"),
        (narrower, r"another size \(\S+ is 399×32 in the file and 400×32 in the model\)"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_with_their_names(
    architecture: str, change: Callable[[Tensors], Tensors], complaint: str, tmp_path: Path
) -> None:
    folder = rewritten(copy_of(architecture, tmp_path / "model"), change)
    for refuse in (
        lambda: load_model(ModelSpec(model=str(folder))),
        lambda: check_checkpoint(folder, name=str(folder)),
    ):
        with pytest.raises(ModelError, match=complaint) as caught:
            refuse()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_fsdp_wrapped_module."]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_of_a_wrapper_is_removed_with_a_note(
    prefix: str, architecture: str, tmp_path: Path
) -> None:
    folder = rewritten(
        copy_of(architecture, tmp_path / "model"),
        lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()},
    )
    loaded = load_model(ModelSpec(model=str(folder)))
    whole = load_model(ModelSpec(model=str(saved_model(architecture))))
    assert torch.equal(logits(loaded.model), logits(whole.model))
    assert any("from tensor names" in note for note in loaded.info.notes)
    assert not any("from tensor names" in note for note in whole.info.notes)
    loaded.model.save_pretrained(tmp_path / "saved")  # under the plain names
    assert compare_weights(loaded.model, tmp_path / "saved").different == ()
    with pytest.raises(ModelError, match=r"prefix of torch\.compile"):
        check_checkpoint(folder, name="model")  # an engine of its own would not remove it


def test_a_compiled_part_of_a_model_is_found_too(tmp_path: Path) -> None:
    folder = rewritten(
        copy_of("llama", tmp_path / "model"),
        lambda tensors: {n.replace("model.", "model._orig_mod."): t for n, t in tensors.items()},
    )
    whole = load_model(ModelSpec(model=str(saved_model("llama"))))
    loaded = load_model(ModelSpec(model=str(folder)))
    assert torch.equal(logits(loaded.model), logits(whole.model))


def test_tied_weights_and_constants_of_old_checkpoints_are_no_fault(tmp_path: Path) -> None:
    tied = save_model(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    rewritten(
        tied,
        lambda tensors: (
            tensors
            | {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "mtp.0.w": torch.ones(2),
            }
        ),
    )
    model, notes = load_weights(tied, name="tied")
    assert torch.equal(logits(model), logits(tiny_model("llama", tie_word_embeddings=True)))
    assert notes == ("1 tensors of other parts of the model are not used",)
    rewritten(tied, lambda tensors: {n: t for n, t in tensors.items() if "embed" not in n})
    with pytest.raises(ModelError, match="tensors are missing"):
        load_weights(tied, name="tied")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "model")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        inspect_model(ModelSpec(model=str(folder)))


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b'{"x": {}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": []}}',
        b'{"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}' % (b"9" * 6000),
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda header: header[:60].decode(),
)
def test_a_header_that_says_nothing_of_its_tensors_is_refused(
    header: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        read_header(file)
    good = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    file.write_bytes(len(good).to_bytes(8, "little") + good + bytes(8))
    assert read_header(file)[1] == 8 + len(good)


def test_a_pipe_among_the_weights_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    folder = copy_of("llama", tmp_path / "model")
    os.mkfifo(folder / "more.safetensors")
    with pytest.raises(InputError, match="a pipe or a device"):
        inspect_model(ModelSpec(model=str(folder)))


# adapters


def renamed(folder: Path, old: str, new: str) -> Path:
    return rewritten(
        folder,
        lambda tensors: {n.replace(old, new): t for n, t in tensors.items()},
        file="adapter_model.safetensors",
    )


def test_an_adapter_whose_tensors_match_nothing_is_refused(tmp_path: Path) -> None:
    base = saved_model("llama")
    adapter = renamed(save_adapter(base, tmp_path / "ad"), "model.layers", "model.language.layers")
    with pytest.raises(ModelError, match=r"12 tensors are missing .*12 tensors do not belong"):
        load_model(ModelSpec(model=str(base), adapter=str(adapter)))
    with (
        pytest.raises(ModelError, match="do not belong to the model"),
        adapted(tiny_model("llama"), locate_model(ModelSpec(model=str(adapter)))),
    ):
        pass


def test_an_adapter_for_more_layers_is_refused(tmp_path: Path) -> None:
    deep = save_model(tiny_model("llama", num_layers=4), tmp_path / "deep")
    adapter = save_adapter(deep, tmp_path / "ad")
    with pytest.raises(ModelError, match=r"4 tensors do not belong .*layers\.3\."):
        load_model(ModelSpec(model=str(saved_model("llama")), adapter=str(adapter)))


@pytest.mark.parametrize(
    "renamed_to",
    [
        "base_model.model._orig_mod.",
        "base_model.model.module.",
        "module.base_model.model.",
        "module._orig_mod.base_model.model._fsdp_wrapped_module.",
    ],
)
def test_an_adapter_of_a_wrapped_model_is_loaded(renamed_to: str, tmp_path: Path) -> None:
    base = saved_model("llama")
    plain = load_model(ModelSpec(model=str(save_adapter(base, tmp_path / "ad"))))
    adapter = renamed(tmp_path / "ad", "base_model.model.", renamed_to)
    loaded = load_model(ModelSpec(model=str(adapter)))
    assert torch.equal(logits(loaded.model), logits(plain.model))
    assert any("prefix" in note for note in loaded.info.notes)


@pytest.mark.parametrize("damage", ["no weights", "half", "unknown type", "not JSON"])
def test_a_damaged_adapter_is_one_sentence(damage: str, tmp_path: Path) -> None:
    base = saved_model("llama")
    adapter = save_adapter(base, tmp_path / "ad")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "half":
        weights.write_bytes(weights.read_bytes()[:300])
    elif damage == "unknown type":
        config.write_text(config.read_text().replace('"LORA"', '"SOMETHING"'))
    else:
        config.write_text("{")
    with pytest.raises(ModelError) as caught:
        load_model(ModelSpec(model=str(base), adapter=str(adapter)))
    assert "\n" not in str(caught.value)


def trained(base: Path, folder: Path, *, tokens: int = 400, **options: Any) -> tuple[Any, Path]:
    """Save an adapter with random weights in all that it trains; return its model and folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if tokens != 400:
        model.resize_token_embeddings(tokens)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says that it saves resized embeddings
        wrapped.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return wrapped.eval(), folder


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "a whole norm": {"modules_to_save": ["norm"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "added tokens": {"tokens": 403, "modules_to_save": ["embed_tokens", "lm_head"]},
    "fewer tokens": {"tokens": 390, "modules_to_save": ["embed_tokens", "lm_head"]},
    "trained token": {"tokens": 401, "trainable_token_indices": [400]},
    "old trained tokens": {"trainable_token_indices": [7, 300]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_computes_what_peft_trained(kind: str, tmp_path: Path) -> None:
    base = saved_model("llama")
    expected, folder = trained(base, tmp_path / "ad", **ADAPTERS[kind])
    loaded = load_model(ModelSpec(model=str(base), adapter=str(folder)))
    torch.testing.assert_close(logits(loaded.model), logits(expected))
    plain = tiny_model("llama")
    before = logits(plain)
    with adapted(plain, locate_model(ModelSpec(model=str(base), adapter=str(folder)))) as wrapped:
        torch.testing.assert_close(logits(wrapped), logits(expected))
    assert torch.equal(logits(plain), before), "the base is what it was"
    assert plain.config.vocab_size == 400
    rows = ADAPTERS[kind].get("tokens", 400)
    resized = [note for note in loaded.info.notes if "resized the embeddings" in note]
    assert bool(resized) == (rows != 400)


def test_added_tokens_that_the_adapter_does_not_hold_are_refused(tmp_path: Path) -> None:
    base = saved_model("llama")
    _, folder = trained(base, tmp_path / "ad", tokens=403, trainable_token_indices=[402])
    rewritten(
        folder,
        lambda tensors: {n: t for n, t in tensors.items() if "lora" in n or "delta" in n},
        file="adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match="an embedding of 403 tokens, the model has 400"):
        load_model(ModelSpec(model=str(base), adapter=str(folder)))


def test_a_relative_base_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of("llama", tmp_path / "models" / "base")
    adapter = save_adapter(saved_model("llama"), tmp_path / "runs" / "train" / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "models/base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files = locate_model(ModelSpec(model="../runs/train/adapter"))
    assert files.folder.resolve() == tmp_path / "models" / "base"


def test_only_one_copy_of_the_weights_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    listing = [
        *("config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("consolidated.safetensors", "original/model.safetensors", "metal/model.bin"),
        *("pytorch_model.bin", "onnx/model.onnx"),
    ]
    taken: list[str] = []

    def snapshot_download(_name: str, *, revision: Any, **patterns: Any) -> str:
        assert revision is None
        taken.extend(filter_repo_objects(listing, **patterns))
        return "folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    patterns = modelfiles._patterns(ModelSpec(model="org/model"), weights=True)
    download("org/model", revision=None, patterns=patterns)
    assert [name for name in taken if re.search(r"safetensors$|bin$", name)] == listing[4:6]
    assert set(listing[:4]) <= set(taken)


def test_the_weights_in_memory_are_compared_with_every_tensor_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    base = saved_model("llama")
    adapter = save_adapter(base, tmp_path / "ad")
    count = len(load_file(base / "model.safetensors"))
    for spec in (ModelSpec(model=str(base), dtype="bfloat16"), ModelSpec(model=str(adapter))):
        found = compare_weights(load_model(spec).model, base)
        assert (found.compared, found.others, found.different) == (count, 0, ())
    model = load_model(ModelSpec(model=str(base))).model
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1] += 1e-3
    assert compare_weights(model, base).different == ("model.layers.1.mlp.up_proj.weight",)


def test_fused_experts_and_tied_embeddings_are_compared_too(tmp_path: Path) -> None:
    common = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        **common,
        intermediate_size=24,
        num_key_value_heads=1,
        num_local_experts=3,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    folder = save_model(MixtralForCausalLM(config), tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    assert any(".experts.2." in name for name in names), "stored one by one"
    model, _ = load_weights(folder, name="model")
    assert compare_weights(model, folder).compared == len(names)
    with torch.no_grad():
        experts = next(p for n, p in model.named_parameters() if "experts.down_proj" in n)
        experts[1] *= 2
    (different,) = compare_weights(model, folder).different
    assert ".experts.1." in different


def _gptq(name: str, tensor: torch.Tensor) -> Tensors:
    stem = name.removesuffix(".weight")
    return {f"{stem}.qweight": torch.zeros(4, 8, dtype=torch.int32), f"{stem}.scales": tensor[:1]}


def _fp8(name: str, tensor: torch.Tensor) -> Tensors:
    return {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def _bnb(name: str, tensor: torch.Tensor) -> Tensors:
    packed = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
    return {name: packed, f"{name}.absmax": torch.ones(1)}


@pytest.mark.parametrize("pack", [_gptq, _fp8, _bnb])
def test_a_quantised_checkpoint_has_every_module_of_its_model(
    pack: Callable[[str, torch.Tensor], Tensors], tmp_path: Path
) -> None:
    folder = copy_of("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    whole: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        whole |= pack(name, tensor) if "proj.weight" in name else {name: tensor}
    rewritten(folder, lambda _: whole)
    check_checkpoint(folder, name="model")
    lost = {n: t for n, t in whole.items() if "layers.1.mlp.up_proj" not in n}
    rewritten(folder, lambda _: lost)
    with pytest.raises(ModelError, match=r"1 tensors are missing \(model\.layers\.1\.mlp\.up_proj"):
        check_checkpoint(folder, name="model")
    rewritten(folder, lambda _: whole | {"model.layers.3.mlp.up_proj.qweight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"do not belong to the model \(model\.layers\.3\."):
        check_checkpoint(folder, name="model")


def test_what_a_loader_leaves_unset_is_named_and_padding_is_set_to_zero() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    marked = mark_parameters(model)
    with pytest.raises(
        ModelError, match=r"4 tensors are missing \(0\.bias, 0\.weight, 1\.bias and"
    ):
        check_parameters(marked, name="model")
    marked = mark_parameters(model)
    for parameter in marked.values():
        parameter.data.fill_(1)
    marked["0.weight"].data[1, 2] = float("nan")
    with pytest.raises(ModelError, match=r"1 tensors are missing \(0\.weight\)"):
        check_parameters(marked, name="model")
    marked["0.weight"].data[1, 2] = float("nan")
    marked["0.weight"].weight_loader_numel = 5  # type: ignore[attr-defined] # as vLLM says it
    check_parameters(marked, name="model")
    assert marked["0.weight"].data[1, 2] == 0


@pytest.mark.parametrize(
    ("quantisation", "package"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    ],
)
def test_a_quantised_model_names_the_package_that_it_needs(
    quantisation: dict[str, Any], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ModelError, match=rf"are quantised .* pip install {package}, or use the full"
    ):
        load_model(ModelSpec(model=str(folder)))


@pytest.mark.parametrize("quantisation", [{"quant_method": "newone"}, {"bits": 4}])
def test_a_quantisation_that_transformers_does_not_know_is_refused(
    quantisation: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    with pytest.raises(ModelError, match=r"quantised \(.*transformers cannot load"):
        load_model(ModelSpec(model=str(folder)))
