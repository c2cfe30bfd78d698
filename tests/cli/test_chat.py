"""``pvec chat`` with its input piped in, and the conversation under it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pvec.backends.hf.backend import HFBackend
from pvec.backends.session import ModelSession
from pvec.cli.app import app
from pvec.errors import InputError, ModelError
from pvec.evaluation.chat import Chat, load_steering_vectors
from pvec.evaluation.conversation import MAIN, PLAIN, AnswerProjection, AnswerText
from pvec.models.chat import prompt_ids
from pvec.settings import Settings
from pvec.settings.sections import GenerationSettings, ModelSettings
from pvec.types import StreamChunk
from pvec.vectors.files import save_vector
from pvec.vectors.projection import quantiles_of
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = np.random.default_rng(0).standard_normal((NUM_LAYERS + 1, HIDDEN_SIZE))
    found = PersonaVector(trait="evil", kinds={"response_avg": (4 * rows).astype(np.float32)})
    return save_vector(found, tmp_path_factory.mktemp("vectors") / "evil.safetensors")


@pytest.fixture
def talk(vector: Path) -> Iterator[Chat]:
    settings = Settings(
        model=ModelSettings(id=str(saved_model()), device="cpu"),
        generation=GenerationSettings(temperature=0.0, max_tokens=10),
    )
    with ModelSession(settings) as session:
        yield Chat(session, load_steering_vectors(session, [vector]))


def answers(talk: Chat, text: str) -> dict[str, str]:
    events = list(talk.answer(text))
    return {
        event.side: event.text for event in events if isinstance(event, AnswerText) and event.done
    }


def run(lines: list[str], vector: Path, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(
        app,
        ["chat", "--model", str(saved_model()), "--device", "cpu", "--vector", str(vector),
         "--max-tokens", "8", *options],
        input="".join(f"{line}\n" for line in lines),
    )  # fmt: skip
    return result.exit_code, result.stdout, result.stderr


def test_a_piped_conversation_runs_to_its_end(vector: Path) -> None:
    code, out, err = run(
        ["Hello?", "/steer evil@2 3", "/compare", "Again?", "/off", "/quit", "never"], vector
    )
    assert code == 0, err
    assert "steering with evil at layer 2 (block 1) x 3" in out
    assert "unsteered: " in out
    assert "evil@2: projection" in out
    assert "evil@2 unsteered: projection" in out
    assert "steering is off" in out
    assert "never" not in out


def test_a_ceiling_may_be_a_percentile_of_answers(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((NUM_LAYERS + 1, HIDDEN_SIZE))
    found = PersonaVector(
        trait="evil",
        kinds={"response_avg": rows.astype(np.float32)},
        stats=quantiles_of("pos", np.full((3, NUM_LAYERS + 1), -9.0)),
    )
    path = save_vector(found, tmp_path / "evil.safetensors")
    lines = ["/compare", "/steer evil@2 pos50", "Hello?", "/steer evil@2 p25"]
    code, out, err = run(lines, path, "--operator", "cap")
    assert code == 0
    assert "steering with evil at layer 2 (block 1) x pos50" in out
    assert "unsteered: " in out
    assert "no percentiles of unsteered answers" in err


def test_a_mistake_is_one_sentence_and_the_conversation_goes_on(vector: Path) -> None:
    code, out, err = run(["/ster evil 1", "/steer evil@99 1", "/help"], vector)
    assert code == 0
    assert "Did you mean '/steer'" in err
    assert "layers 1 to 3" in err
    assert "/compare" in out


def test_an_interrupt_stops_the_answer_and_not_the_program(
    vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = HFBackend.stream

    def interrupted(self: HFBackend, requests: object) -> Iterator[StreamChunk]:
        yield from itertools.islice(right(self, requests), 2)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(HFBackend, "stream", interrupted)
    code, out, _ = run(["Hello?", "/status"], vector)
    assert code == 0
    assert "(stopped)" in out
    assert "no steering; vectors: evil" in out


def test_text_grows_and_ends_as_generate_gives_it(talk: Chat) -> None:
    events = [event for event in talk.answer("Hello?") if isinstance(event, AnswerText)]
    assert [event.done for event in events].count(True) == 1
    for before, after in itertools.pairwise(events):
        assert after.text.startswith(before.text)
    backend = talk._session.backend
    ids = prompt_ids(backend.tokenizer, [{"role": "user", "content": "Hello?"}])
    with torch.inference_mode():
        plain = backend.model.generate(  # type: ignore[attr-defined]
            input_ids=torch.tensor([ids]), max_new_tokens=10, do_sample=False
        )
    expected = backend.tokenizer.decode(plain[0, len(ids) :], skip_special_tokens=True)
    assert events[-1].text == expected


def test_the_answer_beside_is_the_unsteered_one(talk: Chat) -> None:
    unsteered = answers(talk, "Hello?")[MAIN]
    talk.command("/reset")
    talk.command("/steer evil@2 5")
    talk.command("/compare")
    both = answers(talk, "Hello?")
    assert both[PLAIN] == unsteered
    assert both[MAIN] != unsteered


def test_coefficient_zero_takes_a_vector_away(talk: Chat) -> None:
    talk.command("/steer evil@2 5")
    talk.command("/steer evil@3 1")
    talk.command("/steer evil@2 0")
    assert [(one.layer, one.coef) for one in talk.steering] == [(3, 1.0)]


def test_a_stopped_answer_is_remembered_as_far_as_it_was_said(talk: Chat) -> None:
    events = talk.answer("Hello?")
    said = [next(events) for _ in range(3)][-1]
    events.close()
    assert isinstance(said, AnswerText)
    assert talk._history[-1] == {"role": "assistant", "content": said.text}


def test_projections_are_measured_without_steering(talk: Chat) -> None:
    talk.command("/steer evil@2 5")
    events = list(talk.answer("Hello?"))
    (measured,) = [event for event in events if isinstance(event, AnswerProjection)]
    answer = next(e for e in events if isinstance(e, AnswerText) and e.done)
    backend = talk._session.backend
    prompt = prompt_ids(backend.tokenizer, [{"role": "user", "content": "Hello?"}])
    tokens = backend.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        states = backend.model(  # type: ignore[attr-defined]
            input_ids=torch.tensor([[*prompt, *tokens]]), output_hidden_states=True
        ).hidden_states[2][0, len(prompt) :]
    v = torch.from_numpy(talk._vectors["evil"].rows[2])
    expected = float((states.mean(dim=0) @ v) / v.norm())
    assert measured.projection == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "line", ["/steer", "/steer evil", "/steer good 1", "/steer evil@x 1", "/steer evil nan"]
)
def test_a_steering_command_that_does_not_parse_changes_nothing(talk: Chat, line: str) -> None:
    with pytest.raises((InputError, ModelError)):
        talk.command(line)
    assert talk.steering == ()
