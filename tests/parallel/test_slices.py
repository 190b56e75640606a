"""Meshes over several slices: where their devices are, what is refused, and training on them."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from dat_jax.errors import UserError
from dat_jax.parallel import sharding
from dat_jax.profiling import hlo, step_report
from dat_jax.profiling.slices import split_collectives
from dat_jax.training import loop
from dat_jax.training.monitoring.metrics import read_metrics
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of a mesh that is only looked at: a chip with its place in the torus of its slice."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def make_devices(slices, *, sides=(4, 4), chips_per_process=4, order=None):
    """Chips of slices with these sides, in processes of consecutive chips, in the order of a permutation."""
    devices = []
    for index in range(slices):
        for y, x in itertools.product(*map(range, sides)):
            process = len(devices) // chips_per_process
            devices.append(FakeDevice(100000 * (index + 1) + y * sides[1] + x, process, index, (x, y, 0)))
    return devices if order is None else [devices[place] for place in order.permutation(len(devices))]


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8, 16])
def test_the_slices_of_tpus_are_found_and_no_fsdp_group_spans_two(slices, fsdp):
    devices = make_devices(slices, order=np.random.default_rng(0))
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=devices)
    assert dict(mesh.shape) == {"slice": slices, "data": 16 // fsdp, "fsdp": fsdp}
    assert sharding.count_slices(mesh) == slices
    assert set(mesh.devices.ravel()) == set(devices)
    for index, devices_of_slice in enumerate(mesh.devices):
        assert {device.slice_index for device in devices_of_slice.ravel()} == {index}
        for group in devices_of_slice:
            assert len({device.process_index for device in group}) == max(1, fsdp // 4)


def test_each_slice_of_tpus_has_the_layout_of_a_single_slice():
    """Neighbors on an axis of the mesh are neighbors in the torus, as jax arranges the devices of one slice."""
    alone = sharding.make_mesh(data=16, fsdp=1, devices=make_devices(1))
    assert dict(alone.shape) == {"data": 16, "fsdp": 1}
    several = sharding.make_mesh(data=16, fsdp=1, devices=make_devices(3))
    for devices in several.devices:
        assert [device.coords for device in devices.ravel()] == [device.coords for device in alone.devices.ravel()]


def test_a_number_of_slices_that_the_tpus_do_not_have_is_refused():
    with pytest.raises(
        UserError, match="config.mesh.slices is 4, but the devices belong to 2 slices: expected 2, or -1"
    ):
        sharding.make_mesh(data=-1, fsdp=1, slices=4, devices=make_devices(2))
    with pytest.raises(UserError, match="config.mesh.slices is 1, but the devices belong to 2 slices"):
        sharding.make_mesh(data=-1, fsdp=1, slices=1, devices=make_devices(2))
    with pytest.raises(
        UserError, match="config.mesh.slices is 2, but the devices belong to 1 slice: expected 1, or -1"
    ):
        sharding.make_mesh(data=-1, fsdp=1, slices=2, devices=make_devices(1))


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(UserError, match="The slices have 16, 12 devices: expected the same number"):
        sharding.make_mesh(data=-1, fsdp=1, devices=make_devices(2)[:-4])


@pytest.mark.parametrize(("data", "fsdp"), [(32, 1), (-1, 3), (1, 32)])
def test_sizes_that_do_not_make_up_a_slice_are_refused(data, fsdp):
    with pytest.raises(UserError, match="does not make up the 16 devices of each of 2 slices"):
        sharding.make_mesh(data=data, fsdp=fsdp, devices=make_devices(2))


def test_an_fsdp_group_of_parts_of_processes_is_refused():
    devices = make_devices(2, sides=(4, 6), chips_per_process=4)
    with pytest.raises(UserError, match="fsdp=6 does not fit 6 processes of 4 devices"):
        sharding.make_mesh(data=-1, fsdp=6, devices=devices)


def on_cpu(devices):
    return [dataclasses.replace(device, platform="cpu", slice_index=-1) for device in devices]


def test_consecutive_processes_make_up_the_slices_of_other_devices():
    devices = on_cpu(make_devices(2, order=np.random.default_rng(1)))
    mesh = sharding.make_mesh(data=-1, fsdp=4, slices=2, devices=devices)
    processes = [{device.process_index for device in devices_of_slice.ravel()} for devices_of_slice in mesh.devices]
    assert processes == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_numbers_of_slices_that_do_not_divide_other_devices_are_refused():
    devices = on_cpu(make_devices(2, sides=(4, 6)))
    with pytest.raises(UserError, match="config.mesh.slices 5 is not a divisor of the number of devices, 48"):
        sharding.make_mesh(data=-1, fsdp=1, slices=5, devices=devices)
    with pytest.raises(UserError, match="config.mesh.slices 8 does not fit 12 processes of 4 devices"):
        sharding.make_mesh(data=-1, fsdp=1, slices=8, devices=devices)


def test_devices_without_slices_have_the_mesh_without_them():
    for slices in (-1, 1):
        mesh = sharding.make_mesh(data=-1, fsdp=2, slices=slices)
        assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
        assert sharding.count_slices(mesh) == 1


def test_a_batch_on_several_slices_keeps_the_order_of_its_rows():
    mesh = sharding.make_mesh(data=2, fsdp=2, slices=2)
    labels = np.arange(16)
    placed = sharding.put_batch({"label": labels}, mesh)["label"]
    assert sharding.local_rows(16, mesh) == list(range(16))
    np.testing.assert_array_equal(placed, labels)
    rows = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for index, device in enumerate(mesh.devices.ravel()):
        np.testing.assert_array_equal(rows[device], labels[2 * index : 2 * index + 2])
    np.testing.assert_array_equal(sharding.fill_batch(3, mesh), np.full(8, 3))


def test_every_slice_has_all_parts_of_the_state():
    mesh = sharding.make_mesh(data=2, fsdp=2, slices=2)
    where = sharding.state_sharding(jax.ShapeDtypeStruct((256, 1024), np.float32), mesh)
    for devices in mesh.devices:
        columns = [where.devices_indices_map((256, 1024))[device][1] for device in devices.ravel()]
        assert {(part.start, part.stop) for part in columns} == {(0, 512), (512, 1024)}


def train(devices, **mesh):
    """Three steps: losses, state, trainer, and the program."""
    config = tiny_config.get_config(stages=("D",), dim_stem=128, dims=(128,), num_heads=(4,), num_groups=(2,)).unlock()
    config.mesh.update(mesh)
    trainer = Trainer(config, devices=devices)
    step, arguments, _ = step_report.step_function(trainer, "train")
    compiled = step.lower(*arguments).compile()
    state, losses = trainer.initialize(), []
    for batch in itertools.islice(trainer.train_batches(start_step=0), 3):
        state, metrics = compiled(state, trainer.put_batch(batch))
        losses.append(float(metrics["loss"]))
    return losses, state, trainer, compiled.as_text()


@pytest.fixture(scope="module")
def losses_of_one_device():
    return train(jax.devices()[:1])[0]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), (4, 1), (1, 4)])
def test_training_on_two_slices_gives_the_losses_of_one_device(losses_of_one_device, data, fsdp):
    losses, state, trainer, text = train(jax.devices(), slices=2, data=data, fsdp=fsdp)
    np.testing.assert_allclose(losses, losses_of_one_device, rtol=1e-5)
    assert trainer.describe()["mesh"] == f"slice=2 x data={data} x fsdp={fsdp}"
    kernel = state.params["stages_0"]["blocks_0"]["mlp"]["linear1"]["kernel"]  # 128 x 512
    assert kernel.addressable_shards[0].data.size == 128 * 512 // fsdp
    inside, between = split_collectives(hlo.parse(text), 4)
    assert set(between) <= {"all-reduce", "reduce-scatter"}, between  # of gradients and metrics
    assert ("all-gather" in inside) == (fsdp > 1), inside
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.params))
    assert 0 < sum(row["bytes"] for row in between.values()) <= 1.05 * parameters


@pytest.mark.slow
def test_a_checkpoint_of_two_slices_is_evaluated_and_resumed_on_one(tmp_path):
    config = tiny_config.get_config(stages=("D",), dim_stem=128, dims=(128,), num_heads=(4,), num_groups=(2,)).unlock()
    config.epochs = 1
    config.mesh.update(slices=2, fsdp=2)
    result = loop.train(config, str(tmp_path))
    config.mesh.update(slices=-1, fsdp=1)
    assert loop.evaluate(config, str(tmp_path)) == pytest.approx(result, rel=1e-5)
    config.epochs = 2
    loop.train(config, str(tmp_path))
    assert list(read_metrics(tmp_path / "metrics.jsonl")["eval/top1"]) == [10, 20]
