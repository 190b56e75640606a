"""Collectives inside and between slices, on excerpts of compiled programs."""

import importlib.util
import os
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console

from dat_jax.profiling import command, hlo, slices, step_report
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config
from tests.helpers.document_stand_ins import kept_programs

# Of a program that libtpu compiled for two slices of four chips.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (state: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %state = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%state), index=0
  %v = f32[16,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %after-all.1 = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.4_0"}
  %reduce-scatter.1 = f32[4,128]{1,0:T(8,128)} reduce-scatter(%v), channel_id=2, replica_groups={{0,1,2,3}}, \
use_global_device_ids=true, dimensions={0}, to_apply=%add
  %send.1 = (f32[4,128]{1,0:T(8,128)}, u32[], token[]) send(%reduce-scatter.1, %after-all.1), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="all-reduce.4_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[4,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.4_0",\
_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %recv-done.1 = (f32[4,128]{1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=3, is_host_transfer=true
  %part = f32[4,128]{1,0:T(8,128)} get-tuple-element(%recv-done.1), index=0
  %all-gather.1 = f32[16,128]{1,0:T(8,128)} all-gather(%part), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, \
use_global_device_ids=true
  ROOT %again = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) tuple(%n, %all-gather.1)
}

%condition (state.1: (s32[], f32[16,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(10)
  %n.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %more = pred[]{:T(512)} compare(%n.1, %limit), direction=LT
}

ENTRY %main (p: f32[16,128]) -> f32[16,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) tuple(%zero, %p)
  %loop = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %v.1 = f32[16,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %all-reduce.2 = f32[16,128]{1,0:T(8,128)} all-reduce(%v.1), channel_id=7, replica_groups={}, to_apply=%add
}
"""


def test_transfers_between_slices_are_told_from_collectives_inside_them():
    inside, between = slices.split_collectives(hlo.parse(TPU), 4)
    assert inside == {
        "reduce-scatter": {"count": 1, "bytes": 16 * 128 * 4, "in_loops": 1},
        "all-gather": {"count": 1, "bytes": 16 * 128 * 4, "in_loops": 1},
        "all-reduce": {"count": 1, "bytes": 16 * 128 * 4, "in_loops": 0},  # of all devices of the program, one slice
    }
    part = 4 * 128 * 4
    row = {"count": 1, "bytes": part, "in_loops": 1, "executions": 10, "executed_bytes": 10 * part}
    assert between == {"all-reduce": row}


def test_a_transfer_counts_the_larger_of_what_it_sends_and_receives():
    text = TPU.replace("%recv.1 = (f32[4,128]", "%recv.1 = (f32[8,128]").replace('"ALL_REDUCE"', '"ALL_GATHER"')
    _, between = slices.split_collectives(hlo.parse(text), 4)
    assert list(between) == ["all-gather"]
    assert between["all-gather"]["bytes"] == 8 * 128 * 4


def test_a_collective_of_devices_of_several_slices_is_between_them():
    """Four slices of one chip: every collective is between slices."""
    inside, between = slices.split_collectives(hlo.parse(TPU), 1)
    assert inside == {}
    assert {kind: row["count"] for kind, row in between.items()} == {
        "reduce-scatter": 1,
        "all-gather": 1,
        "all-reduce": 2,
    }


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", []),
        ("{{0,1,2,3}}", [[0, 1, 2, 3]]),
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[4,2]<=[2,2,2]T(1,2,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("[4,2]<=[2,2,2]T(2,0,1)", [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_groups_of_devices(text, groups):
    assert slices.parse_groups(text) == groups


@pytest.mark.parametrize("text", ["@mesh", "[2,4]", "{0,1}", "[2,4]<=[8]T(x)"])
def test_an_unknown_format_of_groups_is_an_error(text):
    with pytest.raises(ValueError, match="Unknown format|invalid literal"):
        slices.parse_groups(text)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_groups_of_compiled_programs_are_those_of_the_mesh(axes):
    """The sum over some axes of a mesh of 2 x 2 x 2 devices, in the format of this version of XLA."""
    names = ("a", "b", "c")
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
    split = NamedSharding(mesh, PartitionSpec(tuple(names[axis] for axis in axes)))
    array = jax.ShapeDtypeStruct((64,), np.float32, sharding=split)
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    module = hlo.parse(total.lower(array).compile().as_text())
    assert module.partitions == 8
    (found,) = [slices.parse_groups(i.devices) for _, i in module if i.opcode == "all-reduce"]
    numbers = np.arange(8).reshape(2, 2, 2)
    rest = [axis for axis in range(3) if axis not in axes]
    expected = numbers.transpose(*rest, *axes).reshape(-1, 2 ** len(axes)).tolist()
    assert sorted(map(sorted, found)) == sorted(expected)
    inside, between = slices.split_collectives(module, 4)
    assert bool(between) == (0 in axes)
    assert bool(inside) == (0 not in axes)


@pytest.mark.slow
def test_report_for_groups_of_this_machine():
    """Eight virtual devices in two groups: the compiler for CPUs sums over all of them at once."""
    config = tiny_config.get_config(stages=("D",)).unlock()
    config.mesh.slices = 2
    report = step_report.compile_report(config, topology="cpu", steps=("train",))
    train = report["steps"]["train"]
    assert (report["slices"], report["chips"], train["batch_size_per_chip"]) == (2, 8, 2)
    assert train["collectives"] == {}
    between = train["collectives_between_slices"]["all-reduce"]
    assert between["executed_bytes"] == between["bytes"] >= train["memory"]["parameters"]
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    command.print_report(console, report)
    console.file.close()
    text = console.export_text()
    assert "float32, for 8 x cpu in 2 slices" in text
    assert re.search(r"collectives inside a slice +none", text)
    assert re.search(rf"collectives between slices +all-reduce {between['count']}, \d+\.\d MB", text)
    assert re.search(rf"between slices, with all iterations +{between['executions']}, \d+\.\d\d MB", text)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("fsdp", [1, 4])
def test_report_for_two_slices_of_tpus(fsdp):
    """Gradients are summed inside each slice first, so that each chip sends its part of the sum to the other slice."""
    config = tiny_config.get_config(stages=("D",), dtype="auto", dim_stem=128, dims=(128,), num_heads=(4,)).unlock()
    config.mesh.fsdp = fsdp
    with kept_programs(None):  # jax cannot read a program for devices that are not attached from its cache
        report = step_report.compile_report(config, topology="v5e:2x2", slices=2, steps=("train",))
    assert (report["slices"], report["chips"]) == (2, 8)
    train = report["steps"]["train"]
    between = train["collectives_between_slices"]
    assert set(between) == {"all-reduce"}
    assert between["all-reduce"]["executions"] >= between["all-reduce"]["count"]
    assert "reduce-scatter" in train["collectives"]
    # A quarter of the gradients, in bfloat16 or float32, some of them padded.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(Trainer(config).abstract_state.params))
    assert 2 * parameters / 4 < between["all-reduce"]["bytes"] < 4 * parameters / 4
