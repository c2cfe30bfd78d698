"""``pvec config``: values, origins, and no secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pvec.cli.app import main


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 0


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_every_value_is_shown_with_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pvec.yaml").write_text("filter: {paired: true}")
    Path(".env").write_text("PVEC_BACKEND__NAME=hf")
    monkeypatch.setenv("PVEC_MODEL__ID", "some/model")
    monkeypatch.delenv("PVEC_BACKEND__NAME", raising=False)
    run("config", "--seed", "3", "--json")
    result = shown(capsys)
    assert result["filter.paired"] == {"value": True, "origin": "pvec.yaml"}
    assert result["backend.name"] == {"value": "hf", "origin": ".env"}
    assert result["model.id"]["origin"] == "environment PVEC_MODEL__ID"
    assert result["generation.seed"] == {"value": 3, "origin": "command line"}
    assert result["judge.model"] == {"value": None, "origin": "default"}


def test_a_false_on_the_command_line_counts_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    Path("pvec.yaml").write_text("filter: {paired: true}")
    run("config", "--no-paired", "--json")
    assert shown(capsys)["filter.paired"] == {"value": False, "origin": "command line"}


@pytest.mark.parametrize("args", [("--json", "config"), ("config", "--json")])
def test_common_options_stand_before_or_after_the_command(
    args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("other.yaml").write_text("extract: {rollouts: 7}")
    run("--config", "other.yaml", *args)
    assert shown(capsys)["extract.rollouts"] == {"value": 7, "origin": "other.yaml"}


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_secrets_are_masked(
    args: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PVEC_JUDGE__API_KEY", "sk-secret")
    run("config", *args)
    captured = capsys.readouterr()
    assert "sk-secret" not in captured.out + captured.err
    assert "**********" in captured.out
    assert "PVEC_JUDGE__API_KEY" in captured.out


def test_a_url_is_shown_without_its_password_and_query(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://me:hunter2@host:8000/v1?key=s3cret"
    run("config", "--judge-url", url, "--json")
    assert shown(capsys)["judge.base_url"]["value"] == "https://host:8000/v1"
    run("config", "--judge-url", url)
    text = capsys.readouterr().out
    assert "hunter2" not in text
    assert "s3cret" not in text
