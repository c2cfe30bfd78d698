"""``pvec shift`` and ``pvec verify`` on two workers of a Ray cluster."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.models import HIDDEN_SIZE, NUM_LAYERS, save_adapter, saved_model

from pvec.errors import InputError
from pvec.evaluation.verify.inputs import WEIGHTS
from pvec.evaluation.verify.verify import verify
from pvec.projection import checkpoints, shift
from pvec.projection.shift import ShiftResult
from pvec.settings import Settings
from pvec.types import OutputOptions, Progress
from pvec.vectors.files import save_vector
from pvec.vectors.vector import PersonaVector


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base, three adapters of it, and two whole models of its shape."""
    folder = tmp_path_factory.mktemp("adapters")
    base = saved_model("llama")
    adapters = [str(save_adapter(base, folder / f"adapter-{seed}", seed=seed)) for seed in range(3)]
    return [str(base), *adapters, *(str(saved_model("llama", seed=seed)) for seed in (1, 2))]


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> str:
    values = np.random.default_rng(0).normal(size=(NUM_LAYERS + 1, HIDDEN_SIZE)).astype("f4")
    made = PersonaVector(trait="evil", kinds={"response_avg": values})
    return str(save_vector(made, tmp_path_factory.mktemp("vector") / "evil.safetensors"))


def settings(models: list[str], *, workers: str = "", layer: str = "auto") -> Settings:
    return Settings.model_validate(
        {
            "model": {"id": models[0], "dtype": "float32"},
            "pool": {"workers": workers},
            "project": {"layers": (2, 3)},
            "steer": {"layer": layer},
        }
    )


def means(result: ShiftResult) -> dict[tuple[str, int], float]:
    return {(row.checkpoint, row.layer): row.shift.mean for row in result.shifts}


def test_shifts_on_workers_are_those_of_one_process_also_when_one_is_killed(
    cluster: str, models: list[str], vector: str, tmp_path: Path
) -> None:
    alone = shift.run(
        settings(models), models, [vector], output=OutputOptions(out=tmp_path / "one")
    )
    said: list[str] = []
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if progress.stage == "checkpoints" and progress.done == 2 and not killed:
            joined = [re.search(r"process (\d+)\) joined", line) for line in said]
            killed.extend(int(match[1]) for match in joined if match)
            os.kill(killed[0], signal.SIGKILL)

    result = shift.run(
        settings(models, workers=f"2@{cluster}"),
        models,
        [vector],
        output=OutputOptions(out=tmp_path / "two"),
        notify=said.append,
        on_progress=kill_one,
    )
    assert killed
    assert means(result) == pytest.approx(means(alone), rel=1e-5)
    assert len({round(value, 6) for value in means(result).values()}) == 2 * (len(models) - 1)
    assert not (tmp_path / "two" / "measured.jsonl").exists()


def test_checkpoints_that_were_measured_are_kept_from_a_kill(
    models: list[str], vector: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = OutputOptions(out=tmp_path / "run")
    measure, names = checkpoints.Checkpoint.measure, []

    def third_fails(self: checkpoints.Checkpoint, backend: object) -> np.ndarray:
        names.append(self.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return measure(self, backend)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints.Checkpoint, "measure", third_fails)
    with pytest.raises(KeyboardInterrupt):
        shift.run(settings(models), models, [vector], output=out)
    assert names == ["", *models[1:3]]
    result = shift.run(settings(models), models, [vector], output=out)
    assert names[3:] == models[2:]
    whole = shift.run(
        settings(models), models, [vector], output=OutputOptions(out=tmp_path / "other")
    )
    assert means(result) == means(whole)


def test_every_worker_is_verified(cluster: str, models: list[str], vector: str) -> None:
    result = verify(settings(models, workers=f"2@{cluster}", layer="2"), vector=Path(vector))
    assert result.passed
    assert WEIGHTS in [check.name for check in result.checks]
    assert len(result.checks) > 10
    assert all("the worst of 2 workers" in check.detail for check in result.checks)


def test_a_check_that_one_worker_fails_names_the_worker() -> None:
    from pvec.evaluation.verify.inputs import Check
    from pvec.evaluation.verify.verify import _of_workers

    good = Check(name="a", measured=0.1, allowed=1.0, unit="x", detail="", passed=True)
    bad = Check(name="a", measured=2.0, allowed=1.0, unit="x", detail="", passed=False)
    (merged,) = _of_workers([("worker 0 (a)", [good]), ("worker 1 (b)", [bad])])
    assert (merged.name, merged.passed) == ("a (on worker 1 (b))", False)


def test_what_runs_in_one_process_refuses_workers(models: list[str], tmp_path: Path) -> None:
    from pvec.evaluation import bake
    from pvec.evaluation.tasks import check_tasks
    from pvec.projection import weight_change

    asked = settings(models, workers="2")
    with pytest.raises(InputError, match="not on workers: omit --workers"):
        bake.run(asked, [], out=tmp_path / "baked")
    with pytest.raises(InputError, match="not on workers: omit --workers"):
        weight_change.run(asked, models[1], [])
    with pytest.raises(InputError, match="harness of capability tasks"):
        check_tasks(["arc_easy"], asked)
