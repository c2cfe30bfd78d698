"""What a sweep is made of: texts into layers and coefficients, sources into conditions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pvec.errors import InputError, ModelError
from pvec.evaluation.conditions import (
    Grid,
    Source,
    incremental_source,
    layers_label,
    parse_coefs,
    parse_layers,
    random_like,
    steered_conditions,
)

ROWS = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
NORMS = np.array([1, 2, 4, 8, 16], dtype=np.float32)


def source(label: str = "evil", *, norms: np.ndarray | None = NORMS) -> Source:
    return Source(label=label, rows=ROWS, mean_norms=norms)


def grid(**changes: Any) -> Grid:
    settings: dict[str, Any] = {"layers": ((2,),), "coefs": (-1.0, 0.0, 2.0)}
    return Grid(**(settings | changes))


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
    conditions = steered_conditions([source()], grid(layers=((1,), (2,))))
    assert [(c.layers, c.coef) for c in conditions] == [
        ((1,), -1), ((1,), 2), ((2,), -1), ((2,), 2)
    ]  # fmt: skip
    assert len({c.name for c in conditions}) == 4


def test_a_ceiling_of_zero_is_a_condition_and_an_ablation_has_no_dose() -> None:
    caps = steered_conditions([source()], grid(operator="cap"))
    ablations = steered_conditions([source()], grid(operator="ablate"))
    assert [c.coef for c in caps] == [-1, 0, 2]
    assert len(ablations) == 1
    assert ablations[0].steering[0].operator == "ablate"


def test_a_dose_in_norm_units_has_that_length() -> None:
    (condition,) = steered_conditions([source()], grid(layers=((3,),), coefs=(0.5,), unit="norm"))
    (instruction,) = condition.steering
    added = instruction.coef * instruction.vector
    assert np.linalg.norm(added) == pytest.approx(0.5 * NORMS[3])


def test_norm_units_without_norms_are_refused() -> None:
    with pytest.raises(InputError, match="--coef-unit raw"):
        steered_conditions([source(norms=None)], grid(unit="norm"))


def test_layers_at_once_and_vectors_together_are_one_condition() -> None:
    conditions = steered_conditions(
        [source("evil"), source("humorous")],
        grid(layers=((1, 2),), coefs=(1.0,), together=True),
    )
    (condition,) = conditions
    assert [(i.name, i.layer) for i in condition.steering] == [
        ("evil", 1), ("evil", 2), ("humorous", 1), ("humorous", 2)
    ]  # fmt: skip


def test_the_random_control_has_the_norms_but_not_the_direction_and_follows_its_seed() -> None:
    control = random_like(source(), seed=1)
    np.testing.assert_allclose(
        np.linalg.norm(control.rows, axis=1), np.linalg.norm(ROWS, axis=1), rtol=1e-6
    )
    assert not np.allclose(control.rows, ROWS)
    np.testing.assert_array_equal(control.rows, random_like(source(), seed=1).rows)
    assert not np.allclose(control.rows, random_like(source(), seed=2).rows)


def test_incremental_additions_up_to_a_layer_sum_to_its_vector() -> None:
    steps = incremental_source(source()).rows
    for layer in range(1, len(ROWS)):
        np.testing.assert_allclose(steps[1 : layer + 1].sum(axis=0), ROWS[layer], atol=1e-5)


def test_layers_are_labelled_as_people_write_them() -> None:
    assert layers_label((20,)) == "layer 20"
    assert layers_label((3, 4)) == "layers 3+4"
    assert layers_label((1, 2, 3)) == "layers 1-3"
