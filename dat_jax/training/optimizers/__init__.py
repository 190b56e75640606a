"""Optimizers by name, gradient clipping and rules of weight decay."""
