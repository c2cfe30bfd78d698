"""``vector decompose``: nearest features against scipy's cosines, and SAELens as an oracle."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cosine

from pvec.errors import InputError
from pvec.vectors.decompose import decompose, open_autoencoder, read_labels, residual_layer
from tests.helpers.shell import pvec
from tests.helpers.vectors import make_vector, saved_vector

FEATURES, WIDTH = 50, 32
HOOK = "blocks.1.hook_resid_post"


def write_sae(folder: Path, decoder: np.ndarray, *, hook: str = HOOK, **metadata: str) -> Path:
    """A folder as SAELens writes it, of a TopK autoencoder with this decoder."""
    folder.mkdir(exist_ok=True)
    features, width = decoder.shape
    config = {
        "architecture": "topk", "d_in": width, "d_sae": features, "k": 4, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook, **metadata},
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {
        "W_dec": torch.tensor(decoder),
        "W_enc": torch.tensor(decoder.T.copy()),
        "b_enc": torch.zeros(features),
        "b_dec": torch.zeros(width),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def random_decoder(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(FEATURES, WIDTH)).astype(np.float32)


def test_the_nearest_features_are_those_of_scipy_s_cosines(tmp_path: Path) -> None:
    """The decoder's lengths do not matter; opposite features count by their size."""
    decoder, vector = random_decoder(), make_vector()
    decoder[7] = -20 * vector.row(2) + decoder[7]
    result = decompose(vector, open_autoencoder(str(write_sae(tmp_path, decoder))), top=FEATURES)
    assert result.layer == 2  # block 1 makes layer 2
    expected = np.array([1 - cosine(row, vector.row(2)) for row in decoder])
    for feature in result.features:
        assert feature.cosine == pytest.approx(expected[feature.number], abs=1e-6)
    order = [feature.number for feature in result.features]
    assert order == np.argsort(-np.abs(expected), kind="stable").tolist()
    assert order[0] == 7
    assert result.features[0].cosine < -0.9
    assert result.explained == pytest.approx(1.0)  # 50 features span 32 dimensions
    assert result.notes == ()


def test_what_features_explain_is_the_projection_on_their_span(tmp_path: Path) -> None:
    """A vector made of two orthogonal features and a rest: its share in closed form."""
    decoder = np.eye(WIDTH, dtype=np.float32)
    rows = np.zeros((4, WIDTH), dtype=np.float32)
    rows[:] = 3 * decoder[4] - 2 * decoder[9] + 1 * decoder[20]
    vector = make_vector()
    vector = type(vector)(trait="evil", kinds={"response_avg": rows})
    sae = open_autoencoder(str(write_sae(tmp_path, decoder)))
    result = decompose(vector, sae, top=2, layer=3)
    assert [(f.number, round(f.cosine, 4)) for f in result.features] == [
        (4, round(3 / 14**0.5, 4)),
        (9, round(-2 / 14**0.5, 4)),
    ]
    assert result.explained == pytest.approx(13 / 14)
    assert result.notes == ("the autoencoder was trained on layer 2 (block 1)",)
    # the largest of 32 coordinates of a random unit vector, simulated apart
    draws = np.random.default_rng(9).normal(size=(4000, WIDTH))
    largest = np.abs(draws / np.linalg.norm(draws, axis=1, keepdims=True)).max(axis=1)
    assert result.random == pytest.approx(largest.mean(), rel=0.05)


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.19.hook_resid_post", 20),
        ("model.layers.19", 20),
        ("transformer.h.5", 6),
        ("blocks.3.hook_mlp_out", None),
        ("", None),
    ],
)
def test_a_hook_names_a_layer(hook: str, layer: int | None) -> None:
    assert residual_layer(hook) == layer


def test_labels_come_with_the_folder_or_a_file(tmp_path: Path) -> None:
    decoder, path = random_decoder(), saved_vector(tmp_path, model_fingerprint="")
    folder = write_sae(tmp_path / "sae", decoder, neuronpedia_id="tiny/2-res")
    done = pvec("vector", "decompose", path, "--sae", folder, "--top", 3)
    assert done.code == 0, done.err
    assert "at layer 2 (block 1): the nearest of 50 features" in done.out
    assert "features: https://neuronpedia.org/tiny/2-res/NUMBER" in done.out
    assert "cruel words" not in done.out
    result = pvec("vector", "decompose", path, "--sae", folder, "--top", 3, "--json").json
    number = result["features"][0]["number"]
    (folder / "labels.json").write_text(json.dumps({str(number): "cruel words"}))
    done = pvec("vector", "decompose", path, "--sae", folder, "--top", 3)
    assert "cruel words" in done.out
    exported = [{"index": str(number), "description": "harm", "layer": "2-res"}]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    assert read_labels(tmp_path / "export.json") == {number: "harm"}
    done = pvec("vector", "decompose", path, "--sae", folder, "--labels", tmp_path / "export.json")
    assert "harm" in done.out


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "There is no folder"),
        ("config", "cfg.json: check the path"),
        ("weights", "sae_weights.safetensors cannot be read"),
        ("tensor", "give a folder as SAELens saves it"),
        ("width", "features of width 16 and the vector of 'evil' is 32 wide"),
        ("labels", "does not hold labels"),
        ("release", "fetched by SAELens, which is not installed: pip install '.[sae]'"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    path = saved_vector(tmp_path, model_fingerprint="")
    decoder = random_decoder()[:, : 16 if fault == "width" else WIDTH].copy()
    folder: Path | str = write_sae(tmp_path / "sae", decoder)
    if fault == "missing":
        folder = tmp_path / "none"
    elif fault == "config":
        (tmp_path / "sae" / "cfg.json").unlink()
    elif fault == "weights":
        (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"torn")
    elif fault == "tensor":
        save_file({"other": torch.ones(2)}, tmp_path / "sae" / "sae_weights.safetensors")
    elif fault == "labels":
        (tmp_path / "sae" / "labels.json").write_text('["a"]')
    elif fault == "release":
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        folder = "gemma-scope-2b-pt-res:layer_20"
    done = pvec("vector", "decompose", path, "--sae", folder)
    assert done.code == 2
    assert said in done.sentence


def test_pretrained_ones_are_asked_of_saelens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with SAELens's interface: what it is asked for, and what is read of its answer."""
    decoder = torch.tensor(random_decoder())
    asked: list[tuple[str, str]] = []

    def from_pretrained(release: str, identity: str) -> Any:
        asked.append((release, identity))
        if identity == "nowhere":
            raise ValueError("ID nowhere not found")
        metadata = SimpleNamespace(hook_name="blocks.2.hook_resid_pre", neuronpedia_id=None)
        return SimpleNamespace(W_dec=decoder, cfg=SimpleNamespace(metadata=metadata))

    module: Any = ModuleType("sae_lens")
    module.SAE = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "sae_lens", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())
    sae = open_autoencoder("some-release:blocks.2/width_16k")
    assert asked == [("some-release", "blocks.2/width_16k")]
    assert sae.layer == 2
    np.testing.assert_array_equal(sae.decoder, decoder.numpy())
    with pytest.raises(InputError, match="ID nowhere not found"):
        open_autoencoder("some-release:nowhere")


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="SAELens is not installed")
@pytest.mark.filterwarnings("ignore")  # SAELens's own, of what it imports
@pytest.mark.parametrize("kind", ["StandardSAE", "TopKSAE", "JumpReLUSAE", "GatedSAE"])
def test_a_folder_is_read_as_saelens_wrote_it(tmp_path: Path, kind: str) -> None:
    """SAELens saves; its own loader is the oracle. And it loads what the tests here write."""
    import sae_lens

    sae_class = getattr(sae_lens, kind)
    config = getattr(sae_lens, f"{kind}Config")(d_in=WIDTH, d_sae=FEATURES)
    config.metadata.hook_name = "blocks.2.hook_resid_post"
    made = sae_class(config)
    with torch.no_grad():
        made.W_dec.copy_(torch.tensor(random_decoder(4)))
    made.save_model(tmp_path / "saved")
    read = open_autoencoder(str(tmp_path / "saved"))
    oracle = sae_lens.SAE.load_from_disk(tmp_path / "saved")
    np.testing.assert_array_equal(read.decoder, oracle.W_dec.detach().numpy())
    assert read.layer == 3
    ours = sae_lens.SAE.load_from_disk(write_sae(tmp_path / "ours", random_decoder(5)))
    np.testing.assert_array_equal(ours.W_dec.detach().numpy(), random_decoder(5))
    assert ours.cfg.metadata.hook_name == HOOK
