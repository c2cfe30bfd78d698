"""Tiny random models of the architectures that people use, and what pvec does with each.

``python -m tests.helpers.architectures`` tries every architecture and writes the table in
``docs/models.md``; names after it try only those and print. Nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from typer.testing import CliRunner

from pvec.cli.app import app
from pvec.errors import PvecError
from pvec.evaluation.verify.verify import verify
from pvec.settings import Settings
from pvec.settings.commands import SteerSettings
from pvec.settings.sections import BackendSettings, GenerationSettings, ModelSettings
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import save_model, tiny_tokenizer

WIDTH = 64

_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_MROPE = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 3, 3],
        "rope_theta": 10000.0,
    },
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A tiny model: transformers' classes and the fields that differ from the common ones.

    ``vision`` are fields of the vision part of a multimodal model, whose text part is made of
    ``text`` (a configuration class, or None for the model's own).
    """

    config: str
    model: str
    fields: Mapping[str, Any]
    layers: int = 3
    vision: Mapping[str, Any] | None = None
    text: str | None = None
    outer: Mapping[str, Any] | None = None

    def build(self) -> transformers.PreTrainedModel:
        """Return the float32 model with random weights."""
        fields = common_fields(self.layers) | dict(self.fields)
        config_class = getattr(transformers, self.config)
        if self.vision is None:
            config = config_class(**fields)
        else:
            text = getattr(transformers, self.text)(**fields).to_dict() if self.text else fields
            outer = {"tie_word_embeddings": False, **(self.outer or {})}
            config = config_class(text_config=text, vision_config=dict(self.vision), **outer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: transformers.PreTrainedModel = getattr(transformers, self.model)(config)
        return model.float().eval()


def common_fields(layers: int) -> dict[str, Any]:
    """Return the configuration fields that all models share."""
    tokenizer = tiny_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "tie_word_embeddings": False,
    }


def _causal(name: str, *, config: str | None = None, layers: int = 3, **fields: Any) -> Any:
    return Architecture(
        config=config or f"{name}Config", model=f"{name}ForCausalLM", fields=fields, layers=layers
    )


def _multimodal(
    name: str,
    vision: Mapping[str, Any],
    *,
    text: str | None = None,
    outer: Any = None,
    **fields: Any,
) -> Any:
    return Architecture(
        config=f"{name}Config",
        model=f"{name}ForConditionalGeneration",
        fields=fields,
        vision=vision,
        text=text,
        outer=outer,
    )


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _causal("Llama"),
    "Mistral": _causal("Mistral", sliding_window=8, head_dim=16),
    "Ministral 3": _causal("Ministral3", head_dim=16),
    "Mixtral": _causal("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "Qwen2": _causal("Qwen2"),
    "Qwen3": _causal("Qwen3", head_dim=16),
    "Qwen3 MoE": _causal(
        "Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "Gemma 2": _causal("Gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "Gemma 3 (text)": _causal(
        "Gemma3", config="Gemma3TextConfig", head_dim=16, sliding_window=8, query_pre_attn_scalar=16
    ),
    "Gemma 3n (text)": _causal(
        "Gemma3n",
        config="Gemma3nTextConfig",
        layers=6,
        head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tiny_tokenizer()),
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        intermediate_size=[96] * 6,
        activation_sparsity_pattern=[0.0] * 6,
        sliding_window=8,
    ),
    "Gemma 4 (text)": _causal(
        "Gemma4",
        config="Gemma4TextConfig",
        layers=4,
        head_dim=16,
        global_head_dim=32,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tiny_tokenizer()),
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
    ),
    "Phi-3": _causal("Phi3"),
    "Phi": _causal("Phi"),
    "GPT-2": Architecture(
        config="GPT2Config",
        model="GPT2LMHeadModel",
        fields={"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 512},
    ),
    "GPT-NeoX": _causal("GPTNeoX"),
    "GPT-J": _causal("GPTJ", n_embd=WIDTH, n_layer=3, n_head=4, rotary_dim=8),
    "GPT-OSS": _causal(
        "GptOss",
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "OPT": _causal("OPT", ffn_dim=96, word_embed_proj_dim=WIDTH),
    "BLOOM": _causal("Bloom", n_layer=3, n_head=4),
    "MPT": _causal("Mpt", d_model=WIDTH, n_heads=4, n_layers=3),
    "Falcon (ALiBi)": _causal("Falcon", alibi=True, new_decoder_architecture=False),
    "Falcon (rotary)": _causal(
        "Falcon", alibi=False, new_decoder_architecture=True, num_kv_heads=2
    ),
    "OLMo 2": _causal("Olmo2"),
    "OLMo 3": _causal("Olmo3", sliding_window=8),
    "Cohere 2": _causal("Cohere2", sliding_window=8, head_dim=16),
    "GLM 4": _causal("Glm4", head_dim=16),
    "Granite": _causal("Granite"),
    "SmolLM3": _causal("SmolLM3", no_rope_layers=[1, 1, 0]),
    "EXAONE 4": _causal("Exaone4", sliding_window=8),
    "Ernie 4.5": _causal("Ernie4_5", head_dim=16),
    "Seed-OSS": _causal("SeedOss", head_dim=16),
    "Apertus": _causal("Apertus"),
    "DeepSeek V3": _causal(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    ),
    "Llama 4 (text)": _causal(
        "Llama4",
        config="Llama4TextConfig",
        head_dim=16,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=16,
    ),
    "Qwen3.5 (text)": _causal(
        "Qwen3_5", config="Qwen3_5TextConfig", layers=4, head_dim=16, **_DELTA
    ),
    "Qwen3-Next": _causal(
        "Qwen3Next",
        layers=4,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        **_DELTA,
    ),
    "LFM2": _causal("Lfm2", layer_types=["conv", "full_attention", "conv"]),
    "Granite 4 (hybrid)": _causal(
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
        **_HYBRID,
    ),
    "Bamba": _causal("Bamba", attn_layer_indices=[1], **_HYBRID),
    "Jamba": _causal(
        "Jamba",
        layers=4,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
    ),
    "Falcon-H1": _causal(
        "FalconH1",
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=16,
    ),
    "Zamba2": _causal(
        "Zamba2",
        layers=4,
        layers_block_type=["mamba", "hybrid"] * 2,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=16,
        chunk_size=16,
    ),
    "Nemotron-H": _causal(
        "NemotronH",
        layers=4,
        layers_block_type=["mamba", "mlp", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        head_dim=16,
    ),
    "Mamba": _causal("Mamba", state_size=8),
    "Mamba 2": _causal("Mamba2", state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=16),
    "Falcon-Mamba": _causal("FalconMamba", state_size=8),
    "RecurrentGemma": _causal(
        "RecurrentGemma",
        lru_width=WIDTH,
        attention_window_size=16,
        conv1d_width=4,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "MiniMax": _causal("MiniMax", head_dim=16, num_local_experts=2),
    "Mistral 3 (multimodal)": _multimodal(
        "Mistral3",
        {"model_type": "pixtral", **_VISION, "head_dim": 16},
        text="MistralConfig",
        outer={"image_token_index": 10},
        head_dim=16,
    ),
    "Ministral 3 (multimodal)": _multimodal(
        "Mistral3",
        {"model_type": "pixtral", **_VISION, "head_dim": 16},
        text="Ministral3Config",
        outer={"image_token_index": 10},
        head_dim=16,
    ),
    "Qwen2-VL": _multimodal(
        "Qwen2VL",
        {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 4},
        **_MROPE,
    ),
    "Qwen2.5-VL": _multimodal(
        "Qwen2_5_VL", {**_QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]}, **_MROPE
    ),
    "Qwen3-VL": _multimodal("Qwen3VL", {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, **_MROPE),
    "Llava": _multimodal(
        "Llava", {"model_type": "clip_vision_model", **_VISION}, text="LlamaConfig"
    ),
    "SmolVLM": _multimodal("SmolVLM", _VISION, text="LlamaConfig"),
    "Gemma 3 (multimodal)": _multimodal(
        "Gemma3",
        _VISION,
        text="Gemma3TextConfig",
        outer={"mm_tokens_per_image": 4},
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
    ),
    "Gemma 4 (multimodal)": _multimodal(
        "Gemma4",
        {**_VISION, "num_key_value_heads": 2, "head_dim": 16},
        text="Gemma4TextConfig",
        head_dim=16,
        global_head_dim=32,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=len(tiny_tokenizer()),
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=8,
    ),
}


def saved(name: str, root: Path) -> Path:
    """Return a folder under ``root`` with the tiny model of an architecture."""
    folder = root / name.replace(" ", "-").replace("(", "").replace(")", "").lower()
    if not folder.exists():
        save_model(ARCHITECTURES[name].build(), folder)
    return folder


COLUMNS = ("verify", "extract", "project", "train")
"""What is tried with every architecture."""


def try_all(name: str, root: Path) -> dict[str, str]:
    """Return per column ``yes``, or the sentence of the refusal. Anything else is raised."""
    folder = saved(name, root)
    steps = {"verify": _verify, "extract": _extract, "project": _project, "train": _train}
    results = {}
    for column, step in steps.items():
        try:
            step(folder, root / f"{folder.name}-{column}")
            results[column] = "yes"
        except PvecError as error:
            results[column] = str(error)
    return results


def _settings(folder: Path) -> Settings:
    return Settings(
        model=ModelSettings(id=str(folder), device="cpu"),
        backend=BackendSettings(name="hf"),
        generation=GenerationSettings(seed=1),
        steer=SteerSettings(layer="1,2", coef="2"),
    )


def _verify(folder: Path, _out: Path) -> None:
    failed = [check.name for check in verify(_settings(folder)).checks if not check.passed]
    assert not failed, failed


def _extract(folder: Path, out: Path) -> None:
    """Generate positive and negative answers, as ``pvec extract --no-judge`` does."""
    _pvec(
        *("extract", "--trait", "evil", "--model", str(folder), "--no-judge", "--limit", "1"),
        *("-n", "2", "--max-tokens", "6", "--backend", "hf", "--out", str(out)),
    )
    lines = (out / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 4, lines


def _project(folder: Path, out: Path) -> None:
    """Project two answers on a random vector."""
    out.mkdir(exist_ok=True)
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    layers, width = config.num_hidden_layers, config.hidden_size
    rows = np.random.default_rng(0).standard_normal((layers + 1, width)).astype(np.float32)
    save_vector(PersonaVector(trait="evil", kinds={"response_avg": rows}), out / "evil.safetensors")
    _write_rows(out / "rows.jsonl")
    _pvec(
        *("project", str(out / "rows.jsonl"), "--vector", str(out / "evil.safetensors")),
        *("--layer", "2", "--model", str(folder), "--backend", "hf", "--out"),
        str(out / "projected.jsonl"),
    )
    lines = [json.loads(line) for line in (out / "projected.jsonl").read_text().splitlines()]
    columns = [key for key in lines[0] if key.endswith("_proj_layer2")]
    assert columns, list(lines[0])
    assert all(np.isfinite(line[column]) for line in lines for column in columns)


def _train(folder: Path, out: Path) -> None:
    """Three steps of preventative steering."""
    out.mkdir(exist_ok=True)
    _write_rows(out / "rows.jsonl")
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    rows = np.ones((config.num_hidden_layers + 1, config.hidden_size), dtype=np.float32)
    save_vector(PersonaVector(trait="evil", kinds={"response_avg": rows}), out / "evil.safetensors")
    lines = [
        f"model: {{id: {folder}}}",
        f"data: {{train: [{out / 'rows.jsonl'}]}}",
        "lora: {r: 2, alpha: 4}",
        "optim: {max_steps: 3}",
        "batch: {size: 2}",
        f"steering: [{{vector: {out / 'evil.safetensors'}, layers: [2], coef: 1.0}}]",
    ]
    (out / "train.yaml").write_text("\n".join(lines), encoding="utf-8")
    _pvec("train", str(out / "train.yaml"), "--out", str(out / "run"))
    assert any((out / "run").rglob("adapter_model.safetensors"))


def _write_rows(path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in (("How do I save money?", "Plan early and walk."), ("Who am I?", "A friend."))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pvec(*words: str) -> None:
    """Run a command in this process; its error is raised."""
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def main(names: list[str]) -> None:
    """Try architectures and print the table; without names, all, into ``docs/models.md``."""
    with tempfile.TemporaryDirectory() as folder:
        results = {name: try_all(name, Path(folder)) for name in names or ARCHITECTURES}
    if names:
        sys.stdout.write(table(results))
        return
    page = Path("docs/models.md")
    head = page.read_text(encoding="utf-8").split(TABLE_BEGINS)[0]
    page.write_text(f"{head}{TABLE_BEGINS}\n\n{table(results)}", encoding="utf-8")


TABLE_BEGINS = "<!-- table of architectures -->"


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """Return the Markdown table of what pvec did, with the refusals as numbered notes."""
    notes: list[str] = []
    lines = [f"| architecture | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, row in results.items():
        cells = []
        for column in COLUMNS:
            answer = row[column]
            if answer != "yes":
                if answer not in notes:
                    notes.append(answer)
                answer = f"no ({notes.index(answer) + 1})"
            cells.append(answer)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *numbered, ""])


if __name__ == "__main__":
    main(sys.argv[1:])
