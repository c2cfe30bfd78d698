"""The transformers backend: batched decoding, steering and capture in this process."""
