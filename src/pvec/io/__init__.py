"""Files: traits, the run store, users' tables, vector files. Plain arguments, no settings."""
