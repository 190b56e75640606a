"""The device mesh, and the sharding of batches and training state over it. No other module names the axes of the mesh.

Axes: "data" splits the batch. "fsdp" splits the batch too, and large parameters with their optimizer state. A mesh over several
slices, groups of devices that only the network of the data center connects, has a first axis "slice", which splits the batch.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dat_jax.errors import UserError
from dat_jax.ops.dispatch import split_batch

AXES = ("data", "fsdp")
SLICE_AXIS = "slice"
MIN_SHARDED_SIZE = 2**16  # elements; gathering a smaller array costs more than sharding it saves


def make_mesh(
    *,
    data: int,
    fsdp: int,
    slices: int = -1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm] (jaxlib has no annotations)
) -> Mesh:
    """Make the mesh over all devices.

    In a run of several processes the devices of an fsdp group belong to one process where possible: the parameters that fsdp
    gathers in every layer stay within a host, and only gradients are sent between hosts. An fsdp group never has devices of
    several slices.

    Args:
      data: size of the axis "data"; -1 for the number of devices of a slice divided by ``fsdp``.
      fsdp: size of the axis "fsdp"; -1 for the number of devices of a slice divided by ``data``.
      slices: number of slices; -1 for the slices of the devices. Devices other than TPUs belong to no slices; consecutive ones
        make up a slice. The mesh has an axis "slice" if it has several slices.
      devices: devices of the mesh; by default all devices of the default platform.

    Raises:
      UserError: the product of the sizes is not the number of devices, the devices do not make up ``slices`` slices of the
        same size, or an fsdp group or a slice would contain part of the devices of a process.
    """
    groups = _split_slices(jax.devices() if devices is None else devices, slices)
    count = len(groups[0])
    if data == -1:
        data = count // fsdp
    elif fsdp == -1:
        fsdp = count // data
    if data * fsdp != count:
        if len(groups) == 1:
            raise UserError(f"A mesh of data={data} x fsdp={fsdp} does not make up {count} devices.")
        raise UserError(
            f"A mesh of data={data} x fsdp={fsdp} does not make up the {count} devices of each of {len(groups)} slices."
        )
    if len(groups) == 1:
        return _make_slice_mesh(groups[0], data, fsdp)
    arrays = [_make_slice_mesh(group, data, fsdp).devices for group in groups]
    return Mesh(np.stack(arrays), (SLICE_AXIS, *AXES), axis_types=(AxisType.Auto,) * 3)


def _make_slice_mesh(devices: Sequence[Any], data: int, fsdp: int) -> Mesh:
    """The mesh of ``data`` x ``fsdp`` devices that belong to one slice."""
    types = (AxisType.Auto,) * 2
    hosts = len({device.process_index for device in devices})
    local = len(devices) // hosts
    if fsdp == 1 or hosts == 1:
        return jax.make_mesh((data, fsdp), AXES, axis_types=types, devices=devices)
    if local % fsdp and fsdp % local:
        raise UserError(
            f"A mesh with fsdp={fsdp} does not fit {hosts} processes of {local} devices: expected a divisor or a multiple "
            f"of {local}."
        )
    return Mesh(np.array(_in_order(devices)).reshape(data, fsdp), AXES, axis_types=types)


def _split_slices(devices: Sequence[Any], slices: int) -> list[Sequence[Any]]:
    """The devices of each slice."""
    if devices[0].platform != "tpu":  # a GPU also has an index of its "slice", a part of the network of NVLink
        return [devices] if slices in (-1, 1) else _split_evenly(devices, slices)
    indices = [getattr(device, "slice_index", 0) for device in devices]
    sizes = Counter(indices)
    if slices not in (-1, len(sizes)):
        raise UserError(
            f"config.mesh.slices is {slices}, but the devices belong to {_count(len(sizes), 'slice')}: expected "
            f"{len(sizes)}, or -1 to use the slices of the devices."
        )
    if len(sizes) == 1:
        return [devices]
    if len(set(sizes.values())) > 1:
        numbers = ", ".join(str(sizes[index]) for index in sorted(sizes))
        raise UserError(f"The slices have {numbers} devices: expected the same number of devices in each.")
    return [
        [device for device, index in zip(devices, indices, strict=True) if index == number] for number in sorted(sizes)
    ]


def _split_evenly(devices: Sequence[Any], slices: int) -> list[Sequence[Any]]:
    """Groups of consecutive devices, for devices that have no slices."""
    if len(devices) % slices:
        raise UserError(f"config.mesh.slices {slices} is not a divisor of the number of devices, {len(devices)}.")
    size = len(devices) // slices
    hosts = len({device.process_index for device in devices})
    local = len(devices) // hosts
    if local % size and size % local:
        raise UserError(
            f"config.mesh.slices {slices} does not fit {hosts} processes of {local} devices: expected a divisor or a multiple "
            f"of {hosts}."
        )
    ordered = _in_order(devices)
    return [ordered[start : start + size] for start in range(0, len(devices), size)]


def _in_order(devices: Sequence[Any]) -> list[Any]:
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def count_slices(mesh: Mesh) -> int:
    """Number of slices of a mesh."""
    return mesh.shape.get(SLICE_AXIS, 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch: over all axes of the mesh."""
    return NamedSharding(mesh, P(mesh.axis_names))


def with_split_kernels(function: Callable, mesh: Mesh) -> Callable:
    """The function, with kernels in it that each device runs on its part of the batch, see ``ops.dispatch``."""

    @functools.wraps(function)
    def split(*arguments):
        with split_batch(mesh, mesh.axis_names):
            return function(*arguments)

    return split


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array of which every device has a full copy."""
    return NamedSharding(mesh, P())


def state_sharding(state, mesh: Mesh):
    """Shardings of a training state.

    An array of at least ``MIN_SHARDED_SIZE`` elements is split over "fsdp" along its largest axis of divisible size. All
    others are replicated.

    Args:
      state: tree of arrays or ShapeDtypeStructs.
      mesh: the mesh.

    Returns:
      The same tree with a NamedSharding for each array.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or np.prod(leaf.shape) < MIN_SHARDED_SIZE:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*("fsdp" if axis == largest else None for axis in range(leaf.ndim))))

    return jax.tree.map(sharding, state)


def with_whole_params(function: Callable, shardings, mesh: Mesh) -> Callable:
    """The function, with "params" of its variables gathered before it and their gradients scattered after it.

    Without it, the partitioner splits the channels of a layer whose parameters are split, and gathers the batch for that:
    dat_pp_t on 256 chips of a v5e with fsdp=8 moved 121 GB per step.

    Args:
      function: (variables, ...) -> anything.
      shardings: shardings of the parameters, a tree of their structure.
      mesh: the mesh; with an axis "fsdp" of size 1 the function is returned unchanged.
    """
    if mesh.shape["fsdp"] == 1:
        return function

    @functools.wraps(function)
    def whole(variables, *arguments):
        params = jax.tree.map(lambda leaf, sharding: _gather(leaf, sharding, mesh), variables["params"], shardings)
        return function({**variables, "params": params}, *arguments)

    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(array, sharding, mesh):
    """A full copy of a parameter on every device. Its gradient has the sharding of the parameter."""
    return jax.lax.with_sharding_constraint(array, replicated(mesh))


_gather.defvjp(
    lambda array, sharding, mesh: (_gather(array, sharding, mesh), None),
    lambda sharding, mesh, _, gradient: (jax.lax.with_sharding_constraint(gradient, sharding),),
)


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Indices of the examples of a batch that are placed on devices of this process, in ascending order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    parts = [part for index in indices if index is not None for part in index]
    return sorted({row for part in parts for row in range(*part.indices(batch_size))})


def put_batch(batch, mesh: Mesh):
    """Place a batch on the devices.

    Args:
      batch: tree of numpy arrays with the examples of this process, those of ``local_rows``, along the first axis.
      mesh: the mesh.

    Returns:
      The tree of the global arrays, with the examples of all processes.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)


def fill_batch(value, mesh: Mesh) -> jax.Array:
    """Make a global array of one number per device, with ``value`` for each device of this process."""
    local_devices = sum(device.process_index == jax.process_index() for device in mesh.devices.ravel())
    return put_batch(np.full(local_devices, value), mesh)
