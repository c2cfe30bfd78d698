"""Trait definitions: what they are made of, where they are found, and what is wrong with them."""
