"""Ahead-of-time compilation and its reports of memory, FLOPs, bytes and collectives. No device needs to be attached."""
