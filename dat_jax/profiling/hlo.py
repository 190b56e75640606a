"""Ops, shapes and bytes of a compiled program, parsed from the text of its HLO module (``compiled.as_text()``).

"bytes" follow from dtype and shape. "padded bytes" are those in memory: a TPU stores arrays in tiles, written as T(8,128), so
that a last axis of 32 takes four times its bytes. Arrays in on-chip memory, marked S(1), are not in HBM.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Ops that move no data, or whose bytes are counted at the ops inside them.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "opt-barrier"),
}
_SLICES = {"slice", "slice-start", "dynamic-slice"}
_FREE_TARGETS = {"AllocateBuffer", "ConcatBitcast"}  # custom calls of the TPU compiler that move no data
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")  # dtype[dims]{order:layout}
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(\w+)=(?:%([\w.\-]+)|\{(%[^{}]*)\})")
_DEVICES = re.compile(r"\b(?:replica_groups|source_target_pairs)=(mesh\[[^{]*\{[^}]*\}|\S+?)(?:,?\s|,?$)")
_TRANSFER = re.compile(r'_xla_host_transfer_rendezvous="([^"]*)".*_xla_megascale_transfer_type="([^"]*)"')
_STRUCTURE = {
    *("while", "body", "cond", "closed_call", "scan", "checkpoint", "rematted_computation", "remat", "shard_map"),
    "eval_jaxpr",  # in jax 0.12, around what is computed again
}
_MODULE_DEPTH = 3  # stages_0/blocks_1/attn


class Shape(NamedTuple):
    """Shape of an array.

    Attributes:
      dtype: HLO name of the dtype, such as "bf16".
      dims: sizes of the axes.
      stored_dims: sizes of the axes including the padding of tiles.
      on_chip: whether the array is in on-chip memory instead of HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    stored_dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        """Number of bytes without padding; 0 for tokens."""
        return _count_bytes(self.dtype, self.dims)

    @property
    def padded_bytes(self) -> int:
        """Number of bytes in memory, including the padding of tiles."""
        return _count_bytes(self.dtype, self.stored_dims)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def _count_bytes(dtype, dims) -> int:
    digits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s4
    bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
    return math.ceil(math.prod(dims) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: its unique name in the module.
      opcode: such as "fusion".
      shapes: shape of the result; several shapes if it is a tuple.
      operands: names of instructions in the same computation.
      called: attribute ("calls", "body", "to_apply", ...) -> names of the computations that it calls.
      op_name: its origin in the traced program, or "".
      target: target of a custom call, or "".
      literal: text of the value of a constant or of the number of a parameter, or "".
      trip_count: number of iterations of a loop according to the compiler, or None.
      devices: text of the groups, or pairs, of devices of a collective, or "".
      transfer: (kind of the collective, its name) of a "send" or "recv" to other slices, or empty.
      chain: number that the pieces of one collective in several fusions share, or "".
      is_root: whether its result is that of the computation.
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
    devices: str = ""
    transfer: tuple[str, ...] = ()
    chain: str = ""
    is_root: bool = False


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed HLO module.

    Attributes:
      computations: name of a computation -> its instructions by name.
      entry: name of the computation where execution starts.
      partitions: number of devices that run the module.
    """

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str
    partitions: int = 1

    def __iter__(self) -> Iterator[tuple[str, Instruction]]:
        """Pairs (name of the computation, instruction) of all computations, including those of fusions."""
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                yield name, instruction


def parse(text: str) -> Module:
    """Parse the text of an HLO module.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match[1], line[match.end() :])
            current[match[1]] = dataclasses.replace(instruction, is_root="ROOT " in match[0])
    if entry is None:
        raise ValueError("The text has no ENTRY computation.")
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _parse_instruction(name: str, text: str) -> Instruction:
    """Parse "TYPE opcode(operands), attributes"."""
    end = _find_closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _find_closing(text, opening)
    opcode, attributes = text[end:opening].strip(), text[closing:]
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    target = re.search(r'custom_call_target="([^"]*)"', attributes)
    trips = re.search(r"known_trip_count\W+n\W+(\d+)", attributes)
    devices = _DEVICES.search(attributes)
    chain = re.search(r'\bchain_id="(\d+)"', attributes)
    transfer = _TRANSFER.search(attributes) if opcode in ("send", "recv") else None
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(_parse_shape(*parts) for parts in _SHAPE.findall(text[:end])),
        operands=tuple(_REFERENCE.findall(text[opening:closing])),
        called={
            key: (single,) if single else tuple(_REFERENCE.findall(several))
            for key, single, several in _CALLED.findall(attributes)
            if not key.startswith("control")
        },
        op_name=op_name[1] if op_name else "",
        target=target[1] if target else "",
        literal=text[opening + 1 : closing - 1] if opcode in ("constant", "parameter") else "",
        trip_count=int(trips[1]) if trips else None,
        devices=devices[1] if devices else "",
        chain=chain[1] if chain else "",
        transfer=(transfer[2].lower().replace("_", "-"), transfer[1]) if transfer else (),
    )


def _parse_shape(dtype: str, dims: str, order: str, layout: str) -> Shape:
    """Parse the parts of a shape such as bf16[64,32]{1,0:T(8,128)(2,1)S(1)}.

    ``order`` lists axes from the innermost to the outermost, a tile its sizes from the outermost to the innermost.
    """
    sizes = [int(size.strip("<=")) for size in dims.split(",") if size]
    stored = list(sizes)
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        tile_sizes = map(int, reversed(tile[1].split(",")))
        for axis, size in zip((int(axis) for axis in order.split(",") if axis), tile_sizes, strict=False):
            stored[axis] = math.ceil(stored[axis] / size) * size
    return Shape(dtype, tuple(sizes), tuple(stored), on_chip="S(1)" in layout)


def _find_closing(text: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at ``opening``. Layouts such as {1,0:T(8,128)} are nested in it."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def result_shapes(instruction: Instruction, computation: Mapping[str, Instruction]) -> list[Shape]:
    """Shapes of the results of an instruction.

    The result of an asynchronous "-start" instruction, except that of an all-reduce, repeats the operands; they are omitted.
    """
    shapes = list(instruction.shapes)
    if instruction.target.startswith(("__cublas", "__cudnn")):
        return shapes[:1]  # the second result is a workspace
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        for operand in operand_shapes(instruction, computation):
            if operand in shapes:
                shapes.remove(operand)
    return shapes


def operand_shapes(instruction: Instruction, computation: Mapping[str, Instruction]) -> list[Shape]:
    """Shapes of the operands of an instruction."""
    operands = (computation[name] for name in instruction.operands if name in computation)
    return [shape for operand in operands for shape in operand.shapes]


def loops(module: Module) -> set[str]:
    """Names of the computations in while loops: bodies, conditions and the computations that they call."""
    names: set[str] = set()
    pending = [
        name
        for _, instruction in module
        if instruction.opcode == "while"
        for key in ("body", "condition")
        for name in instruction.called.get(key, ())
    ]
    while pending:
        name = pending.pop()
        if name not in names and name in module.computations:
            names.add(name)
            pending += [n for i in module.computations[name].values() for called in i.called.values() for n in called]
    return names


def collectives(
    module: Module, *, select: Callable[[Instruction], bool] = lambda instruction: True
) -> dict[str, dict[str, int]]:
    """Collective ops of a module by kind.

    A pair of "-start" and "-done" instructions counts once, and so does a collective that the TPU compiler distributes over
    several fusions to overlap it with their computation. A collective in a loop also counts once, whatever the number of
    iterations.

    Args:
      module: the module.
      select: whether a collective counts; by default all do.

    Returns:
      Kind -> {"count": number of ops, "bytes": the larger of operands and results, "in_loops": number of ops in loops}.
    """
    in_loops, table, chains = loops(module), {}, set()
    for name, instruction in module:
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES and select(instruction) and (kind, instruction.chain) not in chains:
            chains |= {(kind, instruction.chain)} if instruction.chain else set()
            row = table.setdefault(kind, {"count": 0, "bytes": 0, "in_loops": 0})
            row["count"] += 1
            row["bytes"] += collective_bytes(instruction, module.computations[name])
            row["in_loops"] += name in in_loops
    return table


def collective_bytes(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    """Bytes of the operands or of the results of a collective, whichever are more."""
    sides = operand_shapes(instruction, computation), result_shapes(instruction, computation)
    return max(sum(shape.bytes for shape in shapes) for shapes in sides)


def count_indexed(module: Module, opcode: str) -> dict:
    """Count the "gather" or "scatter" ops, including those in fusions, and find the largest one.

    The size of a gather is that of its result, the size of a scatter that of its largest operand or result.

    Returns:
      {"count", "largest": shape of the largest op as text, or "", "bytes": its size, "op_name": its origin}.
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
    """Number of iterations of a while loop, or None if it is unknown.

    It is that of the compiler, or the integer constant in the condition if there is exactly one.
    """
    if loop.trip_count is not None:
        return loop.trip_count
    condition = [i for name in loop.called.get("condition", ()) for i in module.computations[name].values()]
    limits = [i.literal for i in condition if i.opcode == "constant" and i.literal.isdecimal()]
    return int(limits[0]) if len(limits) == 1 else None


def executed(module: Module) -> Iterator[tuple[Mapping[str, Instruction], Instruction, int]]:
    """Ops that move data, in the entry computation and in loops, calls and all branches of conditionals.

    A fusion is one op; the ops inside it are not listed.

    Yields:
      (instructions of the computation, op, number of executions).
    """
    pending = [(module.entry, 1)]
    while pending:
        name, times = pending.pop()
        computation = module.computations[name]
        for instruction in computation.values():
            if instruction.opcode in ("while", "call", "conditional"):
                trips = (trip_count(module, instruction) or 1) if instruction.opcode == "while" else 1
                called = [name for names in instruction.called.values() for name in names]
                pending += [(name, times * trips) for name in called if name in module.computations]
            moves = instruction.opcode not in _FREE and not instruction.opcode.endswith("-done")
            if moves and instruction.target not in _FREE_TARGETS:
                yield computation, instruction, times


def traffic(module: Module) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Bytes that ops read and write, by opcode and by module.

    Operands and results count in full, except for slices, see ``accessed_shapes``. An op in a loop counts once per iteration,
    or once if the number of iterations is unknown.

    Returns:
      Two tables, opcode -> counts and module path -> counts. Counts are "ops", "bytes", "padded_bytes" and "hbm_bytes"
      (padded bytes without arrays in on-chip memory).
    """
    by_opcode, by_path = defaultdict(Counter), defaultdict(Counter)
    origins = {id(computation): _origins(computation) for computation in module.computations.values()}
    uses = {id(c): Counter(o for i in c.values() for o in i.operands) for c in module.computations.values()}
    for computation, instruction, times in executed(module):
        shapes = accessed_shapes(module, computation, instruction, uses[id(computation)])
        counts = {
            "ops": times,
            "bytes": times * sum(shape.bytes for shape in shapes),
            "padded_bytes": times * sum(shape.padded_bytes for shape in shapes),
            "hbm_bytes": times * sum(shape.padded_bytes for shape in shapes if not shape.on_chip),
        }
        by_opcode[describe_opcode(module, instruction)].update(counts)
        by_path[module_path(origins[id(computation)][instruction.name])].update(counts)
    return dict(by_opcode), dict(by_path)


def accessed_shapes(
    module: Module, computation: Mapping[str, Instruction], instruction: Instruction, uses: Mapping[str, int]
) -> list[Shape]:
    """Shapes of what an op reads and writes.

    These are its operands and results, with two exceptions, also inside of fusions:

    * A slice reads only the part that it takes.
    * A dynamic update slice of an array without another use works in place: it writes only the part that it replaces. Where the
      array is used again, the compiler inserts a copy, or the whole array counts as read and written.

    Args:
      module: the module.
      computation: the instructions of the computation of ``instruction``.
      instruction: the op.
      uses: how often each instruction of the computation is an operand.
    """
    results, operands = result_shapes(instruction, computation), operand_shapes(instruction, computation)
    if instruction.opcode in _SLICES:
        return [*(shape._replace(on_chip=operands[0].on_chip) for shape in results), *results]
    if instruction.opcode == "dynamic-update-slice" and uses[instruction.operands[0]] == 1:
        return [operands[1], operands[1]._replace(on_chip=results[0].on_chip), *operands[2:]]
    fused = module.computations.get(next(iter(instruction.called.get("calls", ())), ""))
    if instruction.opcode == "fusion" and fused and len(operands) == len(instruction.operands):
        return _fusion_shapes(fused, instruction, operands, results, uses)
    return [*operands, *results]


def _fusion_shapes(fused, instruction, operands, results, uses) -> list[Shape]:
    """``accessed_shapes`` of a fusion of the instructions ``fused``."""
    shapes, in_place = [], {}
    roots = _root_instructions(fused)
    parameters = {int(i.literal): i for i in fused.values() if i.opcode == "parameter"}
    for number, (name, shape) in enumerate(zip(instruction.operands, operands, strict=True)):
        users = _find_users(fused, parameters[number]) if number in parameters else []
        slices = [user for user, first in users if first and user.opcode in _SLICES]
        updates = [
            user for user, first in users if first and user.opcode == "dynamic-update-slice" and user.name in roots
        ]
        taken = [user.shapes[0]._replace(on_chip=shape.on_chip) for user in slices]
        is_partial = users and len(slices) + len(updates) == len(users) and (not updates or uses[name] == 1)
        if is_partial and sum(part.bytes for part in taken) <= shape.bytes:
            shapes += taken
            in_place |= {user.name: fused[user.operands[1]].shapes[0] for user in updates}
        else:
            shapes.append(shape)
    for root, result in zip(roots, results, strict=True) if len(roots) == len(results) else ():
        shapes.append(in_place[root]._replace(on_chip=result.on_chip) if root in in_place else result)
    return shapes if len(roots) == len(results) else [*operands, *results]


def _root_instructions(fused) -> list[str]:
    """Names of the instructions that compute the results of a fusion."""
    roots = [i for i in fused.values() if i.is_root]
    if roots and roots[0].opcode == "tuple":
        roots = [fused[name] for name in roots[0].operands]
    names = []
    for root in roots:
        while root.opcode == "bitcast":
            root = fused[root.operands[0]]
        names.append(root.name)
    return names


def _find_users(fused, instruction) -> list[tuple[Instruction, bool]]:
    """Users of an instruction, also through bitcasts, each with whether it is only the first operand. A root uses itself."""
    found = [(instruction, False)] if instruction.is_root else []
    for user in fused.values():
        if instruction.name in user.operands:
            if user.opcode == "bitcast":
                found += _find_users(fused, user)
            else:
                found.append(
                    (user, instruction.name == user.operands[0] and user.operands.count(instruction.name) == 1)
                )
    return found


def _origins(computation: Mapping[str, Instruction]) -> dict[str, str]:
    """Instruction -> op_name, where an instruction without one has that of a user, or else that of an operand.

    Instructions that the compiler inserts, such as copies, have no op_name.
    """
    shared = {"parameter", "constant", "tuple", "while"}  # their users are unrelated to each other
    names = {i.name: i.op_name for i in computation.values() if i.opcode not in shared}
    for instruction in reversed(list(computation.values())):  # users come after their operands
        for operand in instruction.operands:
            if names.get(operand) == "":
                names[operand] = names.get(instruction.name, "")
    for instruction in computation.values():
        if names.get(instruction.name) == "":
            operand_names = (names.get(operand) for operand in instruction.operands)
            names[instruction.name] = next(filter(None, operand_names), "")
    return names


def describe_opcode(module: Module, instruction: Instruction) -> str:
    """The opcode, with the main op of a fusion ("fusion of convolution") or the target of a custom call."""
    if instruction.opcode == "custom-call":
        return f"custom-call {instruction.target}".strip()
    if instruction.opcode != "fusion":
        return instruction.opcode
    fused = {i.opcode for name in instruction.called.get("calls", ()) for i in module.computations[name].values()}
    # By importance.
    main_ops = (
        "convolution",
        "dot",
        "custom-call",
        "scatter",
        "gather",
        "sort",
        "reduce-window",
        "reduce",
        "transpose",
    )
    kind = next((opcode for opcode in main_ops if opcode in fused), "")
    return f"fusion of {kind or 'elementwise ops'}"


def module_path(op_name: str, *, depth: int = _MODULE_DEPTH) -> str:
    """Module path of an op_name.

    For example, the path of "jit(train_step)/transpose(jvp(DAT))/DAT.features/stages_0/blocks_1/attn/proj/dot_general" is
    "stages_0/blocks_1/attn".

    Args:
      op_name: origin of an instruction.
      depth: maximum number of modules in the path.
    """
    if not op_name:
        return "(no name)"
    parts = re.sub(r"\bjit\([^()]*\)", "", op_name).split("/")[:-1]  # without the primitive
    # Names of modules; names of classes start with a capital letter.
    names = [p for p in parts if p[:1].islower() and not set("(.") & set(p) and p not in _STRUCTURE]
    if names:  # a gradient with rematerialization has the path of the outermost module twice
        names = names[len(names) - 1 - names[::-1].index(names[0]) :]
    return "/".join(names[:depth]) or "(outside the model)"
