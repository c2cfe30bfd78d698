"""Projecting responses, data sets, prompts and checkpoints on persona vectors."""
