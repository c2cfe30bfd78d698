"""``pvec verify``: every check with its error, and an exit code that a script can trust."""

from __future__ import annotations

import json

import pytest

from pvec.cli.app import main
from pvec.evaluation.verify import verify as workflow
from pvec.evaluation.verify.checks import Check
from pvec.evaluation.verify.verify import VerifyResult
from tests.helpers.models import saved_model


def pvec(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    return int(stop.value.code or 0)


def test_each_check_is_shown_with_its_measured_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert pvec("verify", "--model", str(saved_model()), "--layer", "2", "--coef", "3") == 0
    shown = capsys.readouterr().out
    for check in (
        "layer numbers",
        "positions=prompt: the residual stream changes by coef x v",
        "coefficient 0 is the identity",
        "hand-written hook",
        "unsteered rows of a mixed batch",
    ):
        assert check in shown
    assert "FAILED" not in shown
    assert "checks passed" in shown


def test_a_failed_check_exits_with_2_and_is_in_the_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Check(
        name="the hook fires", passed=False, measured=1.5, allowed=0.1, unit="residual norms"
    )
    result = VerifyResult(model="m", vector="evil", layers=(2,), dtype="float32", checks=(broken,))
    monkeypatch.setattr(workflow, "verify", lambda *_args, **_asked: result)
    assert pvec("verify", "--json") == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["checks"][0]["measured"] == 1.5
    assert "the hook fires" in json.loads(shown.err)["error"]["message"]


def test_a_layer_that_the_model_lacks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert pvec("verify", "--model", str(saved_model()), "--layer", "7") == 2
    assert "layers 1 to 3" in capsys.readouterr().err
