"""``vector combine`` and ``convert``: expressions, arithmetic on files, and golden conversions."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from pvec.errors import InputError
from pvec.vectors.edit import combine, convert, parse_expression
from pvec.vectors.files import find_vector, load_vector, save_vector
from pvec.vectors.vector import KINDS, with_metadata
from tests.helpers.vectors import make_vector, saved_vector

DATA = os.environ.get("PVEC_TEST_DATA")


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("evil", [(1.0, "evil")]),
        ("0.7*evil + 0.3*humorous", [(0.7, "evil"), (0.3, "humorous")]),
        ("-evil", [(-1.0, "evil")]),
        (
            "evil - 2 * runs/evil-tiny/v+w.safetensors",
            [(1, "evil"), (-2, "runs/evil-tiny/v+w.safetensors")],
        ),
        ("evil + -.5*b", [(1, "evil"), (-0.5, "b")]),
        ("1e-1*a - -2*b", [(0.1, "a"), (2.0, "b")]),
    ],
)
def test_expressions_are_read(text: str, terms: list[tuple[float, str]]) -> None:
    assert parse_expression(text) == terms


@pytest.mark.parametrize("text", ["", "0.7*", "evil + ", "0.7*0.3*evil", "evil * 2"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no term"):
        parse_expression(text)


def test_a_combination_is_linear_in_every_kind(tmp_path: Path) -> None:
    one, two = (load_vector(saved_vector(tmp_path, name, seed=s)) for s, name in enumerate("ab"))
    made = combine(f"0.7*{tmp_path / 'a'} - 0.3*{tmp_path / 'b'}", out=tmp_path / "c.safetensors")
    result = load_vector(made.paths[0])
    assert result.trait == "a+b"
    for kind in KINDS:
        wanted = 0.7 * one.kind(kind) - 0.3 * two.kind(kind)
        np.testing.assert_allclose(result.kind(kind), wanted, atol=1e-6)
    assert result.mean_norm is not None
    assert result.metadata["model_id"] == "some/model"
    assert not result.stats, "quality was measured on other vectors"


def test_orthogonal_parts_and_increments(tmp_path: Path) -> None:
    a, b = saved_vector(tmp_path, "a", seed=0), saved_vector(tmp_path, "b", seed=1)
    made = combine(str(a), out=tmp_path / "c.safetensors", orthogonal_to=[b], trait="c")
    apart = load_vector(made.paths[0])
    dots = (apart.kind("response_avg") * load_vector(b).kind("response_avg")).sum(axis=1)
    np.testing.assert_allclose(dots, 0.0, atol=1e-4)
    steps = combine(str(a), out=tmp_path / "d.safetensors", incremental=True)
    assert any("--layer all" in note for note in steps.notes)
    rows = load_vector(steps.paths[0]).kind("prompt_avg")
    np.testing.assert_allclose(
        np.cumsum(rows[1:], axis=0), load_vector(a).kind("prompt_avg")[1:], atol=1e-5
    )


@pytest.mark.parametrize(
    "other",
    [{"layers": 4}, {"width": 16}, {"model_id": "other/model", "model_fingerprint": "def"}],
    ids=str,
)
def test_vectors_of_different_models_do_not_mix(
    tmp_path: Path, other: dict[str, str | int]
) -> None:
    a, b = saved_vector(tmp_path, "a"), saved_vector(tmp_path, "b", **other)
    with pytest.raises(InputError, match=r"a\.safetensors .* b\.safetensors|vectors of one model"):
        combine(f"{a} + {b}", out=tmp_path / "c.safetensors")
    with pytest.raises(InputError):
        combine(f"{a}", out=tmp_path / "c.safetensors", orthogonal_to=[b])
    assert not (tmp_path / "c.safetensors").exists()


def test_a_last_row_of_two_meanings_is_left_out(tmp_path: Path) -> None:
    a = saved_vector(tmp_path, "a")
    b = save_vector(
        with_metadata(make_vector(), last_row="post_final_norm"), tmp_path / "b.safetensors"
    )
    made = combine(f"{a} + {b}", out=tmp_path / "c.safetensors")
    result = load_vector(made.paths[0])
    assert result.missing_layers == {3}
    with pytest.raises(InputError, match="no layer 3"):
        result.row(3)


def test_a_run_folder_stands_for_its_vector(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "vectors"
    folder.mkdir(parents=True)
    path = saved_vector(folder, "evil")
    assert find_vector(tmp_path / "run") == find_vector(folder / "evil") == path
    saved_vector(folder, "humorous")
    with pytest.raises(InputError, match=r"2 vectors \(evil.safetensors, humorous.safetensors\)"):
        find_vector(tmp_path / "run")


# ── conversions ─────────────────────────────────────────────────────────────────────────────────


def test_the_references_files_hold_the_rows_as_they_are(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil")
    made = convert(source, tmp_path / "pt")
    assert sorted(path.name for path in made.paths) == [
        "evil_prompt_avg_diff.pt",
        "evil_prompt_last_diff.pt",
        "evil_response_avg_diff.pt",
    ]
    for kind in KINDS:
        tensor = torch.load(tmp_path / "pt" / f"evil_{kind}_diff.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), load_vector(source).kind(kind))
    back = convert(tmp_path / "pt" / "evil_prompt_avg_diff.pt", tmp_path / "back.safetensors")
    again = load_vector(back.paths[0])
    assert list(again.kinds) == list(KINDS)
    assert again.fingerprint == load_vector(source).fingerprint
    assert again.metadata["last_row"] == "post_final_norm"


def test_one_pt_file_holds_the_kind_that_its_name_says(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil")
    for name, options, kind in (
        ("x_prompt_last_diff.pt", {}, "prompt_last"),
        ("x.pt", {}, "response_avg"),
        ("y.pt", {"kind": "prompt_avg"}, "prompt_avg"),
    ):
        convert(source, tmp_path / name, **options)  # type: ignore[arg-type]
        tensor = torch.load(tmp_path / name, weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), load_vector(source).kind(kind))  # type: ignore[arg-type]


def test_gguf_directions_are_block_outputs_counted_from_0(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil", layers=5, model_type="mistral")
    made = convert(source, tmp_path / "evil.gguf")
    assert any("layer 1 (block 0) was left out" in note for note in made.notes)
    reader = gguf.GGUFReader(tmp_path / "evil.gguf")
    field = reader.get_field("controlvector.model_hint")
    assert field is not None
    assert field.contents() == "llama"
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert sorted(tensors) == [f"direction.{block}" for block in range(1, 5)]
    rows = load_vector(source).kind("response_avg")
    for block in range(1, 5):
        np.testing.assert_array_equal(tensors[f"direction.{block}"], rows[block + 1])
    back = load_vector(convert(tmp_path / "evil.gguf", tmp_path / "b.safetensors").paths[0])
    np.testing.assert_array_equal(back.row(5), rows[5])
    assert back.missing_layers == {0, 1}


def test_a_gguf_needs_to_know_its_architecture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model-hint qwen2"):
        convert(saved_vector(tmp_path, "evil"), tmp_path / "evil.gguf")


def test_a_file_is_not_converted_onto_itself_or_into_the_unknown(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil")
    with pytest.raises(InputError, match="is the file itself"):
        convert(source, source)
    with pytest.raises(InputError, match=r"cannot write \.bin files"):
        convert(source, tmp_path / "evil.bin")


@pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")
def test_a_published_vector_goes_round_unchanged(tmp_path: Path) -> None:
    path = Path(DATA or "") / "reference" / "qwen3-4b_evil_response_avg_diff.pt"
    shutil.copy(path, tmp_path / "evil_response_avg_diff.pt")
    convert(tmp_path / "evil_response_avg_diff.pt", tmp_path / "evil.safetensors")
    convert(tmp_path / "evil.safetensors", tmp_path / "again.pt")
    wanted = torch.load(path, weights_only=True)
    assert torch.equal(torch.load(tmp_path / "again.pt", weights_only=True), wanted)
    convert(path, tmp_path / "evil.gguf", model_hint="qwen3")
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "evil.gguf").tensors]
    # 36 layers: 1 cannot be written, and the last is after the final norm
    assert len(names) == 34
    assert "direction.34" in names
    assert "direction.35" not in names
