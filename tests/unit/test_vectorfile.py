"""Vector files: what is written is what is read, and what does not fit is refused."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from pvec.errors import InputError, ModelError
from pvec.vectors.files import check_fits, load_vector, save_pt, save_vector
from pvec.vectors.vector import KINDS, PersonaVector, with_metadata

DATA = os.environ.get("PVEC_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="PVEC_TEST_DATA is not set")


def make(*, layers: int = 4, width: int = 6, seed: int = 0, **changes: Any) -> PersonaVector:
    rng = np.random.default_rng(seed)
    vector = PersonaVector(
        trait="evil",
        kinds={kind: rng.normal(size=(layers + 1, width)).astype(np.float32) for kind in KINDS},
        mean_norm=rng.uniform(1, 2, layers + 1).astype(np.float32),
        stats={"auc": np.linspace(0, 1, layers + 1, dtype=np.float32)},
        metadata={"model_id": "tiny", "model_fingerprint": "abc", "kept_pos": "17"},
    )
    return dataclasses.replace(vector, **changes)


def assert_equal(one: PersonaVector, two: PersonaVector) -> None:
    assert one.trait == two.trait
    assert list(one.kinds) == list(two.kinds)
    for kind in one.kinds:
        np.testing.assert_array_equal(one.kinds[kind], two.kinds[kind])
    assert one.fingerprint == two.fingerprint


def test_a_vector_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    vector = make()
    again = load_vector(save_vector(vector, tmp_path / "evil.safetensors"))
    assert_equal(vector, again)
    assert vector.mean_norm is not None
    assert again.mean_norm is not None
    np.testing.assert_array_equal(again.mean_norm, vector.mean_norm)
    np.testing.assert_array_equal(again.stats["auc"], vector.stats["auc"])
    assert again.metadata["kept_pos"] == "17"
    assert again.metadata["last_row"] == "block_output"


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
        elements=st.floats(allow_nan=False, allow_infinity=False, width=32),
    ),
    st.dictionaries(st.sampled_from(["judge", "seed", "note"]), st.text(), max_size=3),
)
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_vector_survives_the_file(
    tmp_path: Path, array: np.ndarray, metadata: dict[str, str]
) -> None:
    vector = PersonaVector(trait="t", kinds={"prompt_avg": array}, metadata=metadata)
    again = load_vector(save_vector(vector, tmp_path / "v.safetensors"))
    np.testing.assert_array_equal(again.kinds["prompt_avg"], array)
    assert metadata.items() <= again.metadata.items()


def test_another_tool_reads_the_file_without_pvec(tmp_path: Path) -> None:
    vector = make()
    path = save_vector(vector, tmp_path / "evil.safetensors")
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {*KINDS, "mean_norm", "auc"}
        np.testing.assert_array_equal(file.get_tensor("prompt_last"), vector.kinds["prompt_last"])
        metadata = file.metadata()
    assert metadata["format"] == "pvec-vector"
    assert (metadata["num_layers"], metadata["hidden_size"]) == ("4", "6")


def test_the_same_vector_is_the_same_bytes(tmp_path: Path) -> None:
    paths = [save_vector(make(), tmp_path / f"{n}.safetensors") for n in range(4)]
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_bfloat16_file_is_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    save_torch_file({"response_avg": tensor}, path)
    array = load_vector(path).kinds["response_avg"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, tensor.float().numpy())


def test_pt_files_carry_the_references_names_and_values(tmp_path: Path) -> None:
    vector = make()
    paths = save_pt(vector, tmp_path)
    assert [path.name for path in paths] == [f"evil_{kind}_diff.pt" for kind in KINDS]
    tensor = torch.load(paths[1], weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), vector.kinds["prompt_avg"])
    again = load_vector(paths[1])
    assert (again.trait, list(again.kinds)) == ("evil", ["prompt_avg"])
    assert again.metadata["last_row"] == "post_final_norm"


@needs_data
def test_a_published_pt_vector_is_read() -> None:
    assert DATA is not None
    path = Path(DATA) / "reference" / "qwen3-4b_evil_response_avg_diff.pt"
    vector = load_vector(path)
    assert (vector.num_layers, vector.hidden_size) == (36, 2560)
    assert list(vector.kinds) == ["response_avg"]
    norms = np.linalg.norm(vector.kinds["response_avg"], axis=1)
    assert norms[35:] == pytest.approx([98.3, 47.2], abs=0.05)


def test_a_pt_of_several_kinds_and_a_bare_one_are_read(tmp_path: Path) -> None:
    tensors = {kind: torch.randn(3, 4) for kind in KINDS}
    torch.save(tensors, tmp_path / "rude.pt")
    assert list(load_vector(tmp_path / "rude.pt").kinds) == list(KINDS)
    torch.save(torch.randn(3, 4, dtype=torch.float16), tmp_path / "my_vector.pt")
    bare = load_vector(tmp_path / "my_vector.pt")
    assert (bare.trait, list(bare.kinds)) == ("my_vector", ["response_avg"])


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch harmed",))


def test_a_pt_that_needs_code_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"response_avg": Harmful()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="needs code to be unpickled"):
        load_vector(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(InputError, match="can be read"):
        load_vector(tmp_path / "plain.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".gguf", ".npy", ".npz"])
@pytest.mark.parametrize("content", [b"", b"not a vector at all", b"\x00" * 64])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"evil{suffix}"):
        load_vector(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = save_vector(make(), tmp_path / "evil.safetensors").read_bytes()
    (tmp_path / "evil.safetensors").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="is not a safetensors file"):
        load_vector(tmp_path / "evil.safetensors")
    pt = save_pt(make(), tmp_path)[0]
    pt.write_bytes(pt.read_bytes()[:-200])
    with pytest.raises(InputError):
        load_vector(pt)


def test_a_file_of_another_kind_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no vector file"):
        load_vector(tmp_path / "absent.safetensors")
    (tmp_path / "evil.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="should end in"):
        load_vector(tmp_path / "evil.bin")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_named_by_layer(tmp_path: Path, bad: float) -> None:
    array = np.ones((5, 3), np.float32)
    array[2, 1] = array[4, 0] = bad
    save_file({"response_avg": array}, tmp_path / "evil.safetensors")
    with pytest.raises(
        InputError, match=r"'response_avg' has NaN or infinite values at layer 2, 4"
    ):
        load_vector(tmp_path / "evil.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"response_avg": np.ones(4, np.float32)}, r"shape \[4\]"),
        ({"response_avg": np.ones((3, 4), "f4"), "prompt_avg": np.ones((4, 4), "f4")}, "one model"),
        ({"response_avg": np.ones((3, 4), "f4"), "mean_norm": np.ones(9, "f4")}, "'mean_norm'"),
        ({"response_avg": np.ones((3, 4), "f4"), "weight": np.ones((3, 4), "f4")}, "'weight'"),
        ({"mean_norm": np.ones(3, np.float32), "auc": np.ones(3, np.float32)}, "is empty"),
    ],
)
def test_tensors_that_are_no_vector_are_refused(
    tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    save_file(tensors, tmp_path / "evil.safetensors")
    with pytest.raises(InputError, match=message):
        load_vector(tmp_path / "evil.safetensors")


def test_a_file_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    array = np.ones((3, 4), np.float32)
    save_file({"response_avg": array}, tmp_path / "v.safetensors", metadata={"format_version": "2"})
    with pytest.raises(InputError, match="update pvec"):
        load_vector(tmp_path / "v.safetensors")


def test_rows_are_layers() -> None:
    vector = make()
    np.testing.assert_array_equal(vector.row(3), vector.kinds["response_avg"][3])
    np.testing.assert_array_equal(vector.row(0, kind="prompt_avg"), vector.kinds["prompt_avg"][0])
    for layer in (-1, 5):
        with pytest.raises(InputError, match=rf"no layer {layer}; it has 0 to 4"):
            vector.row(layer)


def test_a_kind_that_is_not_there_is_named() -> None:
    vector = make(kinds={"prompt_avg": np.ones((5, 6), np.float32)})
    with pytest.raises(InputError, match="no kind 'response_avg'; it has prompt_avg"):
        vector.row(1)


def test_a_vector_fits_its_own_model_and_its_finetunes() -> None:
    check_fits(make(), num_layers=4, hidden_size=6, fingerprint="abc")
    check_fits(make(), num_layers=4, hidden_size=6)
    unmarked = with_metadata(make(metadata={}), seed="0")
    check_fits(unmarked, num_layers=4, hidden_size=6, fingerprint="abc")


@pytest.mark.parametrize(
    "model",
    [
        {"num_layers": 5, "hidden_size": 6},
        {"num_layers": 3, "hidden_size": 6},
        {"num_layers": 4, "hidden_size": 8},
        {"num_layers": 4, "hidden_size": 6, "fingerprint": "other"},
    ],
)
def test_a_vector_of_another_model_is_refused_naming_both(model: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"made (for|with) tiny.*Qwen/Big"):
        check_fits(make(), model_id="Qwen/Big", **model)


def test_the_fingerprint_is_of_the_vectors_alone() -> None:
    vector = make()
    assert vector.fingerprint == make(metadata={}, trait="other").fingerprint
    assert vector.fingerprint != make(seed=1).fingerprint
