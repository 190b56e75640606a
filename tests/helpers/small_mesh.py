"""Runs on one device: programs for eight devices take twice as long to compile."""

import jax

from dat_jax.parallel import sharding

_make_mesh = sharding.make_mesh


def make_small_mesh(*, data: int, fsdp: int, slices: int = -1, devices=None):
    """Make the mesh of the devices that are passed; if none are, of one device."""
    if devices is None:
        return _make_mesh(data=1, fsdp=1, devices=jax.devices()[:1])
    return _make_mesh(data=data, fsdp=fsdp, slices=slices, devices=devices)
