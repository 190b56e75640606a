"""Layers without parameters: linear, convolution, normalization, activation, MLP and resizing."""
