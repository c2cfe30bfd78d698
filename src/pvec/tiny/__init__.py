"""The bundled model: weights and tokenizer, and nothing else."""
