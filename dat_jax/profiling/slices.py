"""Collectives of a program for several slices of TPUs: those inside a slice, and those between slices.

The compiler for TPUs makes one program per slice. It writes an operation between slices as a pair of "send" and "recv", which
the hosts carry out over the network of the data center, and the rest of the operation as collectives inside a slice: the sum
of an array over all devices can be a reduce-scatter inside the slice, a sum of the parts between slices and an all-gather inside
the slice. Other compilers write one collective whose devices are in several slices.
"""

import itertools
import re
from collections.abc import Callable

import numpy as np

from dat_jax.profiling import hlo

_LISTS = re.compile(r"\{(?:\{[\d,]*\},?)*\}")
_RANGE = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{(.*)\}")


def parse_groups(text: str) -> list[list[int]]:
    """Parse the groups of devices that take part in a collective, in any of the three formats of XLA.

    Args:
      text: replica groups, or pairs of source and target. As lists: "{{0,1},{2,3}}". As the numbers from 0 in a shape, transposed
        and then in groups: "[2,4]<=[4,2]T(1,0)" has two groups of four. As axes of a mesh: "mesh['a'=2,'b'=4] {'b'}" has
        two groups of four, and the devices of the mesh are in the order of "device_ids" if it has any.

    Returns:
      The indices of the devices of each group; an empty list stands for one group of all devices.

    Raises:
      ValueError: the text has another format.
    """
    if _LISTS.fullmatch(text):
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text[1:-1])]
    if match := _MESH.fullmatch(text):
        return _parse_mesh_groups(*match.groups())
    shape, _, order = text.partition("<=")
    if order and (sizes := _RANGE.fullmatch(shape)):
        return _parse_order(order).reshape(_numbers(sizes[1])).tolist()
    raise ValueError(f"Unknown format of the devices of a collective: {text!r}.")


def _parse_mesh_groups(axes: str, order: str | None, references: str) -> list[list[int]]:
    """Groups of devices along axes, or along parts of axes: 'a':(2)4 is the part of size 4 after one of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^':]+)'?(?::\((\d+)\)(\d+))?", references)
    shape, grouped = [], []
    for name, size in sizes.items():
        spans = [
            (int(before), int(before) * int(part)) if part else (1, size)
            for axis, before, part in parts
            if axis == name
        ]
        for low, high in itertools.pairwise(sorted({1, size, *itertools.chain(*spans)})):
            shape.append(high // low)
            grouped.append(any(start <= low and high <= stop for start, stop in spans))
    devices = _parse_order(order or f"[{np.prod(list(sizes.values()))}]").reshape(shape)
    devices = devices.transpose(np.argsort(grouped, kind="stable"))
    return devices.reshape(
        -1, int(np.prod([size for size, inside in zip(shape, grouped, strict=True) if inside]))
    ).tolist()


def _parse_order(text: str) -> np.ndarray:
    """An order of devices: numbers, or the numbers from 0 in a shape, which may be transposed."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return np.array(_numbers(text))
    shape = _numbers(match[1])
    return np.arange(np.prod(shape)).reshape(shape).transpose(_numbers(match[2]) if match[2] else None).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def split_collectives(module: hlo.Module, slice_size: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """Collectives of a program for several slices, by kind.

    Args:
      module: the program. It numbers devices by slice.
      slice_size: number of devices of a slice.

    Returns:
      Two tables, of the collectives inside a slice and of those between slices, see ``hlo.collectives``. "bytes" of an operation
      between slices are those that one device sends or receives, whichever is more. The rows of the second table also have
      "executions" and "executed_bytes", which include all iterations of loops.

    Raises:
      ValueError: the devices of a collective are written in an unknown format.
    """

    def between(instruction: hlo.Instruction) -> bool:
        groups = parse_groups(instruction.devices or "{}") or [range(module.partitions)]
        return any(len({device // slice_size for device in group}) > 1 for group in groups)

    inside = hlo.collectives(module, select=lambda instruction: not between(instruction))
    return inside, _tabulate_between(module, between)


def _tabulate_between(module: hlo.Module, between: Callable[[hlo.Instruction], bool]) -> dict[str, dict[str, int]]:
    in_loops, table = hlo.loops(module), {}
    times = {id(instruction): count for _, instruction, count in hlo.executed(module)}
    received = {
        instruction.transfer: _transfer_bytes(instruction)
        for _, instruction in module
        if instruction.opcode == "recv" and instruction.transfer
    }
    for name, instruction in module:
        kind = instruction.opcode.removesuffix("-start")
        if kind == "send" and instruction.transfer:
            kind = instruction.transfer[0]
            size = max(_transfer_bytes(instruction), received.get(instruction.transfer, 0))
        elif kind in hlo.COLLECTIVES and between(instruction):
            size = hlo.collective_bytes(instruction, module.computations[name])
        else:
            continue
        row = table.setdefault(kind, {"count": 0, "bytes": 0, "in_loops": 0, "executions": 0, "executed_bytes": 0})
        executions = times.get(id(instruction), 1)
        row["count"] += 1
        row["bytes"] += size
        row["in_loops"] += name in in_loops
        row["executions"] += executions
        row["executed_bytes"] += executions * size
    return table


def _transfer_bytes(instruction: hlo.Instruction) -> int:
    """Bytes of the arrays of a "send" or "recv". Its result ends with the context of the transfer and a token."""
    return sum(shape.bytes for shape in instruction.shapes[:-2])
