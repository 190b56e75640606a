"""DAT++ in PyTorch and in this project, side by side on a CPU."""
