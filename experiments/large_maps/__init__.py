"""Time and memory of the backbone on large images."""
