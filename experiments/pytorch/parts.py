"""The parts of DAT++ on a CPU in this project and in PyTorch: linear layers, attention, MLP and others at the size of each stage.

JAX_PLATFORMS=cpu python -m experiments.pytorch.parts [--model=dat_pp_tiny] [--batch=8] [--repeats=7]

- The first table has the speed of the three products of a linear layer: its result x w, the gradient of its input g w^T, and the
  gradient of its kernel x^T g.
- The second table has the time of each part, forward, and forward and backward together. "ratio" is the time of the faster
  PyTorch over ours.
- "products alone" is the time that the matrix products of the part would take at the speed of the product of two 1024 x 1024
  matrices in this project: a bound for what any implementation can reach. Neighborhood attention counts only the pairs inside
  its windows, so that a dense product, which computes more pairs, cannot reach it.
- Times are medians; every round measures all columns in random order.
- The last table has the processor time of a training step of the whole model, summed over the threads: in the program, and in
  the operating system, which maps memory when it is touched for the first time (page faults).

It needs `pip install torch` and a C++ compiler, which torch.compile uses.
"""

import argparse
import itertools
import math
import resource
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments import measure

COLUMNS = ("dat_jax", "PyTorch", "PyTorch, compiled")
_SIDE = 1024  # of the product that speeds are compared with


class Part(NamedTuple):
    """A part of the model in one stage.

    Attributes:
      name: what it is.
      channels: of its input.
      side: of its square input map.
      products: number of multiplications of one image in matrix products.
      ours, peer: functions that make the flax module and the PyTorch module.
    """

    name: str
    channels: int
    side: int
    products: int
    ours: Callable[[], Any]
    peer: Callable[[], Any]


def list_parts(variant: str) -> Iterator[Part]:
    """The parts of the blocks of every stage, without repetition."""
    from torch import nn

    from dat_jax.models import layers
    from dat_jax.models.registry import create_model
    from experiments.pytorch.model import ChannelNorm, ConvMlp, make_attention

    model = create_model(variant, num_classes=1000)
    for stage, kinds in enumerate(model.stages):
        channels, side = model.dims[stage], model.image_size // 2 ** (stage + 2)
        size = dict(channels=channels, side=side)
        pixels = side**2
        for kind in sorted(set(kinds)):
            keys = (
                min(model.neighborhood_sizes[stage], side) ** 2
                if kind == "N"
                else math.ceil(side / model.key_strides[stage]) ** 2
            )
            linear = 4 * pixels if kind == "N" else 2 * (pixels + keys)
            yield Part(
                f"{kind} attention",
                **size,
                products=linear * channels**2 + 2 * pixels * keys * channels,
                ours=lambda stage=stage, kind=kind: _our_attention(model, stage, kind),
                peer=lambda stage=stage, kind=kind, side=side: make_attention(model, stage, kind, side),
            )
        yield Part(
            "MLP",
            **size,
            products=2 * model.expansion * pixels * channels**2,
            ours=lambda: layers.Mlp(4, depthwise=True),
            peer=lambda channels=channels: ConvMlp(channels),
        )
        yield Part(
            "depthwise convolution",
            **size,
            products=0,
            ours=layers.DepthwiseConv,
            peer=lambda channels=channels: nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        )
        yield Part(
            "LayerNorm",
            **size,
            products=0,
            ours=lambda: layers.LayerNorm("float32"),
            peer=lambda channels=channels: ChannelNorm(channels),
        )


def _our_attention(model, stage: int, kind: str):
    from dat_jax.models.attention import DeformableAttention, NeighborhoodAttention

    if kind == "N":
        return NeighborhoodAttention(model.num_heads[stage], model.neighborhood_sizes[stage])
    side = model.image_size // 2 ** (stage + 2)
    return DeformableAttention(
        num_heads=model.num_heads[stage],
        num_groups=model.num_groups[stage],
        key_stride=model.key_strides[stage],
        offset_kernel=model.offset_kernels[stage],
        offset_range_factor=model.offset_range_factors[stage],
        position_bias=model.position_bias[stage],
        use_offsets=model.use_offsets[stage],
        table_shape=(side, side),
        form=model.deformable_form,
    )


def make_calls(part: Part, batch: int, *, gradient: bool, compile_it: bool) -> dict[str, Callable[[], Any]]:
    """For each column a function without arguments that runs the part once."""
    calls = {COLUMNS[0]: _make_ours(part, batch, gradient), COLUMNS[1]: _make_peer(part, batch, gradient)}
    if compile_it:
        calls[COLUMNS[2]] = _make_peer(part, batch, gradient, compile_it=True)
    for call in calls.values():
        call(), call()
    return calls


def _make_ours(part, batch, gradient):
    import jax

    module = part.ours()
    keys = jax.random.split(jax.random.key(0), 3)
    x, to_out = (jax.random.normal(key, (batch, part.side, part.side, part.channels)) for key in keys[:2])
    params = module.init(keys[2], x)["params"]

    def forward(params, x):
        return module.apply({"params": params}, x)

    def both(params, x):
        _, pull_back = jax.vjp(forward, params, x)
        return pull_back(to_out)

    run = jax.jit(both if gradient else forward)
    return lambda: jax.block_until_ready(run(params, x))


def _make_peer(part, batch, gradient, *, compile_it=False):
    import torch

    module = part.peer()
    run = torch.compile(module) if compile_it else module
    x = torch.randn(batch, part.channels, part.side, part.side, requires_grad=gradient)
    to_out = torch.randn(batch, part.channels, part.side, part.side)

    def forward():
        with torch.inference_mode():
            return run(x)

    def both():
        module.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward(to_out)

    return both if gradient else forward


def measure_products(*, variant: str, batch: int, repeats: int, min_seconds: float) -> dict[str, Any]:
    """For ``measure.run_fresh``: {"rows": rows of the table of products, "speed": of the large product, in products/s}."""
    import jax
    import jax.numpy as jnp
    import torch

    from dat_jax.models.registry import create_model

    def both(a, b, axes):
        """The product over one axis of each matrix, in jax and in PyTorch."""
        ours = jax.jit(lambda a, b: jnp.tensordot(a, b, axes=axes))
        their_a, their_b = (torch.from_numpy(jax.device_get(x).copy()) for x in (a, b))
        their_a = their_a if axes[0] == 1 else their_a.T
        their_b = their_b if axes[1] == 0 else their_b.T
        return {"dat_jax": lambda: ours(a, b), "PyTorch": lambda: torch.mm(their_a, their_b)}

    def speeds(a, b, axes):
        calls = both(a, b, axes)
        seconds = measure.time_interleaved(calls, repeats=repeats, min_seconds=min_seconds)
        count = a.size * b.size // a.shape[axes[0]]
        return {name: count / value for name, value in seconds.items()}

    square = jax.random.normal(jax.random.key(0), (_SIDE, _SIDE))
    large = speeds(square, square, (1, 0))
    model, rows = create_model(variant), []
    for stage, channels in enumerate(model.dims):
        pixels = batch * (model.image_size // 2 ** (stage + 2)) ** 2
        for width, features in ((channels, 3 * channels), (channels, 4 * channels), (4 * channels, channels)):
            x, w, g = (jnp.ones(shape) for shape in ((pixels, width), (width, features), (pixels, features)))
            row = {"stage": stage + 1, "pixels": pixels, "channels": f"{width} to {features}"}
            for name, found in (
                ("x w", speeds(x, w, (1, 0))),
                ("g w^T", speeds(g, w, (1, 1))),
                ("x^T g", speeds(x, g, (0, 0))),
            ):
                row |= {f"{name}, {column}": f"{2e-9 * value:.0f}" for column, value in found.items()}
            rows.append(row)
    return {"rows": rows, "speed": large["dat_jax"], "peer_speed": large["PyTorch"]}


def measure_part(
    *, variant: str, index: int, batch: int, gradient: bool, compile_it: bool, repeats: int, min_seconds: float
) -> dict[str, Any]:
    """For ``measure.run_fresh``: {"seconds": of each column, "torch": its version}."""
    import torch

    torch.manual_seed(0)
    part = list(list_parts(variant))[index]
    calls = make_calls(part, batch, gradient=gradient, compile_it=compile_it)
    seconds = measure.time_interleaved(calls, repeats=repeats, min_seconds=min_seconds)
    return {"seconds": seconds, "torch": torch.__version__}


def measure_processor_time(*, column: str, variant: str, batch: int, repeats: int) -> dict[str, float]:
    """For ``measure.run_fresh``: {"user": s, "system": s, "faults": page faults} of a training step, medians."""
    from experiments.pytorch import benchmark

    call = benchmark.make_call(column, variant, batch, "train")
    call(), call()
    usage = [resource.getrusage(resource.RUSAGE_SELF)]
    for _ in range(repeats):
        call()
        usage.append(resource.getrusage(resource.RUSAGE_SELF))
    fields = dict(user="ru_utime", system="ru_stime", faults="ru_minflt")
    return {
        name: statistics.median(getattr(b, field) - getattr(a, field) for a, b in itertools.pairwise(usage))
        for name, field in fields.items()
    }


def format_processor_time(column: str, result: dict[str, Any]) -> dict[str, str]:
    """Row of the table of processor times."""
    names = ("in the program, s", "in the operating system, s", "page faults")
    if "failed" in result:
        return {"step": column} | dict.fromkeys(names, "-") | {names[0]: result["failed"]}
    seconds = [measure.format_number(result[name]) for name in ("user", "system")]
    return {"step": column} | dict(zip(names, [*seconds, f"{result['faults']:,.0f}"], strict=True))


def format_row(part: Part, batch: int, gradient: bool, result: dict[str, Any], speed: float) -> dict[str, str]:
    """Row of the table of parts."""
    row = {"part": part.name, "map": f"{part.side} x {part.side} x {part.channels}"}
    row["pass"] = "forward and backward" if gradient else "forward"
    if "failed" in result:
        return row | dict.fromkeys([f"{name}, ms" for name in COLUMNS], "-") | {"ratio": result["failed"]}
    seconds = result["seconds"]
    times = {f"{name}, ms": measure.format_number(1e3 * seconds[name]) if name in seconds else "-" for name in COLUMNS}
    best = min(value for name, value in seconds.items() if name != COLUMNS[0])
    alone = batch * part.products * (3 if gradient else 1) / speed
    return (
        row
        | times
        | {
            "ratio": f"{best / seconds[COLUMNS[0]]:.2f}",
            "products alone, ms": measure.format_number(1e3 * alone) if alone else "-",
        }
    )


def parse(arguments) -> argparse.Namespace:
    """Read the arguments."""
    parser = measure.make_parser(__file__, __doc__, repeats=7, min_seconds=0.1)
    parser.add_argument("--model", default="dat_pp_tiny", help="a DAT++ classifier")
    parser.add_argument("--batch", type=int, default=8, help="batch size")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    """Measure and write the tables."""
    options = parse(arguments)
    target = "experiments.pytorch.parts"
    settings = dict(variant=options.model, batch=options.batch, repeats=options.repeats)
    settings["min_seconds"] = options.min_seconds
    product = [measure.time_matrix_product()]
    products = measure.run_fresh(f"{target}:measure_products", **settings)
    if "failed" in products:
        raise SystemExit(f"The products could not be measured: {products['failed']}")
    rows, torch = [], ""
    for index, part in enumerate(list_parts(options.model)):
        for gradient in (False, True):
            more = dict(index=index, gradient=gradient, compile_it=not options.no_compile)
            result = measure.run_fresh(f"{target}:measure_part", **settings, **more)
            torch = result.get("torch", torch)
            rows.append(format_row(part, options.batch, gradient, result, products["speed"]))
            print(rows[-1], flush=True)
    processor = []
    for column in COLUMNS[:2]:
        more = dict(column=column, variant=options.model, batch=options.batch, repeats=options.repeats)
        processor.append(format_processor_time(column, measure.run_fresh(f"{target}:measure_processor_time", **more)))
        print(processor[-1], flush=True)
    product.append(measure.time_matrix_product())
    machine = measure.describe_machine(product_seconds=product)
    large = " and ".join(f"{2e-9 * products[name]:.0f}" for name in ("speed", "peer_speed"))
    head = f"{options.model}, float32, {options.batch} images of 224 x 224. torch {torch}, {machine}"
    ran = f"The product of two {_SIDE} x {_SIDE} matrices ran at {large} GFLOP/s in jax and in PyTorch."
    sections = {
        "": f"{head}\n\n{options.command}",
        "Speed of products, GFLOP/s": f"{ran}\n\n{measure.format_table(products['rows'])}",
        "Parts": measure.format_table(rows),
        "Processor time of a training step": measure.format_table(processor),
    }
    measure.write_results(options.output, title="The parts of the model", sections=sections, name="parts")


if __name__ == "__main__":
    main()
