"""``pvec doctor``: it says what is there, and exits with 2 exactly when pvec cannot work."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.shell import Done, pvec
from packaging.requirements import Requirement

from pvec import doctor
from pvec.doctor import HealthCheck


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def check(done: Done, area: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in done.json["areas"][area] if one["name"] == name)
    return dict(found)


def skip_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check that loads a model, which other tests make."""
    monkeypatch.setattr(doctor, "_model_answers", lambda: HealthCheck("answer", "ok", "not asked"))


def test_here_pvec_can_work_and_the_model_answers() -> None:
    done = pvec("doctor", "--json")
    assert done.code == 0, done.out
    assert done.json["able"] is True
    assert check(done, "bundled model", "answer")["found"].endswith(doctor.ANSWER)
    assert check(done, "packages", "torch")["state"] == "ok"
    assert not list(Path().iterdir()), "nothing was written"


def test_the_checksums_are_those_of_the_weights_that_ship() -> None:
    for name, digest in doctor.CHECKSUMS.items():
        assert hashlib.sha256((doctor.MODEL_FOLDER / name).read_bytes()).hexdigest() == digest, name


def test_it_reads_well(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_the_model(monkeypatch)
    done = pvec("doctor", "-q")
    assert "not set: real models need a judge" in done.out
    assert "how to get it" in done.out
    assert done.out.rstrip().endswith("pvec can work here. Try: pvec extract --trait evil")
    assert done.err == ""


def test_keys_are_seen_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_the_model(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:password@judge.example:8000/v1?k=sesame")
    Path(".env").write_text("OPENAI_API_KEY=sk-secret\n")
    done = pvec("doctor", "--json", "-v", "--debug")
    assert check(done, "keys", "OPENAI_API_KEY") == {
        "name": "OPENAI_API_KEY", "state": "ok", "found": "set", "remedy": "",
    }  # fmt: skip
    assert check(done, "keys", "HF_TOKEN")["state"] == "ok"
    assert check(done, "keys", "judge's server")["found"] == "judge.example:8000/v1"
    shown = done.out + done.err
    assert not [word for word in ("hf_secret", "sk-secret", "password", "sesame") if word in shown]


@pytest.mark.parametrize("fault", ["changed", "absent"])
def test_a_damaged_model_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(doctor.MODEL_FOLDER, copy)
    weights = copy / "model.safetensors"
    if fault == "absent":
        weights.unlink()
    else:
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    monkeypatch.setattr(doctor, "MODEL_FOLDER", copy)
    done = pvec("doctor", "--json")
    assert done.code == 2
    assert check(done, "bundled model", "model.safetensors")["state"] == "broken"
    assert "git checkout" in check(done, "bundled model", "model.safetensors")["remedy"]


@pytest.mark.parametrize(
    ("line", "found"),
    [("no-such-package>=1", "not installed"), ("torch>=99", "but torch>=99 is needed")],
)
def test_a_package_that_is_missing_or_too_old_is_found(
    line: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_the_model(monkeypatch)
    requirement = Requirement(line)
    monkeypatch.setattr(doctor, "_requirements", lambda extra=None: [requirement])
    done = pvec("doctor", "--json")
    assert done.code == 2
    broken = check(done, "packages", requirement.name)
    assert broken["state"] == "broken"
    assert found in broken["found"]
    assert broken["remedy"] == f"pip install '{line}'"
    assert "BROKEN" in pvec("doctor").out


def test_a_missing_extra_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_the_model(monkeypatch)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "trl" else "9.9")
    done = pvec("doctor", "--json")
    train = check(done, "extras", "train")
    assert train["state"] == "missing"
    assert train["remedy"] == "pip install '.[train]' (in the folder of pvec's source)"


def test_a_runs_folder_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_the_model(monkeypatch)
    Path("file").write_text("")
    done = pvec("doctor", "--json", "--runs", "file/runs")
    assert done.code == 2
    assert check(done, "folders", "runs")["state"] == "broken"


def test_a_torch_that_does_not_import_is_a_finding_not_a_crash() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pvec.cli.app import main\n"
        "main(['doctor', '--json', '-q'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    areas = json.loads(done.stdout)["areas"]
    (device,) = (one for one in areas["machine"] if one["name"] == "device")
    assert (device["state"], "torch cannot be imported" in device["found"]) == ("broken", True)
    assert areas["bundled model"][-1]["state"] == "broken"
