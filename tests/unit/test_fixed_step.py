"""A decode step of fixed shapes gives what the ordinary step gives, run plainly and recorded.

A CUDA graph needs a GPU. Here a step is recorded as its tensor operations: what was a number of
Python is a constant from then on and hooks no longer run, as in a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import ARCHITECTURES, HIDDEN_SIZE, tiny_model, tiny_tokenizer
from torch.fx.experimental.proxy_tensor import make_fx

from pvec.backends.hf import batch_check, step
from pvec.backends.hf.backend import HFBackend
from pvec.backends.hf.step import Outputs
from pvec.types import Generation, Instruction, Request, Sampling


def trace(forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
    layers: list[list[int]] = []

    def tensors() -> list[torch.Tensor]:
        logits, *by_layer = forward()
        layers[:] = [list(values) for values in by_layer]
        return [logits, *(tensor for values in by_layer for tensor in values.values())]

    operations = make_fx(tensors)()

    def replay() -> Outputs:
        logits, *rest = operations()
        values = iter(rest)
        along, beyond = ({layer: next(values) for layer in names} for names in layers)
        return logits, along, beyond

    return replay


@pytest.fixture(autouse=True)
def _nothing_known_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_check, "_checked", set())
    monkeypatch.setattr(step, "_unrecordable", set())


def backend(architecture: str = "qwen2", *, fixed: bool) -> HFBackend:
    made = HFBackend.wrap(tiny_model(architecture), tiny_tokenizer(), batch_size=4)
    made._causal = replace(made._causal, fixed_shapes=fixed, stop_ids=frozenset(range(20)))
    return made


def instruction(seed: int, **options: Any) -> Instruction:
    vector = np.random.default_rng(seed).standard_normal(HIDDEN_SIZE).astype(np.float32)
    return Instruction(**({"vector": 3 * vector, "layer": 1 + seed % 3} | options))


def requests(count: int = 9, *, tokens: int = 16) -> list[Request]:
    """More than fit into a batch, of different lengths, steered each in its own way."""
    steering = [
        (),
        (instruction(1, coef=0.7, positions="all"),),
        (instruction(2, operator="ablate"), instruction(4, coef=-0.5)),
        (instruction(3, operator="cap", coef=-1.0), instruction(5, operator="cap", coef=0.5)),
    ]
    rng = np.random.default_rng(0)
    return [
        Request(
            id=f"r{n}",
            prompt_ids=tuple(rng.integers(20, 400, 3 + 5 * (n % 5)).tolist()),
            sampling=Sampling(
                temperature=n % 2, top_p=(1.0, 0.8)[n % 3 == 0], max_tokens=tokens - n % 4, seed=n
            ),
            steering=steering[n % 4],
        )
        for n in range(count)
    ]


def answers(made: HFBackend, asked: list[Request]) -> dict[str, Generation]:
    return {answer.id: answer for answer in made.generate(asked)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_and_touched_positions_are_those_of_the_ordinary_step(architecture: str) -> None:
    compare(architecture, requests())


@pytest.mark.parametrize("architecture", ["qwen2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_recorded_step_is_replayed_and_gives_the_same(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(step.RECORDERS, "cpu", trace)
    usual, fixed = compare(architecture, requests(4))
    assert fixed < 0.7 * usual, "the model itself runs less often"


def compare(architecture: str, asked: list[Request]) -> list[int]:
    """Compare the answers of both steps; return how often each ran the model."""
    passes, found = [0, 0], []
    for fixed in (False, True):

        def count(*_: Any, fixed: bool = fixed) -> None:
            passes[fixed] += 1

        made = backend(architecture, fixed=fixed)
        handle = made.model.register_forward_pre_hook(count)
        found.append(answers(made, asked))
        handle.remove()
        assert made._causal.fixed_shapes == fixed, "the check found no difference"
    assert len({len(answer.token_ids) for answer in found[0].values()}) > 2
    assert found[0] == found[1]
    assert any(answer.limited for answer in found[0].values())
    return passes


@pytest.mark.parametrize("recorders", [{}, {"cpu": trace}])
def test_projections_measured_in_the_step_are_those_of_the_ordinary_step(
    recorders: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "RECORDERS", recorders)
    directions = [(layer, instruction(layer).vector) for layer in (1, 3, 3)]
    measured = []
    for fixed in (False, True):
        batch = backend(fixed=fixed).live(directions)
        rows = [batch.row(request) for request in requests(5)]
        batch.waiting.extend(rows)
        while batch.waiting or batch.running:
            batch.step()
        measured.append([np.array(row.projections) for row in rows])
    for usual, fixed_rows in zip(*measured, strict=True):
        np.testing.assert_allclose(fixed_rows, usual, rtol=2e-4, atol=2e-4)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    asked = requests()
    late = instruction(1, coef=1e38, positions="response")
    asked[5] = replace(asked[5], steering=(late,))
    asked[2] = replace(asked[2], steering=(replace(late, positions="all"),))
    expected, found = (answers(backend(fixed=way), asked) for way in (False, True))
    assert found == expected
    assert {a.id for a in found.values() if a.finish_reason == "failed"} == {"r2", "r5"}


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = []

    def refuse(forward: Callable[[], Outputs]) -> Callable[[], Outputs]:
        attempts.append(1)
        forward()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setitem(step.RECORDERS, "cpu", refuse)
    made, notes = backend(fixed=True), []
    made.on_note = notes.append
    assert answers(made, requests()) == answers(backend(fixed=False), requests())
    assert attempts == [1]
    assert notes == [
        "decoding without a CUDA graph, which is slower: operation not permitted when stream is "
        "capturing"
    ]


def test_a_step_of_fixed_shapes_that_differs_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = step.ready_masks

    def everything(config: Any, visible: torch.Tensor, **options: Any) -> Any:
        return masks(config, visible | True, **options)

    monkeypatch.setattr(step, "ready_masks", everything)
    made, notes = backend(fixed=True), []
    made.on_note = notes.append
    assert answers(made, requests()) == answers(backend(fixed=False), requests())
    assert not made._causal.fixed_shapes
    (note,) = notes
    assert "Qwen2ForCausalLM computes other logits" in note
    assert note.endswith("decoding without a CUDA graph, which is slower")
