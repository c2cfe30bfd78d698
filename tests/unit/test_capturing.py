"""Means that are kept while generating stand for a second pass, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from pvec.backends.hf.backend import HFBackend
from pvec.backends.kept_means import KeptMeans, answers, captured
from pvec.models.chat import spans_from_ids
from pvec.types import Generation, Instruction, Request, Sampling, SpanMeans, TokenSpans
from tests.helpers.models import HIDDEN_SIZE, saved_model


class _OnePass(HFBackend):
    """Says it captures while generating, and counts what it is asked to capture afterwards."""

    asked: tuple[str, ...] = ()

    @property
    def captures_while_generating(self) -> bool:
        return True

    def generate_and_capture(
        self, requests: Iterable[Request], **options: Any
    ) -> Iterator[tuple[Generation, SpanMeans]]:
        found = list(super().generate_and_capture(requests, **options))
        self.asked = ()
        yield from found

    def capture(self, sequences: Iterable[TokenSpans], **options: Any) -> Iterator[SpanMeans]:
        listed = list(sequences)
        self.asked = (*self.asked, *(one.id for one in listed))
        return super().capture(listed, **options)


def _requests() -> list[Request]:
    sampling = Sampling(temperature=0.0, max_tokens=5)
    return [Request(id=f"r{n}", prompt_ids=(5, 6, 7 + n), sampling=sampling) for n in range(3)]


def _spans(answer: Generation, *, skip: int = 0) -> TokenSpans:
    (request,) = (r for r in _requests() if r.id == answer.id)
    return spans_from_ids(
        answer.id, prompt_ids=request.prompt_ids, answer_ids=answer.token_ids, skip=skip
    )


def test_kept_means_are_those_of_a_second_pass_and_spare_it() -> None:
    with _OnePass(str(saved_model())) as backend, KeptMeans() as kept:
        engine: Any = SimpleNamespace(backend=backend, kept_means=kept)
        sequences = [_spans(answer) for answer in answers(engine, _requests())]
        first = {means.id: means for means in captured(engine, sequences)}
        assert backend.asked == ()
        for means in backend.capture(sequences):
            for span in ("prompt", "prompt_last", "response"):
                assert np.allclose(first[means.id].means[span], means.means[span], atol=1e-6)
                assert np.allclose(first[means.id].norms[span], means.norms[span], atol=1e-5)


def test_what_was_not_kept_or_is_asked_otherwise_is_captured() -> None:
    steering = (Instruction(vector=np.ones(HIDDEN_SIZE, dtype=np.float32), layer=1),)
    with _OnePass(str(saved_model())) as backend, KeptMeans() as kept:
        engine: Any = SimpleNamespace(backend=backend, kept_means=kept)
        made = list(answers(engine, _requests()))
        whole = _spans(made[0])
        without_thoughts = _spans(made[1], skip=2)
        steered = TokenSpans(
            id=made[2].id, token_ids=whole.token_ids, spans=whole.spans, steering=steering
        )
        unknown = TokenSpans(id="other", token_ids=whole.token_ids, spans=whole.spans)
        found = list(captured(engine, [whole, without_thoughts, steered, unknown]))
    assert len(found) == 4
    assert set(backend.asked) == {made[1].id, made[2].id, "other"}


def test_without_a_place_for_means_answers_are_only_generated() -> None:
    with _OnePass(str(saved_model())) as backend:
        engine: Any = SimpleNamespace(backend=backend, kept_means=None)
        assert {answer.id for answer in answers(engine, _requests())} == {"r0", "r1", "r2"}
        assert backend.asked == ()
