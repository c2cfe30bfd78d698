"""``pvec chat --url``: a conversation with a model that ``pvec serve`` serves."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pvec.backends.planned import derive_seed
from pvec.errors import InputError, PvecError
from pvec.evaluation.conversation import MAIN, AnswerProjection, AnswerText, Conversation
from pvec.models.decoder import check_layer
from pvec.settings import Settings
from pvec.types import Dose, Message, Percentile

if TYPE_CHECKING:
    from openai import OpenAI


class ServedChat(Conversation):
    """A conversation with the server at ``url``, through the ``openai`` client.

    Raises ``PvecError`` when the server cannot be reached or refuses the key.
    """

    def __init__(self, settings: Settings, url: str, *, key: str | None) -> None:
        from openai import OpenAI

        root = url.rstrip("/").removesuffix("/v1")
        self._client: OpenAI = OpenAI(base_url=f"{root}/v1", api_key=key or "none", max_retries=0)
        with _one_sentence(root):
            served: Any = self._client.get(f"{root}/pvec/vectors", cast_to=object)
        if not (isinstance(served, dict) and "vectors" in served):
            raise InputError(f"There is no pvec server at {root}: start one with pvec serve.")
        self._root = root
        self._settings = settings
        self._model = str(served["model"])
        self._num_layers = int(served["layers"])
        self._fixed = bool(served["fixed"])
        self._vectors: dict[str, Any] = {vector["name"]: vector for vector in served["vectors"]}
        super().__init__(list(self._vectors))

    def _respond(
        self, messages: list[Message], sides: Sequence[str]
    ) -> Generator[AnswerText | AnswerProjection, None, None]:
        with _one_sentence(self._root), ExitStack() as opened:
            streams = {}
            for side in sides:  # both are answered at the same time
                stream = self._stream(messages, steered=side == MAIN)
                opened.callback(stream.close)  # a closed connection stops the answer
                streams[side] = self._answer(side, stream)
            projections: list[AnswerProjection] = []
            for events in zip_longest(*streams.values()):
                for event in events:
                    if isinstance(event, AnswerProjection):
                        projections.append(event)
                    elif event is not None:
                        yield event
            yield from sorted(projections, key=lambda projection: projection.side)

    def _stream(self, messages: list[Message], *, steered: bool) -> Any:
        generation = self._settings.generation
        steer = self._entries() if steered else []
        return self._client.chat.completions.create(
            model=self._model,
            messages=messages,  # type: ignore[arg-type]
            stream=True,
            seed=derive_seed(generation.seed, self._turn),
            temperature=generation.temperature,
            top_p=generation.top_p,
            max_tokens=generation.max_tokens,
            extra_body={} if self._fixed else {"pvec": {"steer": steer}},
        )

    def _answer(self, side: str, stream: Any) -> Iterator[AnswerText | AnswerProjection]:
        text, whole = "", False
        measured: dict[str, Any] = {}
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                whole |= choice.finish_reason is not None
            measured = getattr(chunk, "pvec", None) or measured
            yield AnswerText(side=side, text=text, done=False)
        if not whole:
            raise PvecError("The server stopped in the middle of the answer: ask again.")
        yield AnswerText(side=side, text=text, done=True)
        for name, value in measured["vectors"].items():
            if value["answer"] is not None:
                yield AnswerProjection(
                    side=side,
                    vector=name,
                    layer=value["layer"],
                    projection=value["answer"],
                    value=self._describe(side, name, value),
                )

    def _describe(self, side: str, name: str, value: dict[str, Any]) -> str:
        unit = "" if self._vectors[name]["unit"] == "raw" else " residual norms"
        included = " (steering included)" if side == MAIN and self.is_steered else ""
        text = f"projection {value['answer']:+.3g}{unit}{included}"
        if not value["percentile"]:
            return text
        below = [f"{value['percentile'][end]:.0f} % of {end}" for end in ("negative", "positive")]
        return f"{text}, above {' and '.join(below)} answers"

    def _entries(self) -> list[dict[str, Any]]:
        steer = self._settings.steer
        how = {"positions": steer.positions, "operator": steer.operator}
        return [
            {
                "vector": name,
                "layer": layer,
                **how,
                **({} if steer.operator == "ablate" else _amount(coef, steer.coef_unit)),
            }
            for (name, layer), coef in self._coefs.items()
        ]

    def _layer(self, name: str, layer: int | None) -> int:
        wanted = self._settings.steer.layer
        if layer is None and wanted == "auto":
            return int(self._vectors[name]["layer"])
        if layer is None and not wanted.isdecimal():
            raise InputError(f"--layer {wanted} is not one layer: with --url write for example 20.")
        return check_layer(int(wanted) if layer is None else layer, self._num_layers)

    def _check(self, name: str, layer: int, coef: Dose) -> None:  # noqa: ARG002 (the server's)
        if self._fixed:
            raise InputError("This server does not let a request change the steering.")
        if layer not in self._vectors[name]["layers"]:
            raise InputError(f"The vector {name!r} cannot steer at layer {layer}: choose another.")


def _amount(coef: Dose, unit: str) -> dict[str, Any]:
    """Return the fields of a request that say how strong steering is."""
    return {"coef": str(coef)} if isinstance(coef, Percentile) else {"coef": coef, "unit": unit}


@contextmanager
def _one_sentence(root: str) -> Iterator[None]:
    """Turn what the ``openai`` client raises into one sentence; keys are in none of them."""
    import openai

    try:
        yield
    except openai.AuthenticationError:
        raise PvecError(
            f"The server at {root} refuses the API key: set PVEC_SERVE__API_KEY to the one that it "
            f"was started with."
        ) from None
    except openai.APIStatusError as error:
        if error.status_code == 404:
            raise InputError(
                f"There is no pvec server at {root}: start one with pvec serve."
            ) from None
        said = error.body if isinstance(error.body, dict) else {}
        message = said.get("message") or f"The server answered with status {error.status_code}."
        raise PvecError(str(message)) from None
    except openai.APIConnectionError:
        raise PvecError(
            f"The server at {root} does not answer: is pvec serve running there?"
        ) from None
    except openai.APIError as error:  # in the middle of a stream
        raise PvecError(str(error.message)) from None
