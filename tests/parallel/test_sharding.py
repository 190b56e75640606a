"""The mesh, the rows of a batch on it, and the sharding of the state."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dat_jax.errors import UserError
from dat_jax.parallel import sharding

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 2, (4, 2)), (2, -1, (2, 4)), (8, 1, (8, 1))])
def test_one_axis_takes_the_rest_of_the_devices(data, fsdp, shape):
    assert tuple(sharding.make_mesh(data=data, fsdp=fsdp).shape.values()) == shape


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (4, 4), (-1, 3)])
def test_sizes_that_do_not_make_up_the_devices_are_an_error(data, fsdp):
    with pytest.raises(UserError, match="does not make up 8 devices"):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_a_batch_keeps_the_order_of_its_rows(data, fsdp):
    """Row r of a global batch of 16 is on the device of index r // 2 in the mesh, whatever its shape."""
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    batch = {"image": np.arange(48, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    placed = sharding.put_batch(batch, mesh)
    assert sharding.local_rows(16, mesh) == list(range(16))
    for name, array in batch.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == sharding.batch_sharding(mesh)
        rows = {shard.device: np.asarray(shard.data) for shard in placed[name].addressable_shards}
        for index, device in enumerate(mesh.devices.ravel()):
            np.testing.assert_array_equal(rows[device], array[2 * index : 2 * index + 2])


def test_a_value_for_each_device():
    array = sharding.fill_batch(3, sharding.make_mesh(data=2, fsdp=4))
    np.testing.assert_array_equal(array, np.full(8, 3))


def test_large_arrays_are_split_along_their_largest_divisible_axis():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shapes = {"large": (256, 1024), "odd": (1023, 256), "small": (64, 64), "indivisible": (1023, 1023)}
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = {name: where.spec for name, where in sharding.state_sharding(state, mesh).items()}
    assert specs == {"large": P(None, "fsdp"), "odd": P(None, "fsdp"), "small": P(), "indivisible": P()}
    whole = sharding.state_sharding(state, sharding.make_mesh(data=8, fsdp=1))
    assert {where.spec for where in whole.values()} == {P()}
