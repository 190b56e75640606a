"""DAT++ on a CPU in this project and in PyTorch, eager and compiled, in one process and in turn.

JAX_PLATFORMS=cpu python -m experiments.pytorch.benchmark [--batches=1,8,16] [--steps=eval,train] [--repeats=7]

- PyTorch's model is in `experiments/pytorch/model.py` and gets this project's weights by their published names. Before the
  measurement, logits and gradients of both are compared.
- "eval" computes the logits of a batch. "train" is forward, backward, clipping and AdamW. Ours also mixes and erases the images
  on the device, computes metrics and checks that the loss is finite, as its runs do.
- Times are medians; every round measures all columns in random order. "ratio" is the time of the faster PyTorch over ours.
- Memory is the peak of a process of its own that builds the model, compiles it and does three steps.

It needs `pip install torch` and a C++ compiler, which torch.compile uses.
"""

import argparse
import resource
import tempfile
from typing import Any

from experiments import measure

STEPS = ("eval", "train")
COLUMNS = ("dat_jax", "PyTorch", "PyTorch, compiled")
_LEARNING_RATE = 1e-6  # small, since the state changes while it is measured


def make_ours(variant: str, batch: int, step: str) -> Any:
    """A function without arguments that does one step of this project."""
    import jax

    from experiments import steps

    config = steps.make_config(variant, batch=batch, image_side=224)
    function, arguments = steps.make_step(config, step, devices=jax.devices()[:1])
    compiled, _ = steps.compile_step(function, arguments)
    arguments = steps.fill(arguments)
    call = steps.make_call(compiled, step, arguments)
    return lambda: jax.block_until_ready(call())


def make_peer(variant: str, batch: int, step: str, *, compile_it: bool) -> Any:
    """A function without arguments that does one step in PyTorch."""
    import torch

    from dat_jax.models.registry import create_model
    from experiments.pytorch.model import DatPlusPlus

    torch.manual_seed(0)
    network = DatPlusPlus(create_model(variant, num_classes=1000))
    network.train(step == "train")
    run = torch.compile(network) if compile_it else network
    images = torch.randn(batch, 3, 224, 224)
    if step == "eval":

        def evaluate():
            with torch.inference_mode():
                return run(images)

        return evaluate
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    targets = torch.softmax(torch.randn(batch, 1000), -1)

    def train():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(run(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        return loss

    return train


def make_call(column: str, variant: str, batch: int, step: str) -> Any:
    """A function without arguments that does one step of a column of the table."""
    if column == COLUMNS[0]:
        return make_ours(variant, batch, step)
    return make_peer(variant, batch, step, compile_it=column == COLUMNS[2])


def compare(variant: str) -> dict[str, float]:
    """Relative differences between the logits and the gradients of both, with the same weights and two images."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from dat_jax.conversion import to_official
    from dat_jax.models.registry import create_model
    from experiments.pytorch.model import DatPlusPlus

    model = create_model(variant, num_classes=1000)
    images = np.random.default_rng(0).standard_normal((2, 224, 224, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(images))["params"]
    network = DatPlusPlus(model).eval()
    network.load_state_dict(
        {name: torch.from_numpy(value.copy()) for name, value in to_official(model, params).items()}
    )

    def loss(params):
        logits = model.apply({"params": params}, images, train=False)
        return jnp.sum(jnp.sin(logits)), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    theirs = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.sin(theirs).sum().backward()
    ours, peers = to_official(model, gradient), dict(network.named_parameters())
    squares = [(np.sum((value - peers[name].grad.numpy()) ** 2.0), np.sum(value**2.0)) for name, value in ours.items()]
    return {
        "logits": float(np.abs(theirs.detach().numpy() - logits).max() / np.abs(logits).max()),
        "gradients": float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))),
    }


def measure_times(*, variant: str, batch: int, step: str, repeats: int, min_seconds: float) -> dict[str, Any]:
    """For ``measure.run_fresh``: seconds of a step in each column, and versions."""
    import torch

    with tempfile.TemporaryDirectory() as cache:
        measure.use_cache(cache)
        calls = {column: make_call(column, variant, batch, step) for column in COLUMNS}
        for call in calls.values():
            call(), call()
        seconds = measure.time_interleaved(calls, repeats=repeats, min_seconds=min_seconds)
    return {"seconds": seconds, "torch": torch.__version__, "threads": torch.get_num_threads()}


def measure_memory(*, column: str, variant: str, batch: int, step: str) -> dict[str, Any]:
    """For ``measure.run_fresh``: the peak of the process, with compilation, in bytes."""
    call = make_call(column, variant, batch, step)
    if column == COLUMNS[0]:
        from dat_jax.training.compilation import release_unused_memory

        release_unused_memory()  # as a run does
    for _ in range(3):
        call()
    return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def parse(arguments) -> argparse.Namespace:
    """Read the arguments."""
    parser = measure.make_parser(__file__, __doc__, repeats=7, min_seconds=1.0)
    parser.add_argument("--model", default="dat_pp_tiny", help="a DAT++ classifier")
    parser.add_argument("--batches", type=measure.numbers, default=[1, 8, 16], help="batch sizes, separated by commas")
    parser.add_argument("--steps", type=measure.words, default=list(STEPS), help="eval, train or both")
    parser.add_argument("--memory-batch", type=int, default=8, help="batch size for the memory; 0 leaves it out")
    options = parser.parse_args(arguments)
    if not set(options.steps) <= set(STEPS):
        parser.error(f"argument --steps: expected some of {', '.join(STEPS)}")
    return options


def format_times(batch: int, step: str, result: dict[str, Any]) -> dict[str, str]:
    """Row of the table of times."""
    row = {"step": step, "batch": str(batch)}
    if "failed" in result:
        return row | dict.fromkeys([f"{name}, s" for name in COLUMNS], "-") | {"ratio": result["failed"]}
    seconds = result["seconds"]
    best = min(seconds[name] for name in COLUMNS[1:])
    times = {f"{name}, s": measure.format_number(seconds[name]) for name in COLUMNS}
    return row | times | {"ratio": f"{best / seconds['dat_jax']:.2f}"}


def main(arguments=None) -> None:
    """Measure and write the tables."""
    options = parse(arguments)
    target = "experiments.pytorch.benchmark"
    product = [measure.time_matrix_product()]
    differences = measure.run_fresh(f"{target}:compare", variant=options.model)
    rows, memory, torch = [], [], ""
    for step in options.steps:
        for batch in options.batches:
            settings = dict(variant=options.model, batch=batch, step=step)
            times = dict(repeats=options.repeats, min_seconds=options.min_seconds)
            result = measure.run_fresh(f"{target}:measure_times", **settings, **times)
            torch = result.get("torch", torch)
            rows.append(format_times(batch, step, result))
            print(rows[-1], flush=True)
        if options.memory_batch:
            row = {"step": step, "batch": str(options.memory_batch)}
            for column in COLUMNS:
                settings = dict(column=column, variant=options.model, batch=options.memory_batch, step=step)
                result = measure.run_fresh(f"{target}:measure_memory", **settings)
                row[f"{column}, GiB"] = result.get("failed") or measure.format_gib(result["peak_bytes"])
            memory.append(row)
            print(memory[-1], flush=True)
    product.append(measure.time_matrix_product())
    found = ", ".join(f"{name} {value:.1e}" if name != "failed" else value for name, value in differences.items())
    sections = {
        "": f"{options.model}, float32, images of 224 x 224. torch {torch}, {measure.describe_machine(product_seconds=product)}"
        f"\n\n{options.command}\n\nRelative differences between both: {found}.",
        "Times": measure.format_table(rows),
    }
    if memory:
        sections["Peak memory of the process"] = measure.format_table(memory)
    measure.write_results(options.output, title="This project and PyTorch", sections=sections)


if __name__ == "__main__":
    main()
