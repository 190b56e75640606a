"""Programs that execute one call of an op, and random arrays for them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.calls import OpCall

Arrays = dict[str, Any]
_MARGIN = 1.5  # pixels that points may lie beyond the map, where they count as zero


def make_program(call: OpCall, implementation: str) -> Callable[[Arrays, Any], Arrays]:
    """A function that executes the call.

    Args:
      call: the call.
      implementation: of the op.

    Returns:
      A function (arrays of the call, gradient with respect to its result) -> arrays: "result", and if the call is
      differentiated, the gradient with respect to each array of floating point numbers, by its name.
    """

    def execute(arrays):
        return call.function(**arrays, **dict(call.options), implementation=implementation)

    def execute_and_differentiate(arrays, gradient):
        if not call.differentiated:
            return {"result": execute(arrays)}
        floating = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.floating)}
        rest = {name: array for name, array in arrays.items() if name not in floating}
        result, pull_back = jax.vjp(lambda floating: execute({**rest, **floating}), floating)
        return {"result": result, **pull_back(gradient.astype(result.dtype))[0]}

    return execute_and_differentiate


def make_arrays(call: OpCall, *, examples: int) -> Arrays:
    """Random arrays (numpy) of the shapes and dtypes of a call, always the same.

    Args:
      call: the call.
      examples: number of different examples, a divisor of the batch size; the batch repeats them.
    """
    rng = np.random.default_rng(0)
    arrays = {name: _make_array(name, shape, call, rng).astype(jnp.dtype(dtype)) for name, shape, dtype in call.arrays}
    return repeat_examples(call, take_examples(call, arrays, examples), examples)


def _make_array(name: str, shape: tuple[int, ...], call: OpCall, rng: np.random.Generator) -> np.ndarray:
    map_shape = call.main_array[0][1:3]
    if name == "points":  # of the map, or of the map that the table was made for
        tables = [shape for other, shape, _ in call.arrays if other == "table"]
        last = np.array([(side - 1) // 2 for side in tables[0][1:]] if tables else [side - 1 for side in map_shape])
        is_inside = dict(call.options).get("points_inside") or call.op == "deformable_branch"
        margin = 0.0 if is_inside else _MARGIN
        return rng.uniform(-margin, last + margin, shape)
    if name == "sizes":  # whole maps: results beyond the size of an example mean nothing and cannot be compared
        return np.broadcast_to(np.array(map_shape), shape)
    if name == "key_mask":
        mask = rng.random(shape) < 0.8
        mask[:, 0] = True
        return mask
    is_kernel = name.startswith(("kernel", "taps")) and len(shape) > 1
    return rng.standard_normal(shape) * (1 / math.sqrt(math.prod(shape[:-1])) if is_kernel else 1.0)


def make_gradient(call: OpCall, result: jax.ShapeDtypeStruct, *, examples: int) -> np.ndarray:
    """A random gradient with respect to the result of a call, which repeats ``examples`` as ``make_arrays`` does."""
    gradient = np.random.default_rng(1).standard_normal(result.shape).astype(jnp.dtype(result.dtype))
    return repeat_examples(call, {"result": gradient[:examples]}, examples)["result"]


def take_examples(call: OpCall, arrays: Arrays, examples: int) -> Arrays:
    """The first examples of arrays with a batch, and the other arrays whole."""
    names = _find_batched(call)
    return {name: array[:examples] if name in names else array for name, array in arrays.items()}


def repeat_examples(call: OpCall, arrays: Arrays, examples: int) -> Arrays:
    """Arrays of the batch size of the call, which repeat their ``examples``; arrays without a batch stay as they are."""
    names, times = _find_batched(call), call.main_array[0][0] // examples
    return {name: np.concatenate([array] * times) if name in names else array for name, array in arrays.items()}


def expect_whole_batch(call: OpCall, results: Arrays, examples: int) -> Arrays:
    """Results and gradients of a whole batch that repeats some examples, from those of ``make_program`` for these examples.

    The gradient with respect to an array without a batch is the sum over all examples.
    """
    names, times = _find_batched(call), call.main_array[0][0] // examples
    summed = {name: array if name in names else times * array for name, array in results.items()}
    return repeat_examples(call, summed, examples)


def count_examples(batch: int) -> int:
    """Number of different examples in a batch that repeats them: its smallest divisor above 1."""
    return next((count for count in range(2, batch + 1) if batch % count == 0), 1)


def _find_batched(call: OpCall) -> set[str]:
    """Names of the arrays with a batch, and of the result. A bias may have a first axis of 1 for all examples."""
    batch = call.main_array[0][0]
    return {"result", *(name for name, shape, _ in call.arrays if name in call.batched and shape[0] == batch)}
