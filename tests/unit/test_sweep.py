"""What a sweep is made of: texts into layers and coefficients, sources into conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvec.errors import InputError, ModelError
from pvec.evaluation.conditions import (
    Condition,
    evaluation_conditions,
    layers_label,
    parse_coefs,
    parse_layers,
    steered_conditions,
    stored_condition,
)
from pvec.settings.commands import SteerSettings
from pvec.steering.instructions import SteeringVector, random_like, steering_vector
from pvec.vectors.vector import PersonaVector

ROWS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
NORMS = np.array([1, 2, 4, 8, 16], dtype=np.float32)


def vector(label: str = "evil", *, norms: np.ndarray | None = NORMS) -> SteeringVector:
    return SteeringVector(label=label, rows=ROWS, mean_norms=norms)


def conditions(*vectors: SteeringVector, **changes: Any) -> list[Condition]:
    settings: dict[str, Any] = {"layer": "2", "coef": "-1,0,2"}
    return steered_conditions(vectors, SteerSettings(**(settings | changes)), num_layers=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-2,-1,0,1,2", (-2, -1, 0, 1, 2)),
        ("2, 1,1", (1, 2)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
        ("-1:1:1,5", (-1, 0, 1, 5)),
        ("-0", (0,)),
    ],
)
def test_coefficients_are_read_ascending_and_once(text: str, expected: tuple[float, ...]) -> None:
    assert parse_coefs(text) == expected


@pytest.mark.parametrize("text", ["", "1,,2", "one", "1;2", "nan", "inf", "0:1", "1:0:1", "0:1:0"])
def test_a_coefficient_list_that_does_not_parse_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--coef"):
        parse_coefs(text)


def test_the_part_of_a_coefficient_list_that_is_wrong_is_named() -> None:
    with pytest.raises(InputError, match="'x1' is not a number"):
        parse_coefs("-1,x1,2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20", ((20,),)),
        ("3,4", ((3,), (4,))),
        ("12:24:4", ((12,), (16,), (20,), (24,))),
        ("3+5,4", ((3, 5), (4,))),
        ("all", (tuple(range(1, 29)),)),
        ("auto", ((10,), (13,), (15,), (18,), (21,))),
    ],
)
def test_layers_are_read(text: str, expected: tuple[tuple[int, ...], ...]) -> None:
    assert parse_layers(text, num_layers=28) == expected


def test_auto_stays_inside_a_shallow_model() -> None:
    assert parse_layers("auto", num_layers=2) == ((1,), (2,))


@pytest.mark.parametrize("text", ["0", "29", "20:30", "3+40"])
def test_a_layer_outside_the_model_tells_the_range(text: str) -> None:
    with pytest.raises(ModelError, match="layers 1 to 28"):
        parse_layers(text, num_layers=28)


def test_layer_zero_is_explained() -> None:
    with pytest.raises(ModelError, match="embedding output"):
        parse_layers("0", num_layers=28)


@pytest.mark.parametrize("text", ["", "x", "3,", "1:2:3:4", "5:3", "1:5:0", "2.5"])
def test_layers_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--layer"):
        parse_layers(text, num_layers=28)


def test_coefficient_zero_is_left_to_the_baseline() -> None:
    steered = conditions(vector(), layer="1,2")
    assert [(c.layers, c.coef) for c in steered] == [
        ((1,), -1), ((1,), 2), ((2,), -1), ((2,), 2)
    ]  # fmt: skip
    assert len({c.name for c in steered}) == 4


def test_a_ceiling_of_zero_is_a_condition_and_an_ablation_has_no_coefficient() -> None:
    caps = conditions(vector(), operator="cap")
    ablations = conditions(vector(), operator="ablate")
    assert [c.coef for c in caps] == [-1, 0, 2]
    assert len(ablations) == 1
    assert ablations[0].operator == ablations[0].steering[0].operator == "ablate"


def test_a_coefficient_in_norm_units_has_that_length() -> None:
    (condition,) = conditions(vector(), layer="3", coef="0.5", coef_unit="norm")
    (instruction,) = condition.steering
    added = instruction.coef * instruction.vector
    assert np.linalg.norm(added) == pytest.approx(0.5 * NORMS[3])


def test_norm_units_without_norms_are_refused() -> None:
    with pytest.raises(InputError, match="--coef-unit raw"):
        conditions(vector(norms=None), coef_unit="norm")


@pytest.mark.parametrize("norm", [0.0, np.nan])
def test_norm_units_of_a_layer_without_a_norm_are_refused(norm: float) -> None:
    norms = NORMS.copy()
    norms[2] = norm
    with pytest.raises(InputError, match=r"no residual norm at layer 2"):
        conditions(vector(norms=norms), coef_unit="norm")


def test_a_layer_where_the_vector_is_zero_or_absent_is_refused() -> None:
    rows = ROWS.copy()
    rows[2] = 0
    with pytest.raises(InputError, match="zero at layer 2"):
        conditions(SteeringVector(label="evil", rows=rows))
    with pytest.raises(InputError, match="zero at layer 4"):
        conditions(SteeringVector(label="evil", rows=ROWS[:4]), layer="4")


def test_layers_at_once_and_vectors_together_are_one_condition() -> None:
    (condition,) = conditions(
        vector("evil"), vector("humorous"), layer="1+2", coef="1", together=True
    )
    assert [(i.name, i.layer) for i in condition.steering] == [
        ("evil", 1), ("evil", 2), ("humorous", 1), ("humorous", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("together", [False, True])
def test_every_control_says_whose_it_is(together: bool) -> None:
    steer = SteerSettings(layer="2", coef="1", together=together)
    made = evaluation_conditions([vector("unevil"), vector("evil")], steer, num_layers=4, seed=0)
    steered = [c.vector for c in made if c.role == "steered"]
    assert [c.control_of for c in made if c.role == "random"] == steered
    assert steered == (["unevil + evil"] if together else ["unevil", "evil"])


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("operator", ["add", "cap", "ablate"])
def test_a_stored_condition_comes_back_also_from_a_run_without_operator_and_control(
    operator: str, together: bool
) -> None:
    steer = SteerSettings(layer="2,1+3", coef="1", operator=operator, together=together)
    for made in evaluation_conditions(
        [vector("unevil"), vector("evil")], steer, num_layers=4, seed=0
    ):
        for stored in (made.identity(), {**made.identity(), **made.labels(), "rollout": 3}):
            read = stored_condition(stored)
            assert (read.name, read.role, read.vector) == (made.name, made.role, made.vector)
            assert (read.layers, read.coef) == (made.layers, made.coef)
            assert (read.operator, read.control_of) == (made.operator, made.control_of)


def test_the_random_control_has_the_norms_but_not_the_direction_and_follows_its_seed() -> None:
    control = random_like(vector(), seed=1)
    np.testing.assert_allclose(
        np.linalg.norm(control.rows, axis=1), np.linalg.norm(ROWS, axis=1), rtol=1e-6
    )
    assert not np.allclose(control.rows, ROWS)
    np.testing.assert_array_equal(control.rows, random_like(vector(), seed=1).rows)
    assert not np.allclose(control.rows, random_like(vector(), seed=2).rows)


def test_incremental_additions_up_to_a_layer_sum_to_its_vector() -> None:
    whole = PersonaVector(trait="evil", kinds={"response_avg": ROWS})
    steps = steering_vector(whole, kind="response_avg", increments=True).rows
    for layer in range(1, len(ROWS)):
        np.testing.assert_allclose(steps[1 : layer + 1].sum(axis=0), ROWS[layer], atol=1e-5)


def test_layers_are_labelled_as_people_write_them() -> None:
    assert layers_label((20,)) == "layer 20"
    assert layers_label((3, 4)) == "layers 3+4"
    assert layers_label((1, 2, 3)) == "layers 1-3"
