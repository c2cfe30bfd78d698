"""Whether pvec can work on this machine."""
