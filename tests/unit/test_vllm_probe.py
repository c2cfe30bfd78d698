"""The probe's tables and sums against a loop over tokens and instructions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pvec.backends.vllm.packing import pack_plan, unpack_plan
from pvec.backends.vllm.probe import Probe, attach, attach_before
from pvec.steering.tables import clamps_needed, plan_rows
from pvec.types import Instruction, Operator, Positions

WIDTH = 12


def _vector(seed: int) -> np.ndarray:
    values: np.ndarray = np.random.default_rng(seed).standard_normal(WIDTH).astype(np.float32)
    return values


def _instruction(
    seed: int, operator: Operator = "add", positions: Positions = "all", coef: float = 1.0
) -> Instruction:
    return Instruction(
        vector=_vector(seed), layer=1, coef=coef, positions=positions, operator=operator
    )


PLANS = {
    "sum": (_instruction(1), _instruction(2, coef=-2.0)),
    "ablate": (_instruction(1, "ablate"),),
    "cap above": (_instruction(1, "cap", coef=0.2),),
    "cap far above": (_instruction(1, "cap", coef=99.0),),
    "add, ablate, add": (
        _instruction(1, coef=3.0),
        _instruction(2, "ablate"),
        _instruction(3, coef=-1.0),
    ),
    "two clamps": (
        _instruction(1, "ablate", "prompt"),
        _instruction(2, positions="response", coef=2.0),
        _instruction(3, "cap", coef=-0.5),
        _instruction(4),
    ),
    "by position": (
        _instruction(1, positions="prompt"),
        _instruction(2, positions="response"),
        _instruction(3, "ablate", positions="response"),
    ),
}


def _probe(*, tokens: int = 32, clamps: int = 2, slots: int = 3, rows: int = 9) -> Probe:
    where = torch.zeros(2, tokens, dtype=torch.int32)
    return Probe(
        where=where,
        hidden_size=WIDTH,
        slots=slots,
        clamps=clamps,
        rows=rows,
        dtype=torch.float32,
    )


def _by_hand(stream: torch.Tensor, plan: tuple[Instruction, ...], role: int) -> torch.Tensor:
    roles = {"prompt": (0, 1), "response": (1, 2), "all": (0, 1, 2)}
    stream = stream.double()
    for instruction in plan:
        if role not in roles[instruction.positions]:
            continue
        vector = torch.from_numpy(instruction.vector).double()
        unit = vector / vector.norm()
        along = stream @ unit
        if instruction.operator == "add":
            stream = stream + instruction.coef * vector
        elif instruction.operator == "ablate":
            stream = stream - along * unit
        else:
            stream = stream - (along - instruction.coef).clamp(min=0) * unit
    return stream


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("apart", [True, False])
def test_a_plan_does_to_each_role_what_its_instructions_do_one_by_one(
    name: str, apart: bool
) -> None:
    probe = _probe()
    plan = PLANS[name]
    probe.load(2, unpack_plan(pack_plan(plan_rows(plan, clamps=2)))[1])
    hidden, residual = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    probe.where[0, :5] = torch.tensor([0, 4, 5, 6, 1])  # nobody, slot 2 in its roles, empty slot 1
    changed = probe(hidden, residual if apart else None)
    before = hidden + residual if apart else hidden
    after = hidden + changed if apart else changed
    for token, role in ((1, 0), (2, 1), (3, 2)):
        assert torch.allclose(after[token].double(), _by_hand(before[token], plan, role), atol=1e-5)
    assert torch.equal(after[[0, 4]], before[[0, 4]])
    assert int(probe.steered) == 4


def test_clearing_a_slot_leaves_nothing_of_the_plan_before() -> None:
    probe = _probe()
    empty = {name: value.clone() for name, value in probe.named_buffers()}
    probe.load(3, plan_rows(PLANS["two clamps"], clamps=2)[1])
    assert not torch.equal(probe.delta, empty["delta"])
    probe.load(3, None)
    for name, value in probe.named_buffers():
        assert torch.equal(value, empty[name]), name


def test_sums_norms_and_counts_go_to_the_rows_of_the_tokens() -> None:
    probe = _probe()
    hidden, residual = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = [3, 0, 3, 8, 3, 0]
    probe.where[1, :6] = torch.tensor(rows)
    probe(hidden, residual)
    probe(hidden, residual)
    whole = (hidden + residual).double()
    for row in (3, 8):
        mine = [t for t, r in enumerate(rows) if r == row]
        assert torch.allclose(probe.sums[row].double(), 2 * whole[mine].sum(dim=0), atol=1e-5)
        assert probe.stats[row, 0].item() == pytest.approx(
            2 * whole[mine].norm(dim=1).sum().item(), rel=1e-5
        )
        assert probe.stats[row, 1].item() == 2 * len(mine)
    assert not probe.sums[[1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("shape", ["pair", "tensor", "tuple"])
def test_probes_hang_on_layers_that_return_a_pair_or_one_tensor(shape: str) -> None:
    class Layer(nn.Module):
        def forward(self, _position: int, hidden: torch.Tensor) -> object:
            if shape == "pair":
                return hidden / 4, hidden
            return hidden if shape == "tensor" else (hidden, None)

    layer, after, before = Layer(), _probe(), _probe(slots=0)
    attach(layer, after)
    attach_before(layer, before)
    after.load(1, plan_rows((_instruction(1),), clamps=2)[1])
    after.where[0, 2] = 1
    after.where[1, :3] = 5
    before.where[1, :3] = 6
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    output = layer(0, hidden)
    stream = output if shape == "tensor" else sum(o for o in output if o is not None)
    wanted = hidden * (1.25 if shape == "pair" else 1.0)
    wanted[2] += torch.from_numpy(_vector(1))
    assert torch.allclose(stream, wanted, atol=1e-6)
    assert torch.allclose(after.sums[5], wanted.sum(dim=0), atol=1e-5)
    assert torch.allclose(before.sums[6], hidden.sum(dim=0), atol=1e-5)


def test_clamps_are_counted_where_they_meet() -> None:
    assert clamps_needed(PLANS["sum"]) == 0
    assert clamps_needed(PLANS["two clamps"]) == 2
    apart = (_instruction(1, "ablate", "prompt"), _instruction(2, "cap", "response"))
    assert clamps_needed(apart) == 2  # the last prompt token belongs to both
