"""Parsing compiled programs, on excerpts of the output of the TPU and CPU compilers."""

import pytest

from dat_jax.profiling import hlo

TPU = """HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(bf16[64,32]{1,0:T(8,128)(2,1)})->f32[64]{0}}

FileNames
1 "step.py"

%region_0.1 (lhs.1: f32[], rhs.1: f32[]) -> f32[] {
  %lhs.1 = f32[]{:T(128)} parameter(0)
  %rhs.1 = f32[]{:T(128)} parameter(1)
  ROOT %add.3 = f32[]{:T(128)} add(%lhs.1, %rhs.1)
}

%fused_computation.2.clone (param_0.64: bf16[64,32], param_1.7: s32[5,1]) -> bf16[5,32] {
  %param_0.64 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.7 = s32[5,1]{1,0:T(8,128)} parameter(1)
  ROOT %gather.4 = bf16[5,32]{1,0:T(8,128)(2,1)} gather(%param_0.64, %param_1.7), offset_dims={1}, collapsed_slice_dims={0}, \
start_index_map={0}, index_vector_dim=1, slice_sizes={1,32}, metadata={op_name="jit(train_step)/jvp(DAT)/DAT.features/\
stages_0/blocks_1/attn/position_bias/gather" stack_frame_id=14}
}

%wide.body (arg_tuple.3: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg_tuple.3 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg_tuple.3), index=0
  %gte.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg_tuple.3), index=1
  %all-gather-start.1 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[256,32]{1,0:T(8,128)(2,1)}) all-gather-start(%gte.1), \
channel_id=3, replica_groups=[1,4]<=[4], dimensions={0}
  %all-gather-done.1 = bf16[256,32]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start.1)
  %slice.9 = bf16[64,32]{1,0:T(8,128)(2,1)} slice(%all-gather-done.1), slice={[0:64], [0:32]}, metadata={op_name=\
"jit(train_step)/transpose(jvp(DAT))/DAT.features/stages_2/while/body/closed_call/blocks_3/mlp/slice"}
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%gte.0, %slice.9)
}

%wide.condition (arg_tuple.4: (s32[], bf16[64,32])) -> pred[] {
  %constant.88 = s32[]{:T(128)} constant(10)
  %arg_tuple.4 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.2 = s32[]{:T(128)} get-tuple-element(%arg_tuple.4), index=0
  ROOT %lt.11 = pred[]{:T(512)} compare(%gte.2, %constant.88), direction=LT
}

ENTRY %main.5 (x.1: bf16[64,32], i.1: s32[5,1]) -> f32[64] {
  %x.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[4,1]<=[4]}, metadata={op_name="batch['image']"}
  %i.1 = s32[5,1]{1,0:T(8,128)} parameter(1)
  %copy-start.2 = (bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, bf16[64,32]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x.1)
  %copy-done.2 = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.2)
  %fusion.1 = bf16[5,32]{1,0:T(8,128)(2,1)} fusion(%copy-done.2, %i.1), kind=kLoop, calls=%fused_computation.2.clone, \
metadata={op_name="jit(train_step)/jvp(DAT)/DAT.features/stages_0/blocks_1/attn/position_bias/gather" stack_frame_id=14}
  %zero.1 = s32[]{:T(128)} constant(0)
  %tuple.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) tuple(%zero.1, %x.1)
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)}) while(%tuple.1), condition=%wide.condition, body=%wide.body
  %gte.3 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
  %convert.7 = f32[64,32]{0,1:T(8,128)} convert(%gte.3)
  %b.1 = f32[64]{0:T(128)} constant({...})
  %all-reduce.1 = (f32[64,32]{0,1:T(8,128)}, /*index=1*/f32[64]{0:T(128)}) all-reduce(%convert.7, %b.1), channel_id=1, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%region_0.1
  ROOT %out.1 = f32[64]{0:T(128)} get-tuple-element(%all-reduce.1), index=1
}
"""

CPU = """HloModule jit_f

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (t: (s32[], f32[7])) -> (s32[], f32[7]) {
  %t = (s32[], f32[7]{0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %v = f32[7]{0} get-tuple-element(%t), index=1
  %negate.1 = f32[7]{0} negate(%v)
  ROOT %again = (s32[], f32[7]{0}) tuple(%n, %negate.1)
}

%cond.1 (u: (s32[], f32[7])) -> pred[] {
  %u = (s32[], f32[7]{0}) parameter(0)
  ROOT %p = pred[] custom-call(%u), custom_call_target="keep_going"
}

ENTRY %main.9 (table: f32[7], rows: s32[2401,1], values: f32[2401]) -> f32[7] {
  %table = f32[7]{0} parameter(0)
  %rows = s32[2401,1]{1,0} parameter(1)
  %values = f32[2401]{0} parameter(2)
  %scatter.8 = f32[7]{0} scatter(%table, %rows, %values), update_window_dims={}, inserted_window_dims={0}, \
scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add.1, metadata={op_name="jit(f)/scatter-add"}
  %zero = s32[] constant(0)
  %in = (s32[], f32[7]{0}) tuple(%zero, %scatter.8)
  %while.2 = (s32[], f32[7]{0}) while(%in), condition=%cond.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %last = f32[7]{0} get-tuple-element(%while.2), index=1
}
"""


def test_bytes_of_shapes_are_padded_by_tiles_in_the_order_of_the_layout():
    entry = hlo.parse(TPU).computations["main.5"]
    (x,) = entry["x.1"].shapes
    assert (str(x), x.bytes, x.padded_bytes, x.on_chip) == ("bf16[64,32]", 64 * 32 * 2, 64 * 128 * 2, False)
    (transposed,) = entry["convert.7"].shapes  # here the first axis is the innermost one
    assert transposed.padded_bytes == 128 * 32 * 4
    assert entry["copy-done.2"].shapes[0].on_chip
    assert entry["zero.1"].shapes[0].bytes == 4


def test_tuples_calls_and_names_are_parsed():
    module = hlo.parse(TPU)
    entry = module.computations[module.entry]
    assert list(map(str, entry["all-reduce.1"].shapes)) == ["f32[64,32]", "f32[64]"]
    assert entry["all-reduce.1"].operands == ("convert.7", "b.1")
    assert entry["while.1"].called == {"condition": ("wide.condition",), "body": ("wide.body",)}
    assert entry["x.1"].op_name == "batch['image']"
    assert entry["out.1"].opcode == "get-tuple-element"


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 10), ("s4", 5), ("f8e4m3fn", 10), ("bf16", 20), ("c64", 80), ("token", 0)]
)
def test_sizes_of_dtypes(dtype, size):
    text = f"ENTRY %main (p: f32[]) -> f32[] {{\n  ROOT %p = {dtype}[2,5]{{1,0}} parameter(0)\n}}\n"
    assert hlo.parse(text).computations["main"]["p"].shapes[0].bytes == size


def test_asynchronous_collectives_count_once():
    assert hlo.collectives(hlo.parse(TPU)) == {
        "all-gather": {"count": 1, "bytes": 256 * 32 * 2, "in_loops": 1},
        "all-reduce": {"count": 1, "bytes": 64 * 32 * 4 + 64 * 4, "in_loops": 0},
    }
    assert hlo.collectives(hlo.parse(CPU)) == {}


def test_the_pieces_of_a_collective_in_several_fusions_count_once():
    piece = """%{0} (p.{0}: f32[2,8]) -> f32[8,8] {{
  %p.{0} = f32[2,8]{{1,0}} parameter(0)
  ROOT %g.{0} = f32[8,8]{{1,0}} all-gather(%p.{0}), channel_id=3, dimensions={{0}}, frontend_attributes={{chain_id="{1}"}}
}}
"""
    pieces = "".join(piece.format(name, chain) for name, chain in (("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1)))
    counted = hlo.collectives(hlo.parse(TPU.replace("%region_0.1", pieces + "%region_0.1", 1)))["all-gather"]
    assert counted == {"count": 3, "bytes": 256 * 32 * 2 + 2 * 8 * 8 * 4, "in_loops": 1}


def test_gathers_in_fusions_count_and_scatters_have_the_size_of_their_updates():
    gathers = hlo.count_indexed(hlo.parse(TPU), "gather")
    assert (gathers["count"], gathers["largest"], gathers["bytes"]) == (1, "bf16[5,32]", 320)
    assert gathers["op_name"].endswith("position_bias/gather")
    assert hlo.count_indexed(hlo.parse(TPU), "scatter")["count"] == 0
    scatters = hlo.count_indexed(hlo.parse(CPU), "scatter")
    assert (scatters["count"], scatters["bytes"]) == (1, 2401 * 4)


def test_trip_counts_come_from_the_compiler_or_the_condition():
    tpu, cpu = hlo.parse(TPU), hlo.parse(CPU)
    assert hlo.trip_count(tpu, tpu.computations["main.5"]["while.1"]) == 10
    assert hlo.trip_count(cpu, cpu.computations["main.9"]["while.2"]) == 3
    unknown = hlo.parse(CPU.replace("known_trip_count", "other"))
    assert hlo.trip_count(unknown, unknown.computations["main.9"]["while.2"]) is None
    assert hlo.traffic(unknown)[0]["negate"]["ops"] == 1
    assert hlo.loops(tpu) == {"wide.body", "wide.condition"}


def test_traffic_by_op_and_by_module_counts_iterations_of_loops():
    by_opcode, by_path = hlo.traffic(hlo.parse(TPU))
    plain, padded = 64 * 32 * 2, 64 * 128 * 2
    # The copy reads from HBM and writes to on-chip memory, where the fusion reads its table; the rest of it is in HBM.
    assert by_opcode["copy-start"] == {
        "ops": 1,
        "bytes": 2 * plain + 4,
        "padded_bytes": 2 * padded + 4,
        "hbm_bytes": padded + 4,
    }
    assert by_opcode["fusion of gather"] == {
        "ops": 1,
        "bytes": plain + 5 * 4 + 5 * 32 * 2,
        "padded_bytes": padded + 8 * 128 * 4 + 8 * 128 * 2,
        "hbm_bytes": 8 * 128 * 4 + 8 * 128 * 2,
    }
    assert by_opcode["slice"]["ops"] == 10
    assert by_opcode["slice"]["bytes"] == 10 * 2 * plain  # only the part that is taken, a quarter of the operand
    # Instructions that the compiler inserted have no name and belong to the module of their user.
    assert by_path["stages_2/blocks_3/mlp"] == by_opcode["slice"] + by_opcode["all-gather-start"]
    assert by_path["stages_0/blocks_1/attn"] == by_opcode["fusion of gather"] + by_opcode["copy-start"]
    assert by_path["(no name)"]["ops"] == 12  # the conversion and the sum at the end, and ten comparisons
    assert not {"while", "tuple", "parameter", "constant", "copy-done", "add"} & by_opcode.keys()
    assert sum(c["bytes"] for c in by_opcode.values()) == sum(c["bytes"] for c in by_path.values())


@pytest.mark.parametrize(
    ("op_name", "path"),
    [
        (
            "jit(train_step)/transpose(jvp(DAT))/DAT.features/stages_0/blocks_1/attn/proj/dot_general",
            "stages_0/blocks_1/attn",
        ),
        ("jit(step)/jvp(DAT)/stages_3/blocks_0/attn/jit(_where)/reduce_sum", "stages_3/blocks_0/attn"),
        (
            "jit(step)/transpose(jvp(DAT))/DAT.features/stages_0/jvp(DAT)/DAT.features/stages_0/checkpoint/blocks_1/attn/add",
            "stages_0/blocks_1/attn",
        ),
        ("jit(step)/transpose(jvp(DAT))/stages_2/while/body/eval_jaxpr/mlp/checkpoint/add", "stages_2/mlp"),
        ("jit(train_step)/make_train_step.<locals>.train_step/add", "(outside the model)"),
        ("", "(no name)"),
    ],
)
def test_module_paths(op_name, path):
    assert hlo.module_path(op_name) == path


STACKS = """HloModule jit_scan

%fused (p.0: f32[9,8,128], p.1: f32[9,8,128], p.2: s32[], p.3: f32[8,128]) -> (f32[9,8,128], f32[8,128]) {
  %p.0 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = f32[9,8,128]{2,1,0:T(8,128)} parameter(1)
  %p.2 = s32[]{:T(128)} parameter(2)
  %p.3 = f32[8,128]{1,0:T(8,128)S(1)} parameter(3)
  %zero.0 = s32[]{:T(128)} constant(0)
  %taken = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.1, %p.2, %zero.0, %zero.0), dynamic_slice_sizes={1,8,128}
  %row = f32[8,128]{1,0:T(8,128)} bitcast(%taken)
  %sum.0 = f32[8,128]{1,0:T(8,128)S(1)} add(%row, %p.3)
  %update = f32[1,8,128]{2,1,0:T(8,128)S(1)} bitcast(%sum.0)
  %stack = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.0, %update, %p.2, %zero.0, %zero.0)
  ROOT %both = (f32[9,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%stack, %sum.0)
}

ENTRY %main (a: f32[9,8,128], b: f32[9,8,128], i: s32[], c: f32[8,128]) -> f32[9,8,128] {
  %a = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[9,8,128]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %c = f32[8,128]{1,0:T(8,128)S(1)} parameter(3)
  %fusion.0 = (f32[9,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) fusion(%a, %b, %i, %c), kind=kLoop, calls=%fused
  %stack.0 = f32[9,8,128]{2,1,0:T(8,128)} get-tuple-element(%fusion.0), index=0
  %row.0 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%fusion.0), index=1
  %row.1 = f32[1,8,128]{2,1,0:T(8,128)S(1)} bitcast(%row.0)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %last = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%stack.0, %row.1, %i, %zero.1, %zero.1)
}
"""


def test_slices_of_stacks_count_only_the_part_that_is_taken_or_replaced():
    """The fusion reads a row of one stack and writes a row of another in place, as loops over blocks do."""
    row, stack, index = 8 * 128 * 4, 9 * 8 * 128 * 4, 4
    by_opcode, _ = hlo.traffic(hlo.parse(STACKS))
    fusion, update = by_opcode["fusion of elementwise ops"], by_opcode["dynamic-update-slice"]
    assert fusion["bytes"] == 4 * row + index  # a row and c are read, a row of the stack and the sum are written
    assert fusion["hbm_bytes"] == 2 * row + index
    assert update["bytes"] == 2 * row + 3 * index
    assert update["hbm_bytes"] == row + 3 * index

    # An array that is used again cannot be replaced in place.
    text = STACKS.replace("fusion(%a, %b, %i, %c)", "fusion(%a, %a, %i, %c)")
    assert hlo.traffic(hlo.parse(text))[0]["fusion of elementwise ops"]["bytes"] == 2 * stack + 3 * row + index
    text = STACKS.replace("bitcast(%taken)", "bitcast(%p.1)")
    counts = hlo.traffic(hlo.parse(text))[0]["fusion of elementwise ops"]  # the whole of the second stack is read
    assert counts["bytes"] == stack + 3 * row + index


def test_text_without_an_entry_computation_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")
