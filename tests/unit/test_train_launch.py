"""What several processes of one training are refused for, before they load anything."""

from __future__ import annotations

import pytest

from pvec.backends.processes import Processes
from pvec.errors import InputError
from pvec.training.config import TrainConfig
from pvec.training.launch import View, check_sharding, require_agreement

VERSIONS = {"pvec": "0.1.0", "torch": "2.13.0"}
LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_USE_FSDP",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_a_process_is_alone_or_what_its_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Processes.launched().size == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not Processes.launched().main
    assert Processes.launched().size == 2


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' in the environment is no number"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1"},
            "use --multi_gpu in its place",
        ),
    ],
)
def test_an_environment_of_half_a_launch_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], sentence: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        Processes.launched()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            View(problem=None, versions=VERSIONS | {"torch": "2.12.0"}, identity={"data": "a"}),
            r"Process 1 of this launch has torch 2\.12\.0 in place of 2\.13\.0: install",
        ),
        (View(problem=None, versions=VERSIONS, identity={"data": "b"}), r"\(other: data\): start"),
        (
            View(problem="There is no file rows.jsonl.", versions=VERSIONS, identity={}),
            r"Process 1 of this launch stopped: There is no file rows\.jsonl\.",
        ),
    ],
)
def test_processes_that_differ_are_refused(other: View, sentence: str) -> None:
    first = View(problem=None, versions=VERSIONS, identity={"data": "a"})
    require_agreement([first, first])
    with pytest.raises(InputError, match=sentence):
        require_agreement([first, other])


def test_what_sharding_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(**parts: object) -> TrainConfig:
        tree = {"data": {"train": "rows.jsonl"}, "memory": {"shard": True}, **parts}
        return TrainConfig.model_validate(tree)

    two = Processes(rank=0, size=2)
    check_sharding(config(), two)
    with pytest.raises(InputError, match="there is one: start several"):
        check_sharding(config(), Processes())
    with pytest.raises(InputError, match=r"does not go with output\.merge"):
        check_sharding(config(output={"merge": True}), two)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"set memory\.shard=true"):
        check_sharding(config(memory={}), two)


def test_where_the_weights_are_does_not_make_another_training() -> None:
    plain = TrainConfig.model_validate({"data": {"train": "rows.jsonl"}})
    sharded = plain.model_copy(update={"memory": plain.memory.model_copy(update={"shard": True})})
    assert plain.identity() == sharded.identity()
