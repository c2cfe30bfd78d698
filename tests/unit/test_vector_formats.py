"""Vectors of other tools: what their rows are, and what a file's name means when it is written.

The right value of every row is the number that the test put into it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pvec.errors import InputError, ModelError
from pvec.models.load import ModelMetadata
from pvec.projection.tokens import project
from pvec.vectors.edit import combine, convert
from pvec.vectors.files import find_vector, load_vector, load_vectors, output_path, save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import tiny_model, tiny_tokenizer
from tests.helpers.shell import pvec
from tests.helpers.vectors import make_vector, saved_vector

DEPTH, WIDTH = 5, 4


class Model:
    """As much of a model's metadata as vectors are checked against."""

    id = "some/model"
    num_layers = DEPTH
    hidden_size = WIDTH
    fingerprint = "abc"
    adapter = None


MODEL = cast("ModelMetadata", Model())


def numbered(first: int, last: int) -> torch.Tensor:
    """Rows that hold the layer that they are for: ``first`` to ``last``."""
    return torch.arange(first, last + 1).float()[:, None].expand(-1, WIDTH).clone()


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content.numpy())
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    else:
        torch.save(content, path)
    return path


def loaded(path: Path, **options: Any) -> tuple[PersonaVector, list[str]]:
    notes: list[str] = []
    (vector,) = load_vectors([path], model=MODEL, notify=notes.append, **options).values()
    return vector, notes


@pytest.mark.parametrize("name", ["v.pt", "v.npy", "evil_response_avg_diff.pt"])
@pytest.mark.parametrize("first", [0, 1])
def test_the_depth_of_the_model_says_what_row_0_is(tmp_path: Path, name: str, first: int) -> None:
    vector, notes = loaded(write(tmp_path / name, numbered(first, DEPTH)))
    assert [vector.row(layer)[0] for layer in range(1, DEPTH + 1)] == [1, 2, 3, 4, 5]
    assert (0 in vector.missing_layers) is (first == 1)
    assert any("row 0 is layer 1" in note for note in notes) is (first == 1)


def test_a_file_of_another_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 5 layers"):
        loaded(write(tmp_path / "v.pt", numbered(0, DEPTH - 2)))


def test_a_gguf_of_rows_without_embedding_steers_at_the_right_blocks(tmp_path: Path) -> None:
    import gguf

    path = write(tmp_path / "v.pt", numbered(1, DEPTH))
    result = convert(path, tmp_path / "v.gguf", model_hint="qwen2", num_layers=DEPTH)
    assert any("row 0 is layer 1" in note for note in result.notes)
    tensors = {t.name: t.data[0] for t in gguf.GGUFReader(tmp_path / "v.gguf").tensors}
    assert tensors == {"direction.1": 2, "direction.2": 3, "direction.3": 4, "direction.4": 5}
    unsure = convert(path, tmp_path / "w.gguf", model_hint="qwen2")
    assert any("does not say what its 5 rows are" in note for note in unsure.notes)


def test_the_library_decides_by_the_depth_of_the_model_too(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()  # 3 layers, 32 wide
    rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    paths = [write(tmp_path / "whole.pt", rows), write(tmp_path / "bare.pt", rows[1:])]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Walk often."}]
    (values,) = project(model, tokenizer, [chat], paths, layers=[2])
    assert values["whole_proj_layer2"] == values["bare_proj_layer2"]


def test_what_was_assumed_travels_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "v.pt", numbered(1, DEPTH))
    convert(path, tmp_path / "v.safetensors")
    vector, notes = loaded(tmp_path / "v.safetensors")
    assert vector.row(DEPTH)[0] == DEPTH
    assert any("row 0 is layer 1" in note for note in notes)


def test_another_file_of_the_model_says_the_depth(tmp_path: Path) -> None:
    bare = write(tmp_path / "v.pt", numbered(1, DEPTH))
    whole = saved_vector(tmp_path, "w", layers=DEPTH, width=WIDTH)
    vectors = load_vectors([bare, whole])
    assert vectors[bare].row(3)[0] == 3


@pytest.mark.parametrize(
    "content",
    [
        {str(block): torch.full((WIDTH,), block + 1.0) for block in range(DEPTH)},
        {block: torch.full((WIDTH,), block + 1.0) for block in (1, 3)},
        {f"layer_{block}": torch.full((1, WIDTH), block + 1.0) for block in (0, 4)},
        {str(layer): torch.full((WIDTH,), float(layer)) for layer in range(DEPTH + 1)},
        [torch.full((WIDTH,), block + 1.0) for block in range(DEPTH)],
    ],
    ids=["blocks", "two blocks", "named blocks", "hidden states", "list"],
)
def test_dictionaries_by_block_number(tmp_path: Path, content: Any) -> None:
    vector, _ = loaded(write(tmp_path / "v.pt", content))
    present = [n for n in range(1, vector.num_layers + 1) if n not in vector.missing_layers]
    assert present
    assert [vector.row(layer)[0] for layer in present] == present


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
def test_a_single_vector_is_of_the_layer_that_is_named(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"v{suffix}", torch.full((WIDTH,), 7.0))
    with pytest.raises(InputError, match=r"single vector of width 4.*--layer N"):
        loaded(path)
    vector, notes = loaded(path, layer=3)
    assert vector.direction(3).tolist() == [7.0] * WIDTH
    assert vector.steering_layers == (3,)
    assert any("taken for layer 3" in note for note in notes)


@pytest.mark.parametrize("own", [2, "2", torch.tensor(2)], ids=["number", "text", "tensor"])
def test_the_layer_beside_a_vector_counts_from_0_or_1_and_no_other_is_taken(
    tmp_path: Path, own: Any
) -> None:
    path = write(tmp_path / "v.pt", {"vector": torch.full((WIDTH,), 7.0), "layer": own})
    for other in (None, 1, 4):
        with pytest.raises(InputError, match=r"of layer 2 .*--layer 3 if they do.*--layer 2"):
            loaded(path, layer=other)
    for layer in (2, 3):
        assert loaded(path, layer=layer)[0].steering_layers == (layer,)


def test_a_first_block_is_not_offered_as_layer_0(tmp_path: Path) -> None:
    path = write(tmp_path / "v.pt", {"vector": torch.full((WIDTH,), 7.0), "layer": 0})
    with pytest.raises(InputError, match=r"add --layer 1 if they do\.$"):
        loaded(path, layer=None)


def test_one_of_several_vectors_is_named(tmp_path: Path) -> None:
    content = {"calm": numbered(0, DEPTH), "evil": -numbered(0, DEPTH)}
    for path in (write(tmp_path / "v.pt", content), write(tmp_path / "w.npz", content)):
        with pytest.raises(InputError, match=rf"several vectors \(calm, evil\).*{path.name}:calm"):
            load_vectors([path])
        (vector,) = load_vectors([f"{path}:evil"], model=MODEL).values()
        assert (vector.trait, vector.row(2)[0]) == ("evil", -2)
        with pytest.raises(InputError, match=r"no vector 'evik'\. Did you mean"):
            load_vectors([f"{path}:evik"])


def test_arrays_that_need_pickle_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="without running code"):
        load_vector(tmp_path / "v.npy")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", ".npy", ".npz"])
def test_damaged_bytes_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    vector = make_vector(model_type="qwen2", layers=2, width=8)
    path = tmp_path / f"v{suffix}"
    if suffix in {".npy", ".npz"}:
        rows = torch.from_numpy(vector.kind("response_avg"))
        write(path, {"rows": rows} if suffix == ".npz" else rows)
    else:
        save_vector(vector, path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 400), size=random.integers(1, 20)):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(1, len(whole) + 1)])
        with contextlib.suppress(InputError):
            load_vector(path)


@pytest.mark.parametrize(
    "content", [{"a": "text"}, {"a": {1, 2}}, 3, [], torch.zeros(2, 3, 4), numbered(0, 0)[:0]]
)
def test_what_is_no_vector_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError):
        load_vectors([tmp_path / "v.pt"], model=MODEL)


# ── what a name means ───────────────────────────────────────────────────────────────────────────


def test_the_ending_of_a_file_is_its_format(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil", model_type="qwen2")
    rows = load_vector(source).kind("response_avg")
    combine(str(source), out=tmp_path / "c.pt")
    assert np.array_equal(torch.load(tmp_path / "c.pt", weights_only=True).numpy(), rows)
    result = combine(str(source), out=tmp_path / "c.gguf")
    assert any("layer 1 (block 0) was left out" in note for note in result.notes)
    assert np.array_equal(load_vector(tmp_path / "c.gguf").row(3), rows[3])
    for name in ("c.bin", "c.v1"):
        with pytest.raises(InputError, match="cannot write"):
            combine(str(source), out=tmp_path / name)
    assert combine(str(source), out=tmp_path / "c").paths == (tmp_path / "c.safetensors",)


def test_a_folder_with_a_dot_in_its_name_is_a_folder(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil")
    for name in ("qwen2.5", "v.pt", "v.gguf"):
        folder = tmp_path / name
        folder.mkdir()
        convert(source, folder)
        assert len(list(folder.iterdir())) == 3
        assert output_path(folder, trait="evil") == folder / "evil.safetensors"
        assert find_vector(folder) == folder / "evil_response_avg_diff.pt"


def test_the_trait_of_a_file_never_leaves_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for trait in (f"{tmp_path}/outside", "../outside", "..", "a\nb"):
        path = save_vector(make_vector(trait=trait), tmp_path / "v.safetensors")
        result = convert(path, inside)
        assert all(path.parent == inside for path in result.paths)
        assert combine(str(path), out=inside).paths[0].parent == inside
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "v.safetensors"]


def test_a_bad_place_is_refused_before_the_work(tmp_path: Path) -> None:
    saved_vector(tmp_path, "evil")
    (tmp_path / "file").write_text("")
    done = pvec("vector", "combine", tmp_path / "evil", "-o", tmp_path / "file" / "v.safetensors")
    assert done.code == 2
    assert "cannot write" in done.sentence


def test_a_file_that_is_cut_short_is_not_put_in_place(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil", layers=30, width=2048)
    (tmp_path / "evil.gguf").write_text("before")
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pvec.cli.app import main\n"
        f"main(['vector', 'convert', {str(source)!r}, {str(tmp_path / 'evil.gguf')!r}, "
        "'--model-hint', 'qwen2'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert (tmp_path / "evil.gguf").read_text() == "before"
    assert not list(tmp_path.glob(".*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


# ── from the reference and back ─────────────────────────────────────────────────────────────────


def test_pt_to_gguf_to_pt_keeps_the_depth(tmp_path: Path) -> None:
    path = write(tmp_path / "evil_response_avg_diff.pt", numbered(0, DEPTH))
    convert(path, tmp_path / "v.gguf", model_hint="qwen2")
    convert(tmp_path / "v.gguf", tmp_path / "v.pt")
    again = torch.load(tmp_path / "v.pt", weights_only=True)
    # layers 0 and 1 cannot be in a GGUF file, and the last row is after the final norm
    assert again[:, 0].tolist() == [0, 0, 2, 3, 4, 0]


def test_a_folder_of_pt_files_is_a_folder_of_vectors(tmp_path: Path) -> None:
    convert(saved_vector(tmp_path, "evil"), tmp_path / "pt")
    assert find_vector(tmp_path / "pt").name == "evil_response_avg_diff.pt"
    done = pvec("vector", "compare", tmp_path / "pt", "--by", "kind", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["labels"] == ["response_avg", "prompt_avg", "prompt_last"]
    convert(saved_vector(tmp_path, "calm"), tmp_path / "pt")
    with pytest.raises(InputError, match="6 vectors"):
        find_vector(tmp_path / "pt")


def test_a_row_after_the_final_norm_is_no_direction(tmp_path: Path) -> None:
    vector, _ = loaded(write(tmp_path / "evil_response_avg_diff.pt", numbered(0, DEPTH)))
    assert vector.steering_layers == (1, 2, 3, 4)
    assert vector.row(DEPTH)[0] == DEPTH, "it can be shown and projected on"
    with pytest.raises(InputError, match=r"after the final norm at layer 5.*up to 4"):
        vector.direction(DEPTH)
    assert vector.increments()[:, 0].tolist() == [0, 1, 1, 1, 1, 0]
    result = combine(
        str(tmp_path / "evil_response_avg_diff.pt"), out=tmp_path / "i", incremental=True
    )
    assert any("layer 5 was left out" in note for note in result.notes)
    increments = load_vector(result.paths[0])
    assert increments.missing_layers == {5}
    assert increments.kind("response_avg")[:, 0].tolist() == [0, 1, 1, 1, 1, 0]


def test_increments_of_a_file_with_gaps_are_refused(tmp_path: Path) -> None:
    source = saved_vector(tmp_path, "evil", model_type="qwen2")
    convert(source, tmp_path / "evil.gguf")
    with pytest.raises(InputError, match=r"none at \[1\]"):
        combine(str(tmp_path / "evil.gguf"), out=tmp_path / "i.safetensors", incremental=True)
