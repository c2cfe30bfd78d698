"""Running out of memory is recognised by what torch, numpy and Python really raise."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from pvec.models.memory import is_out_of_memory, unless_out_of_memory


def test_a_failed_allocation_on_the_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert not isinstance(caught.value, torch.OutOfMemoryError)  # it has no class of its own
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as from_numpy:
        np.empty(2**50, dtype=np.uint8)
    assert is_out_of_memory(from_numpy.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(caught.value)
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="multiplied"):
        unless_out_of_memory(lambda: torch.ones(2, 3) @ torch.ones(2, 3))


def test_after_a_failed_attempt_nothing_that_it_held_is_left() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def attempt() -> torch.Tensor:
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        return torch.empty(2**50, dtype=torch.uint8)

    assert unless_out_of_memory(attempt) is None
    assert held[0]() is None
    assert unless_out_of_memory(lambda: 5) == (5,)
