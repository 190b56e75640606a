"""Estimated chip-hours of the trainings."""
