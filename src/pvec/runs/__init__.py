"""The run store: a folder that holds everything a job has made."""
