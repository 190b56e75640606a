"""Checkpoints of a run and exported weights: writing, integrity, restoring and adaptation to other models."""
