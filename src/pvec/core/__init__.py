"""Pure tensors and numbers: layers, steering, capture, vectors, projection, statistics."""
