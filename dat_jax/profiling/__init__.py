"""Ahead-of-time compilation for attached or absent devices, and what it reports: memory, FLOPs, bytes, collectives."""
