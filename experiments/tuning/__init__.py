"""Implementations of the ops of a model, compared."""
