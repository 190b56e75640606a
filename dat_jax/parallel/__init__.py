"""The mesh of devices, the placement of arrays on it, and runs of several processes."""
