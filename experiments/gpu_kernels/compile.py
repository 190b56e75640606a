"""The kernels for GPUs (`implementation="triton"`) beside the default, compiled for an H100 that is not attached.

python -m experiments.gpu_kernels.compile [--batch=128] [--dtypes=bfloat16,float32]

Needs `pip install "jax[cuda12]"`. Compiled, not timed: nothing was executed, and the kernels have not run on a device.

- One call of an op with its gradient, in the shapes of the stages of dat_pp_tiny at 224 x 224.
- "temporaries" is the memory that the compiler allocates besides operands and results. "read and written" counts the operands and
  results of every kernel and fusion of the compiled program, once each: a kernel that reads a block twice counts it once.
- "shared memory" is that of each kernel, per program. A kernel that spills registers is refused by the compiler here
  (`xla_gpu_fail_ptx_compilation_on_register_spilling`), which is the last column.
"""

import argparse
import os
import pathlib
import re
import shlex
import tempfile
from collections.abc import Sequence
from typing import Any

from experiments import measure

# Side of the map, heads (of 32 channels), offset groups. Windows of 7 x 7, and 49 keys.
NEIGHBORHOOD = ((56, 2), (28, 4), (14, 8))
DEFORMABLE = ((56, 2, 1), (28, 4, 2), (14, 8, 4), (7, 16, 8))
_WIDTH, _WINDOW, _KEYS = 32, 7, 49


def make_cases(batch: int, dtype: str) -> dict[str, tuple[Any, list[Any]]]:
    """Description -> (function of arrays and an implementation, shapes and dtypes of the arrays)."""
    import jax

    from dat_jax.ops.attention.deformable import deformable_attention
    from dat_jax.ops.attention.neighborhood import neighborhood_attention

    cases: dict[str, tuple[Any, list[Any]]] = {}
    for side, heads in NEIGHBORHOOD:
        x = jax.ShapeDtypeStruct((batch, side, side, heads * _WIDTH), dtype)
        table = jax.ShapeDtypeStruct((heads, 2 * _WINDOW - 1, 2 * _WINDOW - 1), "float32")

        def attend(q, k, v, table, *, implementation, heads=heads):
            options = dict(kernel_size=_WINDOW, num_heads=heads, implementation=implementation)
            return neighborhood_attention(q, k, v, table, **options)

        cases[f"neighborhood attention, {side} x {side}, {heads} heads"] = attend, [x, x, x, table]
    for side, heads, groups in DEFORMABLE:
        x = jax.ShapeDtypeStruct((batch, side, side, heads * _WIDTH), dtype)
        keys = jax.ShapeDtypeStruct((batch, _KEYS, heads * _WIDTH), dtype)
        points = jax.ShapeDtypeStruct((batch, groups, _KEYS, 2), "float32")
        table = jax.ShapeDtypeStruct((heads, 2 * side - 1, 2 * side - 1), "float32")

        def sample(q, k, v, points, table, *, implementation, heads=heads):
            options = dict(num_heads=heads, implementation=implementation)
            return deformable_attention(q, k, v, points=points, table=table, **options)

        cases[f"deformable attention, {side} x {side}, {heads} heads"] = sample, [x, keys, keys, points, table]
    return cases


def compile_case(
    function: Any, arrays: list[Any], implementation: str, devices: Any, dump: pathlib.Path
) -> dict[str, str]:
    """What the compiler reports of a call with its gradient."""
    import jax
    import numpy as np

    from dat_jax.ops.dispatch import compiling_for
    from dat_jax.profiling import hlo

    where = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(devices[:1]), ("device",)), jax.sharding.PartitionSpec()
    )
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in arrays]

    def differentiate(*arrays):
        result, pull_back = jax.vjp(lambda *arrays: function(*arrays, implementation=implementation), *arrays)
        return result, pull_back(result)

    known = set(dump.glob("*thunk_sequence.txt"))
    with compiling_for("gpu"):
        lowered = jax.jit(differentiate).lower(*arrays)
    fails = implementation == "triton"
    try:
        compiled = lowered.compile({"xla_gpu_fail_ptx_compilation_on_register_spilling": True} if fails else {})
    except jax.errors.JaxRuntimeError as error:
        return {"registers are spilled": str(error).partition("\n")[0]}
    text = "".join(path.read_text() for path in set(dump.glob("*thunk_sequence.txt")) - known)
    kernels = re.findall(r"attention_(\w+) grid: .*?shared_memory: (\d+)", text)
    by_opcode, _ = hlo.traffic(hlo.parse(compiled.as_text() or ""))
    return {
        "temporaries, MB": f"{compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f}",
        "read and written, GB": f"{sum(counts['hbm_bytes'] for counts in by_opcode.values()) / 1e9:.3f}",
        "shared memory, KiB": ", ".join(f"{name.removeprefix('backward_')} {int(n) / 1024:g}" for name, n in kernels)
        or "-",
        "registers are spilled": "no" if fails else "-",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile all cases and write the table."""
    parser = argparse.ArgumentParser("python -m experiments.gpu_kernels.compile")
    parser.add_argument("--batch", type=int, default=128, help="examples")
    parser.add_argument("--dtypes", type=measure.words, default=["bfloat16", "float32"], help="separated by commas")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder of the results"
    )
    options = parser.parse_args(arguments)
    sections = {"": f"`{shlex.join(('python', '-m', 'experiments.gpu_kernels.compile', f'--batch={options.batch}'))}`"}
    sections[""] += "\n\n" + (__doc__ or "").strip().split("\n\n", 2)[2]
    with tempfile.TemporaryDirectory() as dump:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump}"
        import jax

        jax.config.update("jax_platforms", "cpu")
        from dat_jax.profiling.topologies import find_devices

        _, devices = find_devices("h100")
        for dtype in options.dtypes:
            rows = []
            for name, (function, arrays) in make_cases(options.batch, dtype).items():
                for implementation in ("triton", "auto"):
                    row = {"call": name, "implementation": implementation}
                    row |= compile_case(function, arrays, implementation, devices, pathlib.Path(dump))
                    print(dtype, row, flush=True)
                    rows.append(row)
            sections[f"{dtype}, batch {options.batch}"] = measure.format_table(rows)
        measure.write_results(options.output, title="Kernels for GPUs, compiled for an H100", sections=sections)


if __name__ == "__main__":
    main()
