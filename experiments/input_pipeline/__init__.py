"""Rates of the host part of the recipe."""
