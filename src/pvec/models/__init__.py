"""Models as files and in memory: found, loaded, fingerprinted, their layers and chat templates."""
