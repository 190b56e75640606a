"""Metrics over a whole data set, from a predict function."""
