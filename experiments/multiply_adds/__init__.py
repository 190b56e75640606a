"""Multiply-adds of the variants."""
