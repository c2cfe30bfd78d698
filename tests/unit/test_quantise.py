"""Weights quantised on loading: what they are, what steering on them is, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pvec.backends.hf.backend import HFBackend
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.evaluation.verify.verify import VerifyResult, verify
from pvec.models.files import ModelSpec
from pvec.models.load import load_model
from pvec.models.precision import check_quantise, quantise_config
from pvec.settings import Settings
from pvec.settings.commands import SteerSettings
from pvec.settings.sections import BackendSettings, ModelSettings
from pvec.types import TokenSpans
from tests.helpers.models import save_adapter, save_model, saved_model, tiny_tokenizer

torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def int8_by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight rounded to 256 steps of each row's own size, written out as a loop."""
    rounded = torch.empty_like(weight)
    for number, row in enumerate(weight):
        step = row.abs().max() / 127.5
        rounded[number] = torch.clamp(torch.round(row * (1.0 / step)), -128, 127) * step
    return rounded


def verify_stored(folder: Path) -> VerifyResult:
    model = ModelSettings(id=str(folder), device="cpu")
    return verify(Settings(model=model, steer=SteerSettings(layer="1,3", coef="2")))


@torchao
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_int8_activations_are_those_of_the_rounded_weights(architecture: str) -> None:
    folder = saved_model(architecture)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    full = plain(ids, output_hidden_states=True).hidden_states
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = int8_by_hand(module.weight.data)
    with torch.inference_mode():
        theirs = plain(ids, output_hidden_states=True).hidden_states
    spec = ModelSpec(model=str(folder), device="cpu", quantize="int8")
    sequence = TokenSpans(id="a", token_ids=tuple(range(5, 25)), spans={"prompt": (0, 20)})
    with HFBackend(spec) as backend:
        assert backend.info.quantize == "int8"
        assert any("int8 weights" in note for note in backend.info.notes)
        (means,) = backend.capture([sequence])
    for layer in range(3):  # the last one is normed in transformers' list
        due, exact = theirs[layer][0].mean(dim=0), full[layer][0].mean(dim=0)
        found = torch.from_numpy(means.means["prompt"][layer])
        if layer == 0:  # the embedding stays as it is
            assert torch.equal(due, exact)
            assert (found - due).norm() <= 1e-6 * due.norm()
        else:  # a number half-way between two steps may be rounded either way
            assert (exact - due).norm() > 1e-3 * due.norm()
            assert (found - due).norm() < 0.1 * (exact - due).norm()


@torchao
@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_every_check_of_verify_passes_on_int8_weights(architecture: str) -> None:
    settings = Settings(
        model=ModelSettings(id=str(saved_model(architecture)), device="cpu", quantize="int8"),
        steer=SteerSettings(layer="1,3", coef="2"),
    )
    result = verify(settings)
    assert [check.name for check in result.checks if not check.passed] == []
    assert {check.allowed for check in result.checks if check.unit == "residual norms"} == {2e-4}


@torchao
def test_a_checkpoint_that_is_stored_quantised_passes_every_check(tmp_path: Path) -> None:
    make: Any = transformers.AutoModelForCausalLM
    config = quantise_config("int8", torch.float32)
    model = make.from_pretrained(
        saved_model("llama"), dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    folder = save_model(model, tmp_path / "stored", tokenizer=tiny_tokenizer())
    assert verify_stored(folder).passed
    with pytest.raises(InputError, match="is quantised already: omit it"):
        load_model(ModelSpec(model=str(folder), device="cpu", quantize="int8"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed",
)
def test_a_compressed_tensors_checkpoint_passes_every_check(tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    make: Any = transformers.AutoModelForCausalLM
    model = make.from_pretrained(saved_model("llama"), dtype=torch.float32)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    config = QuantizationConfig(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        format="pack-quantized",
        ignore=["lm_head"],
        quantization_status="frozen",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.abs().amax(1, keepdim=True) / 7
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = save_model(model, tmp_path / "packed", tokenizer=tiny_tokenizer())
    compressor.update_config(folder)
    assert verify_stored(folder).passed


def test_an_fp8_checkpoint_passes_every_check_on_a_cpu(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_model("llama"), tmp_path / "fp8"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj.weight" in name:
            scale = tensor.abs().max() / 448  # the largest number of the format
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert verify_stored(folder).passed
    projection = load_model(ModelSpec(model=str(folder), device="cpu")).model.model.layers[0]
    name = "model.layers.0.mlp.up_proj.weight"
    due = tensors[name].float() * tensors[f"{name}_scale_inv"]
    assert torch.equal(projection.mlp.up_proj.weight, due)


@torchao
def test_an_adapter_works_on_int8_weights_and_is_not_merged(tmp_path: Path) -> None:
    base = saved_model("llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    spec = ModelSpec(model=str(base), adapter=str(adapter), device="cpu", quantize="int8")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        adapted = load_model(spec).model(ids).logits
        whole = load_model(ModelSpec(model=str(base), adapter=str(adapter), device="cpu"))
        exact = whole.model(ids).logits
    assert 0 < (adapted - exact).norm() < 0.1 * exact.norm()
    with pytest.raises(InputError, match="does not go with --merge-adapter"):
        load_model(
            ModelSpec(
                model=str(base),
                adapter=str(adapter),
                merge_adapter=True,
                device="cpu",
                quantize="int8",
            )
        )


@torchao
def test_answers_of_quantised_weights_have_other_ids() -> None:
    def identity(quantize: Any) -> str:
        model = ModelSettings(id=str(saved_model("llama")), device="cpu", quantize=quantize)
        with ModelSession(Settings(model=model)) as session:
            return session.identity

    assert identity("int8") == identity(None) + "+int8"


@pytest.mark.parametrize(
    ("fields", "found", "words"),
    [
        ({"quantize": "8bit"}, {}, "needs an NVIDIA GPU, and the device is cpu: use --quantize"),
        ({"quantize": "4bit"}, {}, "needs an NVIDIA GPU"),
        ({"quantize": "int8"}, {"gguf": True}, "not possible with a GGUF file"),
        ({"quantize": "int8"}, {"vllm": True}, "use --backend hf, or a quantised checkpoint"),
        ({"quantize": "int8"}, {"device": "mps"}, "not possible on an Apple GPU"),
        ({"quantize": "int8", "merge_adapter": True}, {}, "does not go with --merge-adapter"),
        ({"quantize": "int8"}, {}, r"needs the package torchao, .*pip install '\.\[quantize\]'"),
        ({"quantize": "8bit"}, {"device": "cuda:0"}, "pip install bitsandbytes"),
    ],
)
def test_what_cannot_be_quantised_is_refused_in_a_sentence(
    fields: dict[str, Any], found: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=words):
        check_quantise(
            ModelSpec(model="m", **fields), {}, **{"device": "cpu", "gguf": False, **found}
        )


def test_a_refusal_comes_before_any_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSettings(id=str(saved_model("llama")), device="cpu", quantize="4bit")
    settings = Settings(model=model, backend=BackendSettings(name="hf"))
    with pytest.raises(InputError, match="--quantize needs an NVIDIA GPU"):
        ModelSession(settings)
