"""Deformable, neighborhood, window and slide attention, with their sampling and position bias."""
