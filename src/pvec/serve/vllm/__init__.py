"""vLLM's own OpenAI server with pvec's part around its application and its engine."""
