"""What runs a model: the contract, and its implementations."""
