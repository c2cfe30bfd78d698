"""The OpenAI-compatible server: steered by request, with the projections of every answer."""
