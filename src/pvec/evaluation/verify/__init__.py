"""Proof that steering changes activations exactly as specified."""
