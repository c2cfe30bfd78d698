"""Persona vectors: from captured responses to files, their quality, and their arithmetic."""
