"""A backend that is many backends: workers of a Ray cluster, each with an engine of its own."""
