"""``pvec train`` from the shell: bad input is one sentence with exit code 2, before any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model, tiny_model, tiny_tokenizer

from pvec.cli.app import main
from pvec.training import trainer
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("a step was taken"))


def pvec(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["train", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def vector(*, layers: int = NUM_LAYERS, width: int = HIDDEN_SIZE, **metadata: str) -> str:
    values = np.random.default_rng(0).normal(size=(layers + 1, width)).astype(np.float32)
    made = PersonaVector(trait="evil", kinds={"response_avg": values}, metadata=metadata)
    return str(save_vector(made, Path("evil.safetensors")))


def config(**parts: Any) -> str:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    Path("rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    tree = {"model": str(saved_model("llama")), "data": {"train": "rows.jsonl"}, **parts}
    Path("config.json").write_text(json.dumps(tree))
    return "config.json"


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert pvec(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    return line


def test_check_prints_the_plan_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    path = config(steering=[{"vector": vector(), "layers": [2], "coef": 3}], batch={"size": 4})
    assert pvec(path, "--check") == 0
    shown = capsys.readouterr().out
    for part in (
        "20 rows",
        "5 (5 per epoch) of 4 rows in 1 pass",
        "memory",
        "add 3 x evil at layer 2",
    ):
        assert part in shown
    assert not Path("runs").exists()


def test_check_as_json_has_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec(config(), "--check", "--json", "--set", "lora.r=2") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["steps"], plan["longest"]) == (20, 2, plan["tokens"] // 20)
    q, k, mlp = 2 * 64, 2 * 48, 3 * 2 * (32 + 48)  # rank 2: in + out of every linear module
    assert plan["adapter_parameters"] == NUM_LAYERS * (2 * q + 2 * k + mlp)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"lora": {"rank": 3}}, "config.json: lora.rank: unknown key"),
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"lora": {"targets": ""}}, "lora.targets"),
        ({"seed": 2**32}, "seed: input should be less than 4294967296"),
        ({"output": {"folder": "rows.jsonl/run"}}, "rows.jsonl: that is a file"),
        ({"output": {"folder": "."}}, ". is not empty and not a run folder"),
        ({"lora": {"targets": ["q_prj"]}}, "no module 'q_prj'. Did you mean 'q_proj'"),
        ({"data": {"train": "other.jsonl"}}, "no file other.jsonl"),
        ({"model": "./nowhere"}, "There is no model folder"),
        ({"steering": {"vector": "gone.safetensors"}}, "There is no vector file gone"),
        ({"monitor": {"vectors": "gone.safetensors"}}, "There is no vector file gone"),
        ({"batch": {"size": 8, "micro": 3}}, "batch.micro 3 does not divide"),
        ({"optim": {"name": "adamw_8bit"}}, "--set optim.name=adamw"),
        ({"model": {"id": str(saved_model("llama")), "quantize": "4bit"}}, "bitsandbytes"),
        ({"memory": {"liger": True}}, "memory.liger needs"),
        ({"memory": {"unsloth": True}}, "memory.unsloth needs"),
        ({"output": {"report_to": "trackio"}}, "output.report_to needs trackio"),
    ],
)
def test_bad_input_is_one_sentence(
    parts: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(**parts)
    assert expected in sentence(capsys, path)
    before = sorted(Path().rglob("*"))
    assert expected in sentence(capsys, path, "--check")
    assert sorted(Path().rglob("*")) == before


def test_everything_that_is_wrong_is_in_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    path = config(
        optim={"name": "adamw_8bit"},
        memory={"liger": True},
        data={"train": "other.jsonl"},
        steering=[{"vector": "gone.safetensors"}, {"vector": "lost.safetensors"}],
    )
    line = sentence(capsys, path)
    for part in ("optim.name needs", "memory.liger needs", "other.jsonl", "gone", "lost"):
        assert part in line


def test_the_rows_are_checked_even_if_there_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    path = config(model="./nowhere")
    Path("rows.jsonl").write_text("{broken\n")
    line = sentence(capsys, path)
    assert "There is no model folder" in line
    assert "rows.jsonl has no row that can be read (line 1 is not valid JSON" in line


def test_layers_and_modules_that_do_not_exist_are_named_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(
        lora={"targets": ["q_prj"]},
        steering=[{"vector": vector(), "layers": [NUM_LAYERS + 1]}],
        monitor={"vectors": vector(), "layers": NUM_LAYERS + 2},
    )
    line = sentence(capsys, path)
    for part in ("no module 'q_prj'", f"Layer {NUM_LAYERS + 1}", f"Layer {NUM_LAYERS + 2}"):
        assert part in line


@pytest.mark.parametrize(
    ("made", "part", "expected"),
    [
        ({"width": HIDDEN_SIZE + 1}, {}, "was made for"),
        ({"layers": NUM_LAYERS + 1}, {}, "was made for"),
        ({"model_id": "other", "model_fingerprint": "abc"}, {}, "was made with other"),
        ({}, {"layers": [NUM_LAYERS + 1]}, f"this model has layers 1 to {NUM_LAYERS}"),
        ({}, {"coef": 0.0}, "would do nothing"),
        ({"incremental": "true"}, {"layers": "all", "incremental": True}, "increments already"),
        ({}, {"kind": "prompt_avg"}, "has no kind 'prompt_avg'"),
    ],
)
def test_a_vector_that_does_not_fit_is_one_sentence(
    made: dict[str, Any],
    part: dict[str, Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = config(steering=[{"vector": vector(**made), "layers": [1], **part}])
    assert expected in sentence(capsys, path)


def test_all_wrong_rows_are_in_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    path = config()
    Path("rows.jsonl").write_text('{"messages": []}\n\n{broken\n')
    line = sentence(capsys, path)
    for number in (1, 3):
        assert f"rows.jsonl:{number} " in line


def test_a_model_without_a_chat_template_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    assert "chat template" in sentence(capsys, config(model=str(tmp_path / "bare")))


def test_probe_prompts_are_asked_for_when_the_trait_is_unknown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = vector()
    made = PersonaVector(
        trait="grumpiest", kinds={"response_avg": np.ones((NUM_LAYERS + 1, HIDDEN_SIZE), "f4")}
    )
    save_vector(made, name)
    assert "monitor.prompts is needed" in sentence(capsys, config(monitor={"vectors": name}))
