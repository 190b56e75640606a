"""Parallel training: the mesh of devices, the sharding of arrays over it, and runs of several processes."""
