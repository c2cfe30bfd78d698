"""GGUF control vectors, read back by the gguf package itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pvec.errors import InputError, ModelError
from pvec.vectors.files import check_fits, load_vector, save_vector
from pvec.vectors.gguf import gguf_notes, save_gguf
from pvec.vectors.vector import PersonaVector

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")


def make(*, layers: int = 5, width: int = 8) -> PersonaVector:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(layers + 1, width)).astype(np.float32)
    return PersonaVector(trait="evil", kinds={"response_avg": array, "prompt_avg": array + 1})


def write_directions(
    path: Path, *, indices: list[int], architecture: str = "controlvector"
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for index in indices:
        writer.add_tensor(f"direction.{index}", np.full(4, index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpp_would_find_each_layer_at_its_block(tmp_path: Path) -> None:
    vector = make()
    save_gguf(vector, tmp_path / "evil.gguf", model_hint="qwen2")
    reader = gguf.GGUFReader(tmp_path / "evil.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "qwen2"
    assert reader.get_field("controlvector.layer_count").contents() == 4
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # block indices are 0-based and block 0 cannot be written: layers 2 to 5 are blocks 1 to 4
    assert sorted(tensors) == ["direction.1", "direction.2", "direction.3", "direction.4"]
    for block in range(1, 5):
        tensor = tensors[f"direction.{block}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert list(tensor.shape) == [8]
        np.testing.assert_array_equal(tensor.data, vector.kinds["response_avg"][block + 1])


def test_the_user_is_told_what_gguf_cannot_hold() -> None:
    notes = gguf_notes(make(), kind="prompt_avg")
    assert any("layer 1" in note for note in notes)
    assert any("only prompt_avg" in note for note in notes)


def test_a_control_vector_comes_back_without_layers_0_and_1(tmp_path: Path) -> None:
    vector = make()
    save_gguf(vector, tmp_path / "evil.gguf", model_hint="qwen2")
    again = load_vector(tmp_path / "evil.gguf")
    assert again.trait == "evil"
    assert again.missing_layers == {0, 1}
    for layer in range(2, 6):
        np.testing.assert_array_equal(again.row(layer), vector.row(layer))
    with pytest.raises(InputError, match=r"no layer 1; it has 0 to 5 without \[0, 1\]"):
        again.row(1)


def test_missing_layers_stay_missing_in_safetensors(tmp_path: Path) -> None:
    save_gguf(make(), tmp_path / "evil.gguf", model_hint="qwen2")
    path = save_vector(load_vector(tmp_path / "evil.gguf"), tmp_path / "evil.safetensors")
    assert load_vector(path).missing_layers == {0, 1}


def test_a_control_vector_may_cover_fewer_layers_than_the_model(tmp_path: Path) -> None:
    vector = load_vector(write_directions(tmp_path / "v.gguf", indices=[1, 3]))
    assert vector.missing_layers == {0, 1, 3}
    assert vector.row(4).tolist() == [3, 3, 3, 3]
    check_fits(vector, num_layers=9, hidden_size=4)
    with pytest.raises(ModelError):
        check_fits(vector, num_layers=3, hidden_size=4)


def test_a_direction_0_is_layer_1_though_llama_cpp_refuses_it(tmp_path: Path) -> None:
    vector = load_vector(write_directions(tmp_path / "v.gguf", indices=[0, 1, 2]))
    assert [vector.row(layer)[0] for layer in (1, 2, 3)] == [0, 1, 2]
    assert vector.missing_layers == {0}
    assert "direction.0 is taken for layer 1" in vector.notes[0]


def test_a_gguf_model_is_no_control_vector(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture 'llama', not a control vector"):
        load_vector(write_directions(tmp_path / "v.gguf", indices=[1], architecture="llama"))


def test_a_one_layer_model_has_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold layers 0 and 1"):
        save_gguf(make(layers=1), tmp_path / "evil.gguf", model_hint="qwen2")
    assert list(tmp_path.iterdir()) == []
