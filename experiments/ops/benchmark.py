"""Times of every implementation of every op, forward and gradient, on the maps of dat_pp_tiny at 224 x 224.

JAX_PLATFORMS=cpu python -m experiments.ops.benchmark [--ops=NAMES] [--stages=0,1,2,3] [--batch=8] [--output=DIR]

- The implementations are those of `dat_jax.ops.dispatch`, including "plain" and "auto".
- "gradient" is the time of the output and of the gradient of its product with random numbers, with respect to every input.
- For each op and map, every round measures all implementations and both directions in random order. Each measurement follows
  the same number of calls that are not timed.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import dat_jax
from dat_jax.ops import dispatch
from dat_jax.ops.attention import branches, grid_sample, position_bias
from dat_jax.ops.attention import deformable as deformable_ops
from dat_jax.ops.attention import neighborhood as neighborhood_attention
from dat_jax.ops.layers import activation, depthwise, local_perception, mlp, norm_linear, normalization
from experiments import measure


@dataclasses.dataclass(frozen=True)
class Stage:
    """Sizes of a stage. ``side`` is that of the square map, ``keys`` that of the key grid."""

    side: int
    channels: int
    heads: int
    groups: int
    keys: int
    window: int

    def __str__(self) -> str:
        return f"{self.side} x {self.side} x {self.channels}"


def make_stages(name: str = "dat_pp_tiny", image_side: int = 224) -> list[Stage]:
    """Stages of a model."""
    model, stages = dat_jax.create_model(name), []
    for index, channels in enumerate(model.dims):
        shape = model.map_shape((image_side, image_side), stage=index)
        keys = deformable_ops.key_grid_shape(
            shape, kernel_size=model.offset_kernels[index], stride=model.key_strides[index]
        )
        heads, groups, window = model.num_heads[index], model.num_groups[index], model.neighborhood_sizes[index]
        stages.append(Stage(shape[0], channels, heads, groups, keys[0], window))
    return stages


# Cases: (stage, batch, random generator) -> (function of the implementation's name and the arguments, the arguments)


def _points(stage, batch, rng):
    """Random fractional key positions over the whole map."""
    points = rng.uniform(0, stage.side - 1, (batch, stage.groups, stage.keys**2, 2))
    return jnp.asarray(points, jnp.float32)


def _normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _map(stage, batch, rng, times=1):
    return _normal(rng, batch, stage.side, stage.side, times * stage.channels)


def _table(stage, rng):
    return 0.1 * _normal(rng, stage.heads, 2 * stage.side - 1, 2 * stage.side - 1)


def _position_bias(stage, batch, rng):
    def function(implementation, table, points):
        shape = (stage.side, stage.side)
        return position_bias.table_position_bias(table, points, map_shape=shape, implementation=implementation)

    return function, (_table(stage, rng), _points(stage, batch, rng))


def _grid_sample(stage, batch, rng):
    def function(implementation, features, points):
        return grid_sample.grid_sample(features, points, implementation=implementation)

    return function, (_map(stage, batch, rng), _points(stage, batch, rng))


def _deformable_core(stage, batch, rng):
    """Sampling, position bias and attention, without projections. An op without the implementation uses "auto"."""

    def function(implementation, features, query, points, table):
        def of(*ops):
            known = {"auto", "plain", *(name for op in ops for name in dispatch.IMPLEMENTATIONS.get(op, ()))}
            return implementation if implementation in known else "auto"

        sampled = grid_sample.grid_sample(features, points, implementation=of("grid_sample"))
        return deformable_ops.deformable_attention(
            query,
            sampled,
            sampled,
            num_heads=stage.heads,
            points=points,
            table=table,
            implementation=of("position_bias", "deformable_attention"),
        )

    maps = _map(stage, batch, rng), _map(stage, batch, rng)
    return function, (*maps, _points(stage, batch, rng), _table(stage, rng))


def _neighborhood_attention(stage, batch, rng):
    def function(implementation, query, key, value, table):
        return neighborhood_attention.neighborhood_attention(
            query,
            key,
            value,
            table,
            kernel_size=stage.window,
            num_heads=stage.heads,
            implementation=implementation,
        )

    side = 2 * stage.window - 1
    maps = (_map(stage, batch, rng) for _ in range(3))
    return function, (*maps, 0.1 * _normal(rng, stage.heads, side, side))


def _depthwise_conv(stage, batch, rng):
    """3 x 3 convolution with four times the channels, as in the MLPs."""

    def function(implementation, x, kernel):
        return depthwise.depthwise_conv(x, kernel, padding=1, implementation=implementation)

    return function, (_map(stage, batch, rng, times=4), _normal(rng, 3, 3, 1, 4 * stage.channels))


def _layer_norm(stage, batch, rng):
    def function(_, x, scale, bias):
        return normalization.layer_norm(x, scale, bias, 1e-5)

    return function, (_map(stage, batch, rng), _normal(rng, stage.channels), _normal(rng, stage.channels))


def _gelu(stage, batch, rng):
    """GELU with four times the channels, as in the MLPs."""
    return lambda _, x: activation.gelu(x), (_map(stage, batch, rng, times=4),)


def _conv_mlp(stage, batch, rng):
    def function(implementation, *arguments):
        return mlp.conv_mlp(*arguments, implementation=implementation)

    wide = 4 * stage.channels
    shapes = ((stage.channels, wide), (wide,), (3, 3, 1, wide), (wide,), (wide, stage.channels), (stage.channels,))
    return function, (_map(stage, batch, rng), *(0.1 * _normal(rng, *shape) for shape in shapes))


def _local_perception(stage, batch, rng):
    def function(implementation, x, kernel, bias):
        return local_perception.local_perception(x, kernel, bias, implementation=implementation)

    parameters = 0.1 * _normal(rng, 3, 3, 1, stage.channels), _normal(rng, stage.channels)
    return function, (_map(stage, batch, rng), *parameters)


def _norm_linear(stage, batch, rng):
    def function(implementation, *arguments):
        return norm_linear.concatenated_norm_linear(*arguments, implementation=implementation)

    return function, (_map(stage, batch, rng), *_normed_projection(stage, rng))


def _normed_projection(stage, rng, times=1):
    """Scale and bias of LayerNorm, and kernel and bias of the linear layer after it."""
    channels, features = stage.channels, times * stage.channels
    kernel = _normal(rng, channels, features) / channels**0.5
    return _normal(rng, channels), _normal(rng, channels), kernel, _normal(rng, features)


def _output_projection(stage, batch, rng):
    """Kernel and bias of the linear layer after the attention, and the factors of the branch."""
    channels = stage.channels
    return _normal(rng, channels, channels) / channels**0.5, _normal(rng, channels), jnp.ones(batch)


def _neighborhood_branch(stage, batch, rng):
    def function(implementation, *arguments):
        options = dict(kernel_size=stage.window, num_heads=stage.heads, implementation=implementation)
        return branches.neighborhood_branch(*arguments, **options)

    side = 2 * stage.window - 1
    middle = *_normed_projection(stage, rng, times=3), 0.1 * _normal(rng, stage.heads, side, side)
    return function, (_map(stage, batch, rng), *middle, *_output_projection(stage, batch, rng))


def _deformable_branch(stage, batch, rng):
    """Attention to given keys, without the network of the offsets."""

    def function(implementation, *arguments):
        return branches.deformable_branch(*arguments, num_heads=stage.heads, implementation=implementation)

    pairs = (_normal(rng, batch, stage.keys**2, stage.channels) for _ in range(2))
    middle = *_normed_projection(stage, rng), *pairs, _points(stage, batch, rng), _table(stage, rng)
    return function, (_map(stage, batch, rng), *middle, *_output_projection(stage, batch, rng))


@dataclasses.dataclass(frozen=True)
class Case:
    """A function ``make`` of a stage, and the ops of the dispatch table whose implementations are measured.

    Without ``ops``, the model's own implementation is measured.
    """

    make: Callable
    ops: tuple[str, ...]


CASES = {
    "position_bias": Case(_position_bias, ("position_bias",)),
    "grid_sample": Case(_grid_sample, ("grid_sample",)),
    "deformable_core": Case(_deformable_core, ("position_bias", "grid_sample", "deformable_attention")),
    "neighborhood_attention": Case(_neighborhood_attention, ("neighborhood_attention",)),
    "depthwise_conv": Case(_depthwise_conv, ("depthwise_conv",)),
    "conv_mlp": Case(_conv_mlp, ("conv_mlp",)),
    "local_perception": Case(_local_perception, ("local_perception",)),
    "norm_linear": Case(_norm_linear, ("norm_linear",)),
    "neighborhood_branch": Case(_neighborhood_branch, ("neighborhood_branch",)),
    "deformable_branch": Case(_deformable_branch, ("deformable_branch",)),
    "layer_norm": Case(_layer_norm, ()),
    "gelu": Case(_gelu, ()),
}


def implementations(case: Case) -> list[str]:
    """Names of implementations to measure, "plain" first. Pallas kernels are left out on a CPU, which interprets them."""
    names = [name for op in case.ops for name in dispatch.IMPLEMENTATIONS.get(op, ())]
    left_out = {"pallas"} if dispatch.target_platform() == "cpu" else set()
    if len(case.ops) == 1:
        left_out.add(dispatch.PLAIN[case.ops[0]])  # measured as "plain"
    names = [name for name in dict.fromkeys(names) if name not in left_out]
    return ["plain", "auto", *names] if case.ops else ["model's own"]


def uncovered_ops() -> set[str]:
    """Ops of the dispatch table that no case measures."""
    return set(dispatch.IMPLEMENTATIONS) - {op for case in CASES.values() for op in case.ops}


def measure_case(case: Case, stage: Stage, *, batch: int, repeats: int, min_seconds: float) -> list[dict]:
    """One row per implementation: its name, and seconds and temporary bytes for "forward" and "gradient".

    They are None if the implementation does not support the map.
    """
    rng = np.random.default_rng(0)
    function, arguments = case.make(stage, batch, rng)
    names = implementations(case)
    weights = _normal(rng, *jax.eval_shape(functools.partial(function, names[0]), *arguments).shape)
    calls, temporaries = {}, {}
    for name in names:
        forward = functools.partial(function, name)

        def gradient(arguments, weights, forward=forward):
            out, backward = jax.vjp(forward, *arguments)
            return out, backward(weights)

        programs = {
            "forward": lambda arguments, _, forward=forward: forward(*arguments),
            "gradient": gradient,
        }
        for direction, program in programs.items():
            try:
                compiled = jax.jit(program).lower(arguments, weights).compile()
            except (ValueError, NotImplementedError):  # this implementation does not run on this platform or map
                continue
            jax.block_until_ready(compiled(arguments, weights))
            calls[name, direction] = functools.partial(compiled, arguments, weights)
            temporaries[name, direction] = compiled.memory_analysis().temp_size_in_bytes
    seconds = measure.time_interleaved(calls, repeats=repeats, min_seconds=min_seconds)
    return [
        {
            "implementation": name,
            **{d: seconds.get((name, d)) for d in ("forward", "gradient")},
            **{f"{d} temporaries": temporaries.get((name, d)) for d in ("forward", "gradient")},
        }
        for name in names
    ]


def format_rows(stage: Stage, rows: list[dict]) -> list[dict[str, str]]:
    """Rows with milliseconds, and the speedup relative to the first row, which is the plain implementation."""
    formatted = []
    for row in rows:
        cells = {"map": str(stage), "implementation": row["implementation"]}
        for direction in ("forward", "gradient"):
            seconds, plain = row[direction], rows[0][direction]
            cells[f"{direction}, ms"] = measure.format_number(seconds and 1e3 * seconds)
            cells[f"plain / this, {direction}"] = measure.format_number(seconds and plain and plain / seconds)
        size = row["gradient temporaries"]
        formatted.append({**cells, "gradient's temporaries, MB": "-" if size is None else f"{size / 1e6:.1f}"})
    return formatted


def main(arguments: list[str] | None = None) -> None:
    """Measure the selected ops and write the results."""
    parser = measure.make_parser(__file__, __doc__, repeats=11, min_seconds=0.1)
    parser.add_argument("--ops", type=measure.words, default=list(CASES), help="names, separated by commas")
    parser.add_argument("--stages", type=measure.numbers, default=[0, 1, 2, 3], help="indices of stages")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(CASES):
        parser.error(f"--ops: expected some of {', '.join(CASES)}, got {', '.join(sorted(unknown))}")
    stages, product = make_stages(), [measure.time_matrix_product()]
    sections, bars = {}, {}
    for op in options.ops:
        rows, bars[op] = [], {}
        for stage in (stages[index] for index in options.stages):
            # A map that is not larger than the window has a single window, and nothing to select.
            if op == "neighborhood_attention" and stage.side <= stage.window:
                continue
            timing = dict(repeats=options.repeats, min_seconds=options.min_seconds)
            measurements = measure_case(CASES[op], stage, batch=options.batch, **timing)
            print(f"{op}, {stage}: {len(measurements)} implementations", flush=True)
            rows += format_rows(stage, measurements)
            bars[op] |= {
                f"{stage.side}: {r['implementation']}": 1e3 * r["gradient"] for r in measurements if r["gradient"]
            }
        if rows:
            sections[op] = measure.format_table(rows)
    product.append(measure.time_matrix_product())
    notes = f"Batch {options.batch}, float32; medians of {options.repeats}. {measure.describe_machine(product_seconds=product)}"
    if uncovered_ops():
        notes += f" Not measured: {', '.join(sorted(uncovered_ops()))}."
    notes += f"\n\n{options.command}"
    measure.write_results(options.output, title="Implementations of the ops", sections={"": notes, **sections})
    panels = {op: values for op, values in bars.items() if values}
    measure.save_bars(options.output / "results.png", panels, x_label="gradient, ms", log=True)


if __name__ == "__main__":
    main()
