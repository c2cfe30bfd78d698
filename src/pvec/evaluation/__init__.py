"""What steering with a vector does: conditions, sweeps, verification, chat."""
