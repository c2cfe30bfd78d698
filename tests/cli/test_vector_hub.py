"""``pvec vector push`` and ``pull`` over HTTP against a stand-in for the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pvec.vectors.files import load_vector, save_vector
from pvec.vectors.vector import PersonaVector
from tests.helpers.hub_server import Hub, HubServer

TOKEN = "hf_secretsecretsecret"


def vector(trait: str, *, seed: int = 0) -> PersonaVector:
    rng = np.random.default_rng(seed)
    return PersonaVector(
        trait=trait,
        kinds={"response_avg": rng.normal(size=(4, 6)).astype(np.float32)},
        mean_norm=np.ones(4, dtype=np.float32),
        stats={"auc": np.full(4, 0.75, dtype=np.float32)},
        metadata={"model_id": "Some/Model-7B", "kept_pos": "31", "kept_neg": "29", "judge": "j"},
    )


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(Hub(token=TOKEN)) as server:
        yield server


def pvec(
    hub: HubServer, *args: str, cwd: Path, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    offline = ("PVEC_", "HF_", "TRANSFORMERS_OFFLINE")  # the stand-in hub is to be reached
    env = {key: value for key, value in os.environ.items() if not key.startswith(offline)}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "hf"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if token is not None:
        env["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "pvec", "vector", *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_what_is_pushed_can_be_pulled_and_is_explained(hub: HubServer, tmp_path: Path) -> None:
    source = save_vector(vector("evil"), tmp_path / "evil.safetensors")
    pushed = pvec(hub, "push", str(source), "--to", "me/vectors", "--private", cwd=tmp_path)
    assert pushed.returncode == 0, pushed.stderr
    assert "me/vectors/commit" in pushed.stdout
    assert TOKEN not in pushed.stdout + pushed.stderr
    repo = hub.hub.repos["me/vectors"]
    assert repo["evil.safetensors"] == source.read_bytes()
    assert hub.hub.private["me/vectors"]
    card = repo["README.md"].decode()
    assert "base_model:\n- Some/Model-7B\n" in card
    for text in ("31 positive, 29 negative", "| separation (AUC) |", "pvec vector pull me/vectors"):
        assert text in card
    pulled = pvec(hub, "pull", "me/vectors", "--out", "got", cwd=tmp_path)
    assert pulled.returncode == 0, pulled.stderr
    assert (tmp_path / "got/evil.safetensors").read_bytes() == source.read_bytes()
    assert load_vector(tmp_path / "got/evil.safetensors").trait == "evil"


def test_two_files_of_one_name_are_not_pulled_over_each_other(
    hub: HubServer, tmp_path: Path
) -> None:
    content = save_vector(vector("evil"), tmp_path / "evil.safetensors").read_bytes()
    hub.hub.repos["me/vectors"] = {"a/evil.safetensors": content, "b/evil.safetensors": content}
    both = pvec(hub, "pull", "me/vectors", "--out", "got", cwd=tmp_path)
    assert both.returncode == 2
    assert "two files called evil.safetensors (a/evil.safetensors and b/" in both.stderr
    assert not list((tmp_path / "got").iterdir())
    one = pvec(hub, "pull", "me/vectors", "b/evil.safetensors", "--out", "got", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    assert (tmp_path / "got/evil.safetensors").read_bytes() == content


def test_a_second_push_keeps_the_rest_of_the_card(hub: HubServer, tmp_path: Path) -> None:
    evil = save_vector(vector("evil"), tmp_path / "evil.safetensors")
    funny = save_vector(vector("humorous", seed=1), tmp_path / "humorous.safetensors")
    assert pvec(hub, "push", str(evil), "--to", "me/vectors", cwd=tmp_path).returncode == 0
    repo = hub.hub.repos["me/vectors"]
    repo["README.md"] += b"\nWritten by hand.\n"
    for file in (funny, evil):
        done = pvec(hub, "push", str(file), "--to", "me/vectors", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    card = repo["README.md"].decode()
    assert card.count("## evil") == card.count("## humorous") == 1
    assert "Written by hand." in card
    listed = pvec(hub, "pull", "me/vectors", "humorus", cwd=tmp_path)
    assert listed.returncode == 2
    assert "evil.safetensors, humorous.safetensors" in listed.stderr
    assert pvec(hub, "pull", "me/vectors", "humorous", cwd=tmp_path).returncode == 0
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == ["humorous.safetensors"]


@pytest.mark.parametrize(
    ("args", "token", "said"),
    [
        (("push", "evil.safetensors", "--to", "me/v"), None, "hf auth login"),
        (("push", "evil.safetensors", "--to", "me/v"), "hf_wrongwrongwrong", "HTTP 401"),
        (("push", "evil.safetensors", "--to", "a/b/c"), TOKEN, "write OWNER/NAME"),
        (("push", "none.safetensors", "--to", "me/v"), TOKEN, "no vector file none.safetensors"),
        (("pull", "me/nothing"), TOKEN, "There is no repository me/nothing"),
        (("pull", "me/weights"), TOKEN, "has no vector files"),
    ],
)
def test_what_the_hub_says_no_to_is_one_sentence_without_the_token(
    hub: HubServer, tmp_path: Path, args: tuple[str, ...], token: str | None, said: str
) -> None:
    save_vector(vector("evil"), tmp_path / "evil.safetensors")
    hub.hub.repos["me/weights"] = {"config.json": b"{}"}
    done = pvec(hub, *args, cwd=tmp_path, token=token)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert token is None or token not in done.stderr + done.stdout


def test_a_hub_that_is_not_there_is_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    gone = HubServer(Hub())
    gone._server.server_close()
    done = pvec(gone, "pull", "me/vectors", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
