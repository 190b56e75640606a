"""What stands in the text of a compiled program (HLO, as ``compiled.as_text()`` gives it): ops, shapes, bytes.

"bytes" are those of the shapes. A TPU stores arrays in tiles, written T(8,128) in the text, and a last axis of 32 takes four
times its bytes: those are "padded bytes". Arrays that the compiler keeps in the chip's own memory, S(1), are not in its HBM.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Ops that move nothing, or whose bytes are counted at the ops inside or at their "-start".
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "opt-barrier"),
}
_SLICES = {"slice", "slice-start", "dynamic-slice"}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast"}  # custom calls of a TPU's compiler
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")  # dtype[dims]{order:layout}
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(\w+)=(?:%([\w.\-]+)|\{(%[^{}]*)\})")
_STRUCTURE = {
    "while",
    "body",
    "cond",
    "closed_call",
    "scan",
    "checkpoint",
    "rematted_computation",
    "remat",
    "shard_map",
}
_MODULE_DEPTH = 3  # stages_0/blocks_1/attn


class Shape(NamedTuple):
    """Of an array: dtype as HLO names it, dims its sizes, stored_dims with a tile's padding, whether it is outside HBM."""

    dtype: str
    dims: tuple[int, ...]
    stored_dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Without padding; tokens have none."""
        return _count_bytes(self.dtype, self.dims)

    @property
    def padded_bytes(self) -> int:
        """As it is stored."""
        return _count_bytes(self.dtype, self.stored_dims)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _count_bytes(dtype, dims) -> int:
    digits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    return math.ceil(math.prod(dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      shapes: of its result; several where it is a tuple.
      operands: names of instructions of the same computation.
      called: attribute (calls, body, to_apply, ...) -> names of computations.
      op_name: where it comes from in the traced program, or "".
      target: of a custom call, or "".
      literal: of a constant, as written, or "".
      trip_count: of a loop where the compiler wrote it, or None.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    called: Mapping[str, tuple[str, ...]]
    op_name: str
    target: str = ""
    literal: str = ""
    trip_count: int | None = None


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: name -> its instructions by name; entry: the name of the one that is run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) of all computations, those of fusions included."""
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                yield name, instruction


def parse(text: str) -> Module:
    """Reads the text of a module.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current[match[1]] = _parse_instruction(match[1], line[match.end() :])
    if entry is None:
        raise ValueError("The text has no ENTRY computation.")
    return Module(computations, entry)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Of "TYPE opcode(operands), attributes"."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    opcode, attributes = text[end:opening].strip(), text[closing:]
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    trips = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(_parse_shape(*parts) for parts in _SHAPE.findall(text[:end])),
        operands=tuple(_REFERENCE.findall(text[opening:closing])),
        called={
            key: (one,) if one else tuple(_REFERENCE.findall(several))
            for key, one, several in _CALLED.findall(attributes)
            if not key.startswith("control")
        },
        op_name=op_name[1] if op_name else "",
        target=target[1] if target else "",
        literal=text[opening + 1 : closing - 1] if opcode == "constant" else "",
        trip_count=int(trips[1]) if trips else None,
    )


def _parse_shape(dtype: str, dims: str, order: str, layout: str) -> Shape:
    """Of bf16[64,32]{1,0:T(8,128)(2,1)S(1)}: order is from the innermost axis out, the tile's sizes from the outermost in."""
    sizes = [int(size.strip("<=")) for size in dims.split(",") if size]
    stored = list(sizes)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        tile_sizes = map(int, reversed(tile[1].split(",")))
        for axis, size in zip((int(axis) for axis in order.split(",") if axis), tile_sizes, strict=False):
            stored[axis] = math.ceil(stored[axis] / size) * size
    return Shape(dtype, tuple(sizes), tuple(stored), on_chip="S(1)" in layout)


def _closing(text: str, opening: int) -> int:
    """Index after the bracket that closes the one at ``opening``; layouts such as {1,0:T(8,128)} have brackets too."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def result_shapes(instruction: Instruction, computation: Mapping[str, Instruction]) -> list[Shape]:
    """What an op makes. The result of a "-start" names its operands again, but for an all-reduce's; they are left out."""
    shapes = list(instruction.shapes)
    if instruction.target.startswith(("__cublas", "__cudnn")):
        return shapes[:1]  # the other one is room to work in
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        for operand in operand_shapes(instruction, computation):
            if operand in shapes:
                shapes.remove(operand)
    return shapes


def operand_shapes(instruction: Instruction, computation: Mapping[str, Instruction]) -> list[Shape]:
    """What an op reads, each operand whole."""
    operands = (computation[name] for name in instruction.operands if name in computation)
    return [shape for operand in operands for shape in operand.shapes]


def loops(module: Module) -> set[str]:
    """Names of the computations that run in a while loop, bodies, conditions and what they call."""
    found: set[str] = set()
    waiting = [
        name
        for _, instruction in module
        if instruction.opcode == "while"
        for key in ("body", "condition")
        for name in instruction.called.get(key, ())
    ]
    while waiting:
        name = waiting.pop()
        if name not in found and name in module.computations:
            found.add(name)
            waiting += [n for i in module.computations[name].values() for names in i.called.values() for n in names]
    return found


def collectives(module: Module) -> dict[str, dict[str, int]]:
    """Kind -> {"count", "bytes", "in_loops"}; bytes of operands or of results, whichever are more.

    A "-start" counts and its "-done" does not. One in a loop counts once, however often it runs; in_loops says how many.
    """
    inside, found = loops(module), {}
    for name, instruction in module:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            computation = module.computations[name]
            row = found.setdefault(kind, {"count": 0, "bytes": 0, "in_loops": 0})
            row["count"] += 1
            both = operand_shapes(instruction, computation), result_shapes(instruction, computation)
            row["bytes"] += max(sum(shape.bytes for shape in shapes) for shapes in both)
            row["in_loops"] += name in inside
    return found


def count_indexed(module: Module, opcode: str) -> dict:
    """How many "gather" or "scatter" ops there are, those in fusions included, and the largest.

    Returns:
      {"count", "largest": its shape as text or "", "bytes": of it, "op_name": where it comes from}. The size of a gather
      is that of its result, of a scatter that of its updates or its result.
    """
    sizes = []
    for name, instruction in module:
        if instruction.opcode == opcode:
            shapes = list(instruction.shapes)
            if opcode == "scatter":
                shapes += operand_shapes(instruction, module.computations[name])
            sizes.append((max(shapes, key=lambda shape: shape.bytes), instruction.op_name))
    if not sizes:
        return {"count": 0, "largest": "", "bytes": 0, "op_name": ""}
    largest, op_name = max(sizes, key=lambda size: size[0].bytes)
    return {"count": len(sizes), "largest": str(largest), "bytes": largest.bytes, "op_name": op_name}


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs: as the compiler says, or the one number that its condition compares with, else None."""
    if loop.trip_count is not None:
        return loop.trip_count
    condition = [i for name in loop.called.get("condition", ()) for i in module.computations[name].values()]
    limits = [i.literal for i in condition if i.opcode == "constant" and i.literal.isdecimal()]
    return int(limits[0]) if len(limits) == 1 else None


def executed(module: Module) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int]]:
    """(computation, op, how often it runs) of every op that moves data, in the entry and in loops, calls and branches.

    A fusion is one op; what is fused into it is not given. Of a conditional every branch is.
    """
    waiting = [(module.entry, 1)]
    while waiting:
        name, times = waiting.pop()
        computation = module.computations[name]
        for instruction in computation.values():
            if instruction.opcode in ("while", "call", "conditional"):
                inner = times * ((trip_count(module, instruction) or 1) if instruction.opcode == "while" else 1)
                names = [name for names in instruction.called.values() for name in names]
                waiting += [(name, inner) for name in names if name in module.computations]
            moves = instruction.opcode not in _FREE and not instruction.opcode.endswith("-done")
            if moves and instruction.target not in _FREE_TARGETS:
                yield computation, instruction, times


def traffic(module: Module) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """What ops read and write, operands and results whole (of a slice what it takes), by kind of op and by place.

    An op in a loop counts as often as the loop runs, or once where that is not known.

    Returns:
      opcode -> counts, and module path -> the same counts: "ops", "bytes", "padded_bytes", "hbm_bytes" (padded, without
      arrays that are on the chip).
    """
    by_opcode, by_path = defaultdict(Counter), defaultdict(Counter)
    origins = {id(computation): _origins(computation) for computation in module.computations.values()}
    for computation, instruction, times in executed(module):
        made, read = result_shapes(instruction, computation), operand_shapes(instruction, computation)
        if instruction.opcode in _SLICES:
            read = [shape._replace(on_chip=read[0].on_chip) for shape in made]
        shapes = [*read, *made]
        counts = {
            "ops": times,
            "bytes": times * sum(shape.bytes for shape in shapes),
            "padded_bytes": times * sum(shape.padded_bytes for shape in shapes),
            "hbm_bytes": times * sum(shape.padded_bytes for shape in shapes if not shape.on_chip),
        }
        by_opcode[describe_opcode(module, instruction)].update(counts)
        by_path[module_path(origins[id(computation)][instruction.name])].update(counts)
    return dict(by_opcode), dict(by_path)


def _origins(computation: Mapping[str, Instruction]) -> dict[str, str]:
    """Instruction -> op_name. A copy that the compiler made has none: it has that of what uses it, or else of what made it."""
    shared = {"parameter", "constant", "tuple", "while"}  # their users have nothing to do with each other
    names = {i.name: i.op_name for i in computation.values() if i.opcode not in shared}
    for instruction in reversed(computation.values()):  # uses come after what they use
        for operand in instruction.operands:
            if names.get(operand) == "":
                names[operand] = names.get(instruction.name, "")
    for instruction in computation.values():
        if names.get(instruction.name) == "":
            made_by = (names.get(operand) for operand in instruction.operands)
            names[instruction.name] = next(filter(None, made_by), "")
    return names


def describe_opcode(module: Module, instruction: Instruction) -> str:
    """The opcode, with what a fusion is around or a custom call's target: "fusion of convolution"."""
    if instruction.opcode == "custom-call":
        return f"custom-call {instruction.target}".strip()
    if instruction.opcode != "fusion":
        return instruction.opcode
    inside = {i.opcode for name in instruction.called.get("calls", ()) for i in module.computations[name].values()}
    around = ("convolution", "dot", "custom-call", "scatter", "gather", "sort", "reduce-window", "reduce", "transpose")
    kind = next((opcode for opcode in around if opcode in inside), "")
    return f"fusion of {kind or 'elementwise ops'}"


def module_path(op_name: str, *, depth: int = _MODULE_DEPTH) -> str:
    """jit(train_step)/transpose(jvp(DAT))/DAT.features/stages_0/blocks_1/attn/proj/dot_general -> stages_0/blocks_1/attn.

    depth: how many names of modules at most.
    """
    if not op_name:
        return "(no name)"
    parts = re.sub(r"\bjit\([^()]*\)", "", op_name).split("/")[:-1]  # without the primitive
    names = [p for p in parts if p[:1].islower() and not set("(.") & set(p) and p not in _STRUCTURE]  # not classes
    return "/".join(names[:depth]) or "(outside the model)"
