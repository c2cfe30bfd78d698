"""Where a setting's value comes from, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from pvec.errors import InputError
from pvec.settings import Settings, load_dotenv, resolve
from pvec.settings.tree import RENAMED, env_name, fields


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_settings_alone_are_the_defaults_whatever_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PVEC_EXTRACT__ROLLOUTS", "3")
    Path("pvec.yaml").write_text("extract: {rollouts: 4}")
    assert Settings().extract.rollouts == 10


def test_each_source_overrides_the_one_below_it_field_by_field() -> None:
    Path("pvec.yaml").write_text("extract: {rollouts: 2, limit: 2}\nfilter: {threshold: 20}")
    resolved = resolve(
        {"extract.rollouts": 4},
        environ={"PVEC_EXTRACT__ROLLOUTS": "3", "PVEC_EXTRACT__LIMIT": "3"},
    )
    assert resolved.settings.extract.rollouts == 4
    assert resolved.settings.extract.limit == 3
    assert resolved.settings.filter.threshold == 20
    assert resolved.settings.filter.coherence == 50
    assert resolved.origins["extract.rollouts"] == "command line"
    assert resolved.origins["extract.limit"] == "environment PVEC_EXTRACT__LIMIT"
    assert resolved.origins["filter.threshold"] == "pvec.yaml"
    assert resolved.origins["filter.coherence"] == "default"


def test_dotenv_yields_to_the_environment_and_is_named_as_an_origin() -> None:
    Path(".env").write_text(
        "PVEC_EXTRACT__LIMIT=5\nPVEC_EXTRACT__ROLLOUTS=5\nOTHER_KEY=x\nEMPTY=\n"
    )
    environ = {"PVEC_EXTRACT__ROLLOUTS": "3"}
    added = load_dotenv(environ=environ)
    assert environ["OTHER_KEY"] == "x"  # other libraries find their keys there
    assert "EMPTY" not in environ
    resolved = resolve(environ=environ, dotenv=added)
    assert resolved.settings.extract.limit == 5
    assert resolved.origins["extract.limit"] == ".env"
    assert resolved.settings.extract.rollouts == 3
    assert resolved.origins["extract.rollouts"] == "environment PVEC_EXTRACT__ROLLOUTS"


def test_a_named_configuration_file_replaces_pvec_yaml() -> None:
    Path("pvec.yaml").write_text("extract: {rollouts: 2}")
    Path("other.yaml").write_text("extract: {limit: 7}")
    settings = resolve(config_file=Path("other.yaml"), environ={}).settings
    assert (settings.extract.rollouts, settings.extract.limit) == (10, 7)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PVEC_EXTRACT__ROLOUTS", "PVEC_EXTRACT__ROLLOUTS"),
        ("PVEC_MODLE__ID", "PVEC_MODEL__ID"),
        ("PVEC_JUDGE_API_KEY", "PVEC_JUDGE__API_KEY"),
        ("pvec_model__id", "PVEC_MODEL__ID"),
    ],
)
def test_a_mistyped_environment_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"^{name} is an unknown setting\. .*'{nearest}'"):
        resolve(environ={name: "x"})


def test_a_mistyped_name_in_dotenv_is_said_to_stand_there() -> None:
    with pytest.raises(InputError, match=r"PVEC_SEED \(in \.env\)"):
        resolve(environ={"PVEC_SEED": "1"}, dotenv=frozenset({"PVEC_SEED"}))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("extrct: {rollouts: 2}", "unknown key 'extrct.rollouts'. Did you mean 'extract.rollouts'"),
        ("extract: {rolouts: 2}", "unknown key 'extract.rolouts'. Did you mean 'extract.rollouts'"),
        ("rollouts: 2", "'extract.rollouts'"),
        ("extract: 5", "extract in pvec.yaml is a section; give its keys, not 5"),
        ("just words", "must hold sections"),
        ("- a\n- b", "must hold sections"),
        ("extract: {rollouts: many}", "extract.rollouts = 'many' (from pvec.yaml): input should"),
        ("extract: {rollouts: 0}", "greater than or equal to 1"),
        ("filter: {threshold: .nan}", "filter.threshold"),
        ("backend: {name: vlm}", "'auto', 'hf' or 'vllm'"),
        ("model: {id: a\n", "pvec.yaml:2 is not valid YAML"),
        ("model:\n  id: a\n  id: b\n", "pvec.yaml:3 is not valid YAML: the key 'id' appears twice"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(text: str, complaint: str) -> None:
    Path("pvec.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        resolve(environ={})
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_unreadable_or_binary_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"no configuration file nope\.yaml"):
        resolve(config_file=Path("nope.yaml"), environ={})
    Path("folder.yaml").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        resolve(config_file=Path("folder.yaml"), environ={})
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        resolve(config_file=Path("binary.yaml"), environ={})


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "extract:\n"])
def test_an_empty_file_or_section_changes_nothing(text: str) -> None:
    Path("pvec.yaml").write_text(text)
    assert resolve(environ={}).settings == Settings()


def test_all_mistakes_are_told_at_once_with_their_origins() -> None:
    with pytest.raises(InputError) as caught:
        resolve(
            {"generation.seed": -1},
            environ={"PVEC_EXTRACT__ROLLOUTS": "ten", "PVEC_FILTER__THRESHOLD": "101"},
        )
    message = str(caught.value)
    assert "generation.seed = -1 (from command line)" in message
    assert "extract.rollouts = 'ten' (from environment PVEC_EXTRACT__ROLLOUTS)" in message
    assert "filter.threshold = '101'" in message


def test_a_key_never_shows_in_dumps_rows_or_representations() -> None:
    resolved = resolve(environ={"PVEC_JUDGE__API_KEY": "sk-secret"})
    key = resolved.settings.judge.api_key
    assert key is not None
    assert key.get_secret_value() == "sk-secret"
    shown = (
        f"{resolved} {list(resolved.rows())} {resolved.settings.model_dump(mode='json')}"
        f"{resolved.settings.model_dump_json()}"
    )
    assert "sk-secret" not in shown


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().extract.rollouts = 3  # type: ignore[misc]


def test_every_setting_has_a_text_an_environment_name_and_a_valid_default() -> None:
    settings = Settings()
    assert len({env_name(path) for path in fields()}) == len(fields())
    for path, field in fields().items():
        assert field.description, path
        assert not field.description.endswith("."), f"{path}: help adds the full stop"
        assert "\n" not in field.description, path
    assert Settings.model_validate(settings.model_dump()) == settings


def test_numbers_in_a_file_may_stand_for_words() -> None:
    Path("pvec.yaml").write_text("model: {id: 7}\ngeneration: {thinking: off}")
    settings = resolve(environ={}).settings
    assert settings.model.id == "7"
    assert settings.generation.thinking == "off"


@pytest.fixture
def _renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED, "extract.answers", "extract.rollouts")


@pytest.mark.usefixtures("_renamed")
def test_an_old_name_still_works_everywhere_and_a_note_says_the_new_one() -> None:
    Path("pvec.yaml").write_text("extract: {answers: 2}")
    from_file = resolve(environ={})
    assert from_file.settings.extract.rollouts == 2
    assert from_file.origins["extract.rollouts"] == "pvec.yaml"
    assert from_file.notes == (
        "extract.answers (pvec.yaml) is now called extract.rollouts: use the new name",
    )
    from_environment = resolve(environ={"PVEC_EXTRACT__ANSWERS": "3"})
    assert from_environment.settings.extract.rollouts == 3
    from_command_line = resolve({"extract.answers": 4}, environ={"PVEC_EXTRACT__ROLLOUTS": "3"})
    assert from_command_line.settings.extract.rollouts == 4
    assert resolve({"extract.rollouts": 4}, environ={}).settings.extract.rollouts == 4


@pytest.mark.usefixtures("_renamed")
def test_an_old_name_beside_the_new_one_is_refused() -> None:
    Path("pvec.yaml").write_text("extract: {rollouts: 1, answers: 2}")
    with pytest.raises(InputError, match=r"extract\.rollouts and its old name .* keep one"):
        resolve(environ={})


@pytest.mark.parametrize("text", ["3,4", "3, 4", "[3, 4]", "[3,4]", " 3 ,4,"])
def test_a_list_can_be_set_in_the_environment(text: str) -> None:
    assert resolve(environ={"PVEC_PROJECT__LAYERS": text}).settings.project.layers == (3, 4)


def test_a_wrong_list_in_the_environment_is_refused_like_any_value() -> None:
    with pytest.raises(InputError, match=r"project\.layers = 'x' \(from environment PVEC_"):
        resolve(environ={"PVEC_PROJECT__LAYERS": "3,x"})


def test_a_choice_of_numbers_and_an_empty_text_in_the_environment() -> None:
    names = [
        env_name(path) for path, field in fields().items() if get_args(field.annotation)[:1] == (8,)
    ]
    assert names  # the ranks of vLLM's adapters
    for name in names:
        assert resolve(environ={name: "32"}).settings != Settings()
        assert resolve(environ={name: ""}).settings == Settings()


def test_a_seed_that_other_libraries_do_not_take_is_refused() -> None:
    assert resolve({"generation.seed": 2**32 - 1}, environ={}).settings.generation.seed == 2**32 - 1
    with pytest.raises(InputError, match=r"generation\.seed = 4294967296"):
        resolve({"generation.seed": 2**32}, environ={})
