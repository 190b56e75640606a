"""Time per module of a compiled program, from a trace of the profiler."""

import gzip
import json
import pathlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dat_jax.profiling import hlo

_WAITING = {"while", "call", "conditional"}  # the ops inside have their own events


class Place(NamedTuple):
    """Origin of an op: module, such as "N attention: qkv"; kind of op; forward or backward."""

    module: str
    kind: str
    direction: str


def read_events(directory: pathlib.Path) -> list[dict]:
    """Events of the newest trace in a directory that ``jax.profiler`` wrote to."""
    path = max(directory.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def self_times(events: Iterable[Mapping]) -> dict[str, float]:
    """HLO instruction -> milliseconds on all threads, without instructions inside it on the same thread."""
    threads = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}) and not event["name"].startswith("end: "):
            threads[event["pid"], event["tid"]].append(event)
    total = Counter()
    for thread in threads.values():
        open_events = []  # events that may contain the next one
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"]:
                open_events.pop()
            if open_events:
                total[open_events[-1]["args"]["hlo_op"]] -= event["dur"] / 1e3
            total[event["args"]["hlo_op"]] += event["dur"] / 1e3
            open_events.append(event)
    return dict(total)


def attribute(
    times: Mapping[str, float], module: hlo.Module, *, stages: tuple[str, ...], names: set[str]
) -> dict[Place, float]:
    """Milliseconds by place.

    Args:
      times: Result of ``self_times``.
      module: Parsed text of the program.
      stages: Block types of the model, such as ("ND", "NDND").
      names: Names of the modules in its blocks. Other scopes, such as that of an einsum, are not distinguished.
    """
    instructions = {instruction.name: instruction for _, instruction in module}
    total = Counter()
    for name, milliseconds in times.items():
        instruction = instructions.get(name)
        if instruction is None:
            total[Place("(not in the program's text)", "(unknown)", "-")] += milliseconds
        elif instruction.opcode not in _WAITING:
            direction = "backward" if "transpose(" in instruction.op_name else "forward"
            place = name_module(instruction.op_name, stages=stages, names=names)
            total[Place(place, _kind(module, instruction), direction)] += milliseconds
    return dict(total)


def _kind(module, instruction) -> str:
    if instruction.name.startswith("ynn_fusion"):  # XLA's CPU library for products and elementwise chains
        return "fusion for the library of products"
    return hlo.describe_opcode(module, instruction)


def name_module(op_name: str, *, stages: tuple[str, ...], names: set[str]) -> str:
    """jit(step)/.../stages_2/blocks_1/attn/proj_q/dot_general -> "D attention: proj_q", for any stage and block."""
    if not op_name:
        return "(the compiler's own)"
    stage, *rest = hlo.module_path(op_name, depth=4).split("/")
    if not re.fullmatch(r"stages_\d+", stage) or not rest or not re.fullmatch(r"blocks_\d+", rest[0]):
        known = stage in names or stage.startswith("stages_")
        return stage if known else "loss, inputs" if "jvp(" in op_name else "optimizer"
    kind = stages[int(stage[7:])][int(rest[0][7:])]
    part, inner = (name if name in names else None for name in (*rest[1:], "", "")[:2])
    part = {"attn": f"{kind} attention", None: "residual sums"}.get(part, part)
    return f"{part}: {inner}" if inner else part
