"""Configurations of runs: one file per run, or per family of runs that differ in the backbone."""
