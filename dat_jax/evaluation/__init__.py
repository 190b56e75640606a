"""Metrics over a whole data set, computed from a predict function."""
