"""The mesh, and how batches and state lie on it. The only file that names mesh axes.

Axes: "data" splits the batch; "fsdp" splits the batch too, and large parameters with their optimizer state.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dat_jax.errors import UserError
from dat_jax.ops.dispatch import split_batch

AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 2**16  # numbers; smaller arrays cost more to gather than they save


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over devices.

    Args:
      data, fsdp: sizes of the axes; data = -1 takes what fsdp leaves.
      devices: all of this platform, unless given.

    Raises:
      UserError: the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if data == -1:
        data = len(devices) // fsdp
    if data * fsdp != len(devices):
        raise UserError(f"A mesh of data={data} x fsdp={fsdp} does not make up {len(devices)} devices.")
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array whose first axis is the batch."""
    return NamedSharding(mesh, P(AXES))


def with_split_kernels(function: Callable, mesh: Mesh) -> Callable:
    """The function, its kernels run by each device on its part of the batch."""

    @functools.wraps(function)
    def split(*arguments):
        with split_batch(mesh, AXES):
            return function(*arguments)

    return split


def replicated(mesh: Mesh) -> NamedSharding:
    """Of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def state_sharding(state, mesh: Mesh):
    """Shardings of a tree of arrays or ShapeDtypeStructs: large arrays split over fsdp along their largest axis that
    divides, all others replicated.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*("fsdp" if axis == largest else None for axis in range(leaf.ndim))))

    return jax.tree.map(sharding, state)


def put_batch(batch, mesh: Mesh):
    """This process's part of a batch (numpy) -> the global batch on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
