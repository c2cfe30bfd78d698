"""Caps and floors: their effect, their count, and the percentiles that they are read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pvec.errors import InputError
from pvec.evaluation.conditions import evaluation_conditions, parse_doses, stored_condition
from pvec.evaluation.summary import ScoredAnswer, summarise
from pvec.extraction.calibrate import calibrate
from pvec.models.decoder import find_decoder
from pvec.serve.rules import SteerEntry, make_rules
from pvec.serve.vectors import _served
from pvec.settings import resolve
from pvec.settings.commands import ServeSettings, SteerSettings
from pvec.steering.instructions import steering_vector
from pvec.steering.positions import roles_by_length
from pvec.steering.proof import due_state
from pvec.steering.steerer import Steerer
from pvec.training.config import SteeringPart
from pvec.types import Instruction, Operator, Percentile
from pvec.vectors.files import load_vector, save_vector
from pvec.vectors.projection import QUANTILES, quantiles_of
from pvec.vectors.vector import PersonaVector
from tests.helpers.models import HIDDEN_SIZE, NUM_LAYERS, saved_model, tiny_model
from tests.helpers.vectors import make_vector

IDS = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(1))
UNITS = torch.nn.functional.normalize(torch.randn(2, HIDDEN_SIZE), dim=1)


def by_hand(
    taus: dict[int, float], operator: Operator
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Limit layers with hooks of our own; return the logits and which tokens lay beyond."""
    model, beyond = tiny_model(), {}
    layers = find_decoder(model).blocks

    def hook(layer: int) -> Callable[..., object]:
        def change(_module: object, _args: object, output: object) -> object:
            hidden = output[0] if isinstance(output, tuple) else output
            along = hidden @ UNITS[layer - 1]
            excess = along - taus[layer]
            out = excess > 0 if operator == "cap" else excess < 0
            beyond[layer] = out
            hidden = hidden - (excess * out)[..., None] * UNITS[layer - 1]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return change

    handles = [layers[layer - 1].register_forward_hook(hook(layer)) for layer in taus]
    with torch.no_grad():
        logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return logits, beyond


@pytest.mark.parametrize("operator", ["cap", "floor"])
def test_limits_at_two_layers_are_those_of_hooks_written_by_hand(operator: Operator) -> None:
    taus = {1: 0.01, 2: -0.02}
    expected, beyond = by_hand(taus, operator)
    assert 0 < sum(int(out.sum()) for out in beyond.values()) < 2 * IDS.numel()
    plan = tuple(
        Instruction(
            vector=3 * UNITS[n - 1], layer=n, coef=tau, operator=operator, positions="all"
        )
        for n, tau in taus.items()
    )  # fmt: skip
    model = tiny_model()
    steerer = Steerer(find_decoder(model), [plan, (), plan])
    steerer.set_roles(roles_by_length(torch.ones_like(IDS).bool(), torch.tensor([9] * 3)))
    with torch.no_grad(), steerer.attached():
        logits = model(IDS).logits
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-4)
    counts = [sum(int(out[row].sum()) for out in beyond.values()) for row in range(3)]
    assert [steerer.limited(row) for row in range(3)] == [counts[0], None, counts[2]]
    steerer.select([2, 0])
    assert [steerer.limited(row) for row in range(2)] == [counts[2], counts[0]]


def test_a_floor_raises_what_lies_below_it_and_nothing_else() -> None:
    state = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    floor = Instruction(vector=[2.0, 0.0], layer=1, coef=2.0, operator="floor")  # type: ignore[arg-type]
    assert due_state(floor, state).tolist() == [[2.0, 5.0], [3.0, 5.0]]


# ── percentiles ─────────────────────────────────────────────────────────────────────────────────


def described(places: np.ndarray) -> PersonaVector:
    vector = make_vector()
    return replace(vector, stats={**vector.stats, **quantiles_of("pos", places)})


def test_a_percentile_is_another_limit_at_every_layer() -> None:
    places = np.random.default_rng(0).normal(size=(200, 4)) * np.array([1, 2, 3, 4])
    steering = steering_vector(described(places), kind="response_avg")
    for layer in (1, 2, 3):
        for percent in (5, 50, 95):
            dose = Percentile.parse(f"pos{percent}")
            assert dose is not None
            found = steering.instruction(layer, coef=dose, operator="cap").coef
            assert found == pytest.approx(np.percentile(places[:, layer], percent), rel=1e-5)
    between = Percentile.parse("pos60")
    assert between is not None
    low, high = np.percentile(places[:, 1], [50, 75])
    found = steering.instruction(1, coef=between, operator="floor").coef
    assert found == pytest.approx(low + (high - low) * 10 / 25, rel=1e-5)


def test_percentiles_that_cannot_be_used_are_refused() -> None:
    steering = steering_vector(described(np.ones((5, 4))), kind="response_avg")
    fifty, unsteered = Percentile.parse("pos50"), Percentile.parse("p25")
    assert fifty is not None
    assert unsteered is not None
    with pytest.raises(InputError, match="use --operator cap or floor"):
        steering.instruction(1, coef=fifty)
    with pytest.raises(InputError, match="without --coef-unit"):
        steering.instruction(1, coef=fifty, operator="cap", unit="norm")
    with pytest.raises(InputError, match=r"no percentiles of unsteered .*`pvec vector calibrate"):
        steering.instruction(1, coef=unsteered, operator="cap")
    with pytest.raises(InputError, match="no percentiles of positive"):
        steering_vector(described(np.ones((5, 4))), kind="prompt_avg").instruction(
            1, coef=fifty, operator="cap"
        )
    with pytest.raises(InputError, match="write 0 to 100 after pos"):
        Percentile.parse("pos101")
    for text in ("p25,0.5", "p25,pos50"):
        with pytest.raises(InputError, match="mixes percentiles"):
            parse_doses(text)


def test_a_sweep_of_percentiles_has_one_condition_for_each_and_the_random_one_its_limits() -> None:
    places = np.random.default_rng(0).normal(size=(200, 4))
    steering = steering_vector(described(places), kind="response_avg")
    steer = SteerSettings(operator="cap", coef="pos75,pos25", layer="1+2")
    conditions = evaluation_conditions([steering], steer, num_layers=3, seed=0, prompts=False)
    assert [c.name for c in conditions[1:3]] == [
        "evil · layers 1+2 · cap pos25",
        "evil · layers 1+2 · cap pos75",
    ]
    for condition, control in zip(conditions[1:3], conditions[3:], strict=True):
        assert [i.coef for i in condition.steering] == [i.coef for i in control.steering]
        assert len({i.coef for i in condition.steering}) == 2
        stored = {**condition.identity(), **condition.labels(), "rollout": 0}
        assert stored_condition(stored).percentile == condition.percentile


def test_the_share_beyond_a_limit_is_over_all_answers() -> None:
    cap = {
        "name": "evil · layer 1 · cap pos50", "role": "steered", "vector": "evil", "layers": [1],
        "coef": 50.0, "rollout": 0, "operator": "cap", "control_of": "", "percentile": "pos50",
    }  # fmt: skip
    answers = [
        ScoredAnswer(condition=cap, question=q, text="", scores={"evil": 1.0}, limited=limited)
        for q, limited in (("a", (1, 10)), ("b", (9, 30)))
    ]
    (point,) = summarise(answers, trait="evil").points
    assert point.limited == pytest.approx(10 / 40)
    assert point.percentile == "pos50"


def test_training_takes_limits() -> None:
    part = SteeringPart(vector="v", operator="cap", coef="pos50")
    assert part.dose == Percentile(of="pos", percent=50)
    assert SteeringPart(vector="v", operator="floor", coef=-1).dose == -1
    for bad, said in (
        ({"operator": "cap"}, "cap needs a limit"),
        ({"coef": "pos50"}, "use operator cap or floor"),
        ({"operator": "cap", "coef": "some"}, "a valid number, or a percentile"),
    ):
        with pytest.raises(ValidationError, match=said):
            SteeringPart(vector="v", **bad)  # type: ignore[arg-type]


def test_the_servers_entries_and_rules_take_percentiles(tmp_path: Path) -> None:
    places = np.random.default_rng(0).normal(size=(200, 4))
    served = _served("evil", described(places), "response_avg")
    file = tmp_path / "rules.yaml"
    file.write_text("policies: [{vector: evil, ceiling: pos75, layer: 2}]", encoding="utf-8")
    settings = ServeSettings(rules=file, steer=("evil@1 pos25",))
    made = make_rules(
        {"evil": served}, num_layers=3, serve=settings, steer=SteerSettings(operator="floor")
    )
    floor, cap = made.plan(None).steering
    assert (floor.operator, cap.operator) == ("floor", "cap")
    assert floor.coef == pytest.approx(np.percentile(places[:, 1], 25), rel=1e-5)
    assert cap.coef == pytest.approx(np.percentile(places[:, 2], 75), rel=1e-5)
    with pytest.raises(InputError, match="neither a number nor a percentile"):
        made.instruction(SteerEntry(vector="evil", coef="much", operator="cap"))


# ── pvec vector calibrate ───────────────────────────────────────────────────────────────────────


def test_calibrating_adds_the_percentiles_of_unsteered_answers(tmp_path: Path) -> None:
    vector = make_vector(layers=NUM_LAYERS, width=HIDDEN_SIZE)
    path = save_vector(replace(vector, metadata={}), tmp_path / "evil.safetensors")
    changes = {
        "model.id": str(saved_model()), "extract.rollouts": 3, "extract.limit": 4,
        "generation.max_tokens": 8,
    }  # fmt: skip
    settings = resolve(changes, environ={}).settings
    result = calibrate(settings, path)
    assert (result.answers, result.questions) == (12, 4)
    measured = load_vector(path)
    for kind in vector.kinds:
        np.testing.assert_array_equal(measured.kind(kind), vector.kind(kind))
    values = np.stack(
        [measured.stats[f"proj_response_unsteered_q{round(100 * q):02}"] for q in QUANTILES]
    )
    assert (np.diff(values, axis=0) >= 0).all()
    assert (values[-1] > values[0]).all()
    quarter = Percentile.parse("p25")
    assert quarter is not None
    steering = steering_vector(measured, kind="response_avg")
    limit = steering.instruction(2, coef=quarter, operator="cap").coef
    assert limit == pytest.approx(float(values[3, 2]))
    assert result.percentiles.rows["unsteered"] == tuple(values[:, result.percentiles.layer])
    changes["extract.limit"] = changes["extract.rollouts"] = 2
    with pytest.raises(InputError, match="percentiles need 10: ask for more"):
        calibrate(resolve(changes, environ={}).settings, path)
    with pytest.raises(InputError, match=r"cannot hold percentiles: convert it"):
        calibrate(settings, save_vector(vector, tmp_path / "v.pt"))
