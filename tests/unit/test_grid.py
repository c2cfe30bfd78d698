"""Grids: the file, what runs and what is skipped, failures, and progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import save_model, tiny_model
from helpers.runs import judged_run

from pvec.cli.progress import PlainProgress
from pvec.errors import InputError, ModelError, PvecError
from pvec.grid import run as grid
from pvec.grid.commands import ExtractGrid, Job
from pvec.grid.file import read_grid_file
from pvec.report.sections.grid_numbers import GridRuns, grid_numbers
from pvec.runs.grid import GridCell, GridFolder, read_grid
from pvec.runs.store import Run
from pvec.settings import Settings
from pvec.traits.trait import load_trait
from pvec.types import Progress
from pvec.vectors.files import save_vector
from pvec.vectors.quality import suggest_layer
from pvec.vectors.vector import PersonaVector


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [tiny]\ntrait: evil", "traits: field required; trait: unknown key"),
        ("models: [{id: tiny, dtpye: float32}]\ntraits: evil", "models.1.dtpye: unknown key (Did"),
        ("models: [tiny, {id: tiny}]\ntraits: evil", "two models are called 'tiny'"),
        ("models: [tiny]\ntraits: evil\nseeds: [-1]", "seeds.1: input should be greater"),
        ("models: []\ntraits: evil", "models: tuple should have at least 1 item"),
        ("- tiny", "must hold `models:`"),
    ],
)
def test_a_bad_grid_file_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_grid_file(written(tmp_path / "g.yaml", text))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text", ["models: [tiny]\ntraits: evli", "models: [tiny, no/such/model]\ntraits: evil"]
)
def test_a_bad_trait_or_model_starts_nothing(text: str, tmp_path: Path) -> None:
    with pytest.raises(PvecError):
        grid.run(Settings(), written(tmp_path / "g.yaml", text), "extract", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_is_missing_runs_and_a_failure_stops_no_other_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int, str]] = []
    broken = {("b", 0)}

    def run(command: ExtractGrid, job: Job, *_: object) -> None:
        settings = job.settings
        ran.append((job.model.label, settings.generation.seed, settings.steer.layer))
        if (job.model.label, job.cell.seed) in broken:
            raise ModelError("no weights")
        if (job.model.label, job.cell.seed) == ("b", 1):
            raise KeyboardInterrupt
        command.result(job).parent.mkdir(parents=True)
        command.result(job).touch()

    monkeypatch.setattr(ExtractGrid, "run", run)
    file = written(
        tmp_path / "g.yaml",
        "models: [{id: tiny, name: a}, {id: tiny, name: b, layer: 2}]\ntraits: evil\nseeds: [0, 1]",
    )
    command = (Settings(), file, "extract")
    with pytest.raises(KeyboardInterrupt):
        grid.run(*command, out=tmp_path / "out")
    assert ran == [("a", 0, "auto"), ("a", 1, "auto"), ("b", 0, "2"), ("b", 1, "2")]
    cells = read_grid(tmp_path / "out").cells
    assert [cell.state for cell in cells] == ["done", "done", "failed", "pending"]
    assert cells[2].reason == "no weights"

    ran.clear()
    broken.update({("b", 1)})
    result = grid.run(*command, out=tmp_path / "out")
    assert [cell[:2] for cell in ran] == [("b", 0), ("b", 1)]
    assert result.ran == len(result.failed) == 2
    with pytest.raises(PvecError, match="2 of 4 cells failed, the first: evil in b, seed 0"):
        result.require_all()

    ran.clear()  # another setting of one command runs what it changes
    broken.clear()
    more = Settings.model_validate({"extract": {"rollouts": 11}})
    (tmp_path / "out" / "extract-evil-a-s0").rename(tmp_path / "gone")
    monkeypatch.setattr(ExtractGrid, "run", lambda *_: ran.append(("any", 0, "")))
    grid.run(more, file, "extract", out=tmp_path / "out")
    assert len(ran) == 4


def test_the_numbers_of_a_grid_are_those_of_its_vector_files(tmp_path: Path) -> None:
    trait, draw = load_trait("evil"), np.random.default_rng(3)
    cells, rows = [], {}
    for model, depth in (("a", 4), ("b", 6)):
        for seed in (0, 1, 2):
            cell = GridCell(
                command="extract", model=model, trait="evil", seed=seed, run=f"{model}{seed}",
                state="done",
            )  # fmt: skip
            cells.append(cell)
            folder = tmp_path / cell.run
            if (model, seed) in (("a", 0), ("a", 1)):
                judged_run(folder, trait)
            else:
                Run.open_or_create(folder, identity={"trait": "evil"}).close()
            table = draw.normal(size=(depth + 1, 8)).astype(np.float32)
            vector = PersonaVector(
                trait="evil",
                kinds={"response_avg": table},
                mean_norm=np.ones(depth + 1, dtype=np.float32),
            )
            (folder / "vectors").mkdir()
            save_vector(vector, folder / "vectors" / "evil.safetensors")
            rows[model, seed] = table, suggest_layer(vector)[0]
    cells.append(
        GridCell(command="extract", model="c", trait="evil", seed=0, run="c", state="failed")
    )
    numbers = grid_numbers(GridRuns(grid=GridFolder(path=tmp_path, cells=tuple(cells)), judge=None))

    def cosine(x: Any, y: Any) -> float:
        return float(torch.cosine_similarity(torch.tensor(x), torch.tensor(y), dim=0))

    for item in numbers.traits[:2]:
        layer = sorted(rows[item.model, seed][1] for seed in (0, 1, 2))[1]
        tables = [rows[item.model, seed][0][layer] for seed in (0, 1, 2)]
        pairs = [cosine(tables[i], tables[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert item.layer == layer
        assert item.depth == layer / {"a": 4, "b": 6}[item.model]
        assert item.seed_cosine is not None
        found = (item.seed_cosine.mean, item.seed_cosine.low, item.seed_cosine.high)
        assert found == pytest.approx((sum(pairs) / 3, min(pairs), max(pairs)), abs=1e-6)
    assert numbers.traits[0].positive is not None
    assert numbers.traits[0].positive.n == 2 * 24
    assert numbers.traits[1].positive is None
    assert numbers.traits[2].layer is numbers.traits[2].positive is None
    (models,) = numbers.model_cosines
    share = (numbers.traits[0].depth + numbers.traits[1].depth) / 2  # type: ignore[operator]
    layers = [round(share * 4), round(share * 6)]
    assert models.layers == tuple(layers)
    means = [
        sum(rows[name, seed][0][layer] for seed in (0, 1, 2)) / 3
        for name, layer in zip("ab", layers, strict=True)
    ]
    assert models.cosines[0][1] == pytest.approx(cosine(*means), abs=1e-6)


def test_the_progress_of_a_grid_counts_its_cells_and_says_the_time_left() -> None:
    lines: list[str] = []
    now = [0.0]
    show = PlainProgress(lines.append, clock=lambda: now[0])

    def cells(done: int) -> Progress:
        return Progress(stage="grid", done=done, total=4, unit="cells", detail="now x", outer=True)

    show(cells(1))
    show(Progress(stage="answers", done=0, total=2))
    now[0] = 20.0
    show(cells(2))
    show(Progress(stage="answers", done=0, total=2))
    assert lines == [
        "grid: 1/4 cells, now x",
        "answers: 0/2 items",
        "grid: 2/4 cells, 0.05 cells/s, 40s left, now x",
        "answers: 0/2 items",
    ]


def test_a_model_that_cannot_be_loaded_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def fail(name: str, *_: object, **__: object) -> None:
        tries.append(name)
        raise ModelError("too large")

    monkeypatch.setattr("pvec.backends.session.open_backend", fail)
    model = save_model(tiny_model("llama"), tmp_path / "model")
    file = written(tmp_path / "g.yaml", json.dumps(
        {"models": [str(model)], "traits": ["evil"], "seeds": [0, 1, 2]}
    ))  # fmt: skip
    settings = Settings.model_validate(
        {"extract": {"judge": False, "limit": 1, "rollouts": 1}, "generation": {"max_tokens": 4}}
    )
    result = grid.run(settings, file, "extract", out=tmp_path / "out")
    assert [cell.reason for cell in result.failed] == ["too large"] * 3
    assert tries == ["hf"]
