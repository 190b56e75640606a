"""Semantic segmentation: losses, mean intersection over union, and figures of predictions."""
