"""Every implementation of every op, forward and gradient."""
