"""Mean activations of token spans, captured at the speed of the model's blocks."""
