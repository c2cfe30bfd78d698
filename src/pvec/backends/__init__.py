"""Backends run a model: the contract, its implementations, and the session of a command."""
