"""Layers without parameters: convolution, normalization, activation, MLP and resizing."""
