"""Watching the persona move while a model is finetuned.

``PersonaShiftCallback`` works in any transformers ``Trainer`` (TRL's too) and on any finetuning:
adapters or all weights, steered or not.
"""

# ruff: noqa: ARG002 - the Trainer decides what its callbacks are given
from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pvec.activations.capture import capture_means
from pvec.errors import InputError, ModelError
from pvec.models.chat import prompt_ids, spans_from_ids
from pvec.models.decoder import check_layer, describe_layer, find_decoder
from pvec.runs.summary import HIGH, HOOKS_ON, LOW, PREFIX
from pvec.stats import grouped_mean
from pvec.steering.hooks import unsteered
from pvec.types import TokenSpans
from pvec.vectors.projection import project

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BASE = "persona_base/"
"""Where the first line of a Trainer's log keeps the projections before training …"""
BASE_PROMPTS = "persona_base_prompts/"
"""… those of each prompt …"""
BASE_ANSWERS = "persona_base_answers"
"""… and the answers, where some are generated."""
Rows = dict[str, "NDArray[np.float64]"]
"""Per vector, the projections of each prompt ``[P]``; NaN where an answer was empty."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A vector to measure along: ``vector`` float32 ``[H]`` at ``layer`` (1-based)."""

    name: str
    vector: NDArray[np.float32]
    layer: int


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What happens when the shift along a vector exceeds ``shift`` (in units of projection)."""

    shift: float
    action: Literal["warn", "stop"] = "warn"


class PersonaShiftCallback(TrainerCallback):
    """Log how far a finetuning has moved a model along persona vectors (paper, section 4.2).

    The shift is the mean over ``prompts`` of the last prompt token's activation, now minus before
    training, projected on each vector. Before training means: the adapter disabled when there is
    one, else the model at the first step; a resumed run keeps the value it began with.

    Measured at the first and the last step and every ``every`` steps; logged beside the loss as
    ``persona/NAME``, with its 95 % interval over prompts. ``generate`` > 0 also projects greedy
    answers of so many tokens (``persona/NAME_response``, the mean over their tokens, as a shift
    too) and keeps the first and the last ones (``answers``). Steering made with
    pvec is off while it measures: ``persona/hooks_on`` counts measurements where it was not, and
    any is an error.

    ``prompts`` are user turns, or whole chats as lists of messages. Add it with
    ``trainer.add_callback``; ``callback.add_to(trainer)`` also brings its numbers to the trackers
    of ``report_to``, which otherwise see a log before any callback does.

    Raises ``InputError`` without prompts or vectors, and ``ModelError`` when training begins on a
    model that a vector does not fit.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        *,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str | Sequence[Mapping[str, str]]],
        every: int = 20,
        generate: int = 0,
        alarm: Alarm | None = None,
        on_alarm: Callable[[str], None] | None = None,
    ) -> None:
        if not probes or not prompts:
            raise InputError("The persona shift needs at least one vector and one prompt.")
        names = [probe.name for probe in probes]
        if len(set(names)) < len(names):
            raise InputError(f"Two vectors have the same name: {', '.join(names)}.")
        self.probes = tuple(probes)
        self.every = every
        self.generate = generate
        self.alarm = alarm
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        """Time spent measuring."""
        self.on_alarm = on_alarm or _warn
        self._tokenizer = tokenizer
        self._prompts = [prompt_ids(tokenizer, _chat(prompt)) for prompt in prompts]
        self._base: dict[str, float] = {}
        self._base_rows: Rows = {}
        self._base_answers: list[str] = []
        self._last_answers: list[str] = []
        self._questions = [chat[-1]["content"] for chat in map(_chat, prompts)]
        self._hooks_on = 0
        self._pending: dict[str, float] = {}
        self._alarmed: set[str] = set()

    def add_to(self, trainer: Any) -> None:
        """Put the callback before a Trainer's other callbacks, trackers included."""
        trainer.callback_handler.callbacks.insert(0, self)

    @property
    def description(self) -> str:
        """What is measured where, in one line."""
        where = ", ".join(f"{probe.name} at {describe_layer(probe.layer)}" for probe in self.probes)
        return (
            f"persona shift along {where}, measured on {len(self._prompts)} prompts every "
            f"{self.every} steps"
        )

    # ── what the Trainer calls ──────────────────────────────────────────────────────────────────

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the vectors against the model and measure it as it was before training."""
        model: nn.Module = kwargs["model"]
        self._check(model)
        self._base = self._known_base(state)
        if not self._base:
            self._base_rows = self._measure_base(model)
            self._base = {name: _mean(rows) for name, rows in self._base_rows.items()}
            self._base_answers = self._last_answers
        if state.global_step == 0:
            self._note(0, self._measure(model), control)
            # What a Trainer's log holds is typed as numbers; it is written as JSON.
            base: dict[str, Any] = {f"{BASE}{name}": value for name, value in self._base.items()}
            base |= {f"{BASE_PROMPTS}{k}": _known(rows) for k, rows in self._base_rows.items()}
            base |= {BASE_ANSWERS: self._base_answers} if self._base_answers else {}
            state.log_history.append({"step": 0, **self._pending, **base})
            self._pending = {}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure when it is time."""
        last = state.global_step >= state.max_steps
        if state.global_step % self.every == 0 or last:
            self._note(state.global_step, self._measure(kwargs["model"]), control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put what was measured beside the loss."""
        if logs is None or not self._pending or "loss" not in logs:
            return
        logs.update(self._pending)
        if state.log_history:
            state.log_history[-1].update(self._pending)
        self._pending = {}

    # ── measuring ───────────────────────────────────────────────────────────────────────────────

    def _known_base(self, state: TrainerState) -> dict[str, float]:
        """Return the projections before training that a resumed run's log keeps, or nothing."""
        names = [probe.name for probe in self.probes]
        names += [f"{name}_response" for name in names] if self.generate else []
        for entry in state.log_history:
            if all(f"{BASE}{name}" in entry for name in names):
                kept: Mapping[str, Any] = entry  # an older pvec logged the means only
                self._base_answers = list(kept.get(BASE_ANSWERS, []))
                self._base_rows = {
                    name: np.array(kept[f"{BASE_PROMPTS}{name}"], dtype=np.float64)
                    for name in names
                    if f"{BASE_PROMPTS}{name}" in kept
                }
                return {name: float(kept[f"{BASE}{name}"]) for name in names}
        return {}

    def _note(self, step: int, values: Rows, control: TrainerControl) -> None:
        shifts = {f"{PREFIX}{n}": _mean(rows) - self._base[n] for n, rows in values.items()}
        self._pending = {**shifts, **self._intervals(values), HOOKS_ON: float(self._hooks_on)}
        self.history.append({"step": float(step), **self._pending})
        control.should_log = control.should_log or step > 0
        self._sound_alarm(step, shifts, control)

    def _sound_alarm(self, step: int, shifts: Mapping[str, float], control: TrainerControl) -> None:
        if self.alarm is None:
            return
        for name, shift in shifts.items():
            if shift > self.alarm.shift and name not in self._alarmed:
                self._alarmed.add(name)
                ending = "; training stops" if self.alarm.action == "stop" else ""
                self.on_alarm(
                    f"step {step}: the model has moved {shift:.3g} along "
                    f"{name.removeprefix(PREFIX)!r}, more than {self.alarm.shift:g}{ending}"
                )
                if self.alarm.action == "stop":
                    control.should_training_stop = True

    def _check(self, model: nn.Module) -> None:
        decoder = find_decoder(model)
        for probe in self.probes:
            check_layer(probe.layer, decoder.num_layers)
            if probe.vector.shape != (decoder.hidden_size,):
                raise ModelError(
                    f"The vector {probe.name!r} has {probe.vector.size} numbers but this model is "
                    f"{decoder.hidden_size} wide: use a vector that was extracted from it."
                )

    def _intervals(self, values: Rows) -> dict[str, float]:
        """Return the ends of the shifts' intervals over prompts, those that are known."""
        ends: dict[str, float] = {}
        for name, rows in values.items():
            if name in self._base_rows:
                moved = grouped_mean(rows - self._base_rows[name], groups=range(len(rows)))
                ends |= {f"{LOW}{name}": moved.low, f"{HIGH}{name}": moved.high}
        return {name: end for name, end in ends.items() if math.isfinite(end)}

    @property
    def answers(self) -> tuple[dict[str, str], ...]:
        """The answers before training and at the last measurement, with their questions."""
        return tuple(
            {"question": question, "base": base, "final": final}
            for question, base, final in zip(
                self._questions, self._base_answers, self._last_answers, strict=False
            )
        )

    def _measure_base(self, model: nn.Module) -> Rows:
        disable = getattr(model, "disable_adapter", None)
        if disable is None:
            return self._measure(model)
        with disable():
            return self._measure(model)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Return the mean projections of the model as it is, steering off."""
        return {name: _mean(rows) for name, rows in self._measure(model).items()}

    def _measure(self, model: nn.Module) -> Rows:
        started = time.perf_counter()
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), unsteered(model) as watch:
                values = self._project(model, "prompt_last", self._last_tokens())
                if self.generate:
                    responses = self._project(model, "response", self._answers(model))
                    values |= {f"{name}_response": value for name, value in responses.items()}
                self._hooks_on += watch.steered > 0
        finally:
            model.train(training)
            self.seconds += time.perf_counter() - started
        return values

    def _last_tokens(self) -> list[TokenSpans]:
        return [
            TokenSpans(id=str(n), token_ids=ids, spans={"prompt_last": (len(ids) - 1, len(ids))})
            for n, ids in enumerate(self._prompts)
        ]

    def _project(
        self, model: nn.Module, span: Literal["prompt_last", "response"], rows: list[TokenSpans]
    ) -> Rows:
        layers = sorted({probe.layer for probe in self.probes})
        means = [
            row.means[span]  # [L, H]
            for row in capture_means(model, rows, layers=layers, share_prompts=False)
        ]
        each = np.stack(means).astype(np.float64)  # [P, L, H]
        return {
            probe.name: np.asarray(project(each[:, layers.index(probe.layer)], probe.vector))
            for probe in self.probes
        }

    def _answers(self, model: nn.Module) -> list[TokenSpans]:
        """Generate greedily, all prompts side by side (padded on the left)."""
        generate: Any = model.generate
        tokenizer = self._tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        width = max(map(len, self._prompts))
        padded = torch.tensor([[pad] * (width - len(p)) + list(p) for p in self._prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in self._prompts])
        device = find_decoder(model).device
        output = generate(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.generate,
            do_sample=False,
            pad_token_id=pad,
        )
        special = set(tokenizer.all_special_ids)
        answers = []
        self._last_answers = []
        for number, (prompt, row) in enumerate(zip(self._prompts, output.tolist(), strict=True)):
            answer_ids = []
            for token in row[width:]:
                if token in special:
                    break
                answer_ids.append(token)
            self._last_answers.append(str(tokenizer.decode(answer_ids)))
            answers.append(spans_from_ids(str(number), prompt_ids=prompt, answer_ids=answer_ids))
        return answers


def _chat(prompt: str | Sequence[Mapping[str, str]]) -> Sequence[Mapping[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _mean(rows: NDArray[np.float64]) -> float:
    return float(np.nanmean(rows))


def _known(rows: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as JSON can hold them."""
    return [None if math.isnan(value) else value for value in rows.tolist()]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)
