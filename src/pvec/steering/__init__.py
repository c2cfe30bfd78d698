"""Changing the residual stream after chosen blocks, and proving that it was changed."""
