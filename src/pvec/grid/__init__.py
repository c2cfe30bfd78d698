"""Grids: one command on many models, traits and seeds."""
