"""Figures: learning curves, predictions, sampled points and attention."""
