"""Models: files, loading, fingerprints, decoder layers and chat templates."""
