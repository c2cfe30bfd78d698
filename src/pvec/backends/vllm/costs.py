"""What steering and capture cost in memory, per rank that holds all layers."""

from __future__ import annotations

from pvec.settings.sections import VLLMSettings
from pvec.steering.tables import first_row

SPAN_ROWS = 3
"""Accumulator rows of a captured answer: prompt but its last token, last prompt token, response."""


def accumulator_rows(options: VLLMSettings) -> int:
    """Return the accumulator rows per layer; row 0 is nobody's."""
    return 1 + SPAN_ROWS * options.captures


def table_bytes(
    options: VLLMSettings, *, num_layers: int, hidden_size: int, item_bytes: int
) -> int:
    """Return the size of the steering tables in bytes."""
    per_row = hidden_size * item_bytes + options.clamps * 4 * (hidden_size + 3)
    return num_layers * first_row(options.slots) * per_row


def capture_bytes(options: VLLMSettings, *, num_layers: int, hidden_size: int) -> int:
    """Return the size of the accumulators in bytes."""
    return (num_layers + 1) * accumulator_rows(options) * 4 * (hidden_size + 2)
