"""Data sets, transforms of examples, and batching. Independent of models."""
