"""Choice of the implementations of ops by measurement, on the device that executes them."""
