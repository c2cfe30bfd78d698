"""``pvec chat`` with a model in this process: a conversation under live steering."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pvec.backends.planned import derive_seed
from pvec.backends.session import ModelSession
from pvec.errors import InputError
from pvec.evaluation.conditions import parse_layers, single_layer
from pvec.evaluation.conversation import MAIN, AnswerProjection, AnswerText, Conversation
from pvec.models.chat import answer_text, prompt_ids, spans_from_ids, think_length
from pvec.models.decoder import check_layer
from pvec.steering.instructions import SteeringVector, steering_vector
from pvec.types import Dose, Generation, Instruction, Message, Request
from pvec.vectors.files import load_vectors
from pvec.vectors.projection import project


class Chat(Conversation):
    """A conversation with a session's model. ``vectors`` have one name each."""

    def __init__(self, session: ModelSession, vectors: Sequence[SteeringVector]) -> None:
        super().__init__([vector.label for vector in vectors])
        self._session = session
        self._settings = session.settings
        self._vectors = {vector.label: vector for vector in vectors}

    @property
    def steering(self) -> tuple[Instruction, ...]:
        """What steers the next answer."""
        return tuple(
            self._instruction(name, layer, coef) for (name, layer), coef in self._coefs.items()
        )

    def _respond(
        self, messages: list[Message], sides: Sequence[str]
    ) -> Generator[AnswerText | AnswerProjection, None, None]:
        tokenizer = self._session.metadata.tokenizer
        ids = prompt_ids(tokenizer, messages, thinking=self._session.thinking)
        sampling = self._session.sampling(derive_seed(self._settings.generation.seed, self._turn))
        main = Request(id=MAIN, prompt_ids=ids, sampling=sampling, steering=self.steering)
        requests = [main if side == MAIN else replace(main, id=side, steering=()) for side in sides]
        finished: list[Generation] = []
        for chunk in self._session.backend.stream(requests):
            if chunk.finished:
                finished.append(chunk.finished)
                text, kept = chunk.finished.text, self._without_reasoning(ids, chunk.finished)
                yield AnswerText(side=chunk.id, text=text, done=True, kept=kept)
            else:
                text = str(tokenizer.decode(list(chunk.token_ids), skip_special_tokens=True))
                # a text that ends inside a character
                yield AnswerText(side=chunk.id, text=text.removesuffix("\ufffd"), done=False)
        yield from self._measure(ids, finished)

    def _without_reasoning(self, ids: tuple[int, ...], generation: Generation) -> str:
        """Return what goes into the history, as the chat templates of reasoning models ask."""
        tokenizer = self._session.metadata.tokenizer
        think = think_length(tokenizer, generation.token_ids, prompt_ids=ids)
        return answer_text(tokenizer, generation.token_ids, think) if think else generation.text

    def _measure(
        self, ids: tuple[int, ...], answers: Sequence[Generation]
    ) -> Iterator[AnswerProjection]:
        """Project the answers' activations, captured without the steering that adds to it.

        A projection is in units of the residual stream; relative to the answer's mean residual
        norm at that layer it is a percentage.
        """
        if not self._vectors:
            return
        tokenizer = self._session.metadata.tokenizer
        spans = [
            spans_from_ids(
                answer.id,
                prompt_ids=ids,
                answer_ids=answer.token_ids,
                skip=think_length(tokenizer, answer.token_ids, prompt_ids=ids),
            )
            for answer in answers
            if answer.token_ids
        ]
        for means in sorted(self._session.backend.capture(spans), key=lambda m: m.id):
            for name, vector in self._vectors.items():
                for layer in self._layers_of(name):
                    activation = means.means["response"][layer]
                    if np.isnan(activation).any() or not vector.rows[layer].any():
                        continue
                    along = float(project(activation, vector.rows[layer]))
                    norm = float(means.norms["response"][layer])
                    yield AnswerProjection(
                        side=means.id,
                        vector=name,
                        layer=layer,
                        projection=along,
                        value=f"projection {along:+.3g} ({along / norm:+.1%} of the residual norm)",
                    )

    def _layers_of(self, name: str) -> list[int]:
        """Return the layers at which a vector steers, or the one at which it would."""
        return sorted({layer for vector, layer in self._coefs if vector == name}) or [
            self._layer(name, None)
        ]

    def _layer(self, name: str, layer: int | None) -> int:  # noqa: ARG002 (the same for all)
        """Return the layer, or the middle of those of the settings (``auto``: 55 % depth)."""
        if layer is not None:
            return check_layer(layer, self._session.metadata.num_layers)
        layers = parse_layers(
            self._settings.steer.layer, num_layers=self._session.metadata.num_layers
        )
        return layers[len(layers) // 2][0]

    def _check(self, name: str, layer: int, coef: Dose) -> None:
        self._instruction(name, layer, coef)

    def _instruction(self, name: str, layer: int, coef: Dose) -> Instruction:
        steer = self._settings.steer
        return self._vectors[name].instruction(
            layer,
            coef=coef,
            positions=steer.positions,
            operator=steer.operator,
            unit=steer.coef_unit,
        )


def load_steering_vectors(session: ModelSession, paths: Sequence[Path]) -> list[SteeringVector]:
    """Return the vectors to steer with, by trait. Raises ``InputError`` for two of one name."""
    session.check_positions()
    steer = session.settings.steer
    loaded = load_vectors(
        paths, model=session.metadata, layer=single_layer(steer), notify=session.notify
    )
    vectors = [steering_vector(vector, kind=steer.kind) for vector in loaded.values()]
    names = [vector.label for vector in vectors]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"Two vectors are named {twice[0]!r}: give only one of them.")
    return vectors
