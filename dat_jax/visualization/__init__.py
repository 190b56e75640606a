"""Figures of learning curves, predictions, sampled points and attention."""
