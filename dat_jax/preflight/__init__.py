"""Checks before a run, on the machines that it will use: everything works, how fast it is, and how long the run will take."""
