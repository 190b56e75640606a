"""Programs that execute one call of an op, and random arrays for them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.ops.calls import OpCall

Arrays = dict[str, Any]


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


def make_arrays(call: OpCall) -> Arrays:
    """Random arrays (numpy) of the shapes and dtypes of a call, always the same."""
    rng = np.random.default_rng(0)
    return {name: _make_array(name, shape, call, rng).astype(jnp.dtype(dtype)) for name, shape, dtype in call.arrays}


def _make_array(name: str, shape: tuple[int, ...], call: OpCall, rng: np.random.Generator) -> np.ndarray:
    map_shape = call.main_array[0][1:3]
    if name == "points":  # inside the map, or inside the map that the table was made for
        tables = [shape for other, shape, _ in call.arrays if other == "table"]
        sides = [(side - 1) // 2 for side in tables[0][1:]] if tables else [side - 1 for side in map_shape]
        return rng.uniform(0, 1, shape) * np.reshape(sides, (1,) * (len(shape) - 1) + (2,))
    if name == "sizes":  # whole maps: results beyond the size of an example mean nothing and cannot be compared
        return np.broadcast_to(np.array(map_shape), shape)
    if name == "key_mask":
        mask = rng.random(shape) < 0.8
        mask[:, 0] = True
        return mask
    is_kernel = name.startswith(("kernel", "taps")) and len(shape) > 1
    return rng.standard_normal(shape) * (1 / math.sqrt(math.prod(shape[:-1])) if is_kernel else 1.0)


def make_gradient(call: OpCall, result: jax.ShapeDtypeStruct, *, examples: int) -> np.ndarray:
    """A random gradient with respect to the result of a call, zero after the first ``examples``."""
    gradient = np.random.default_rng(1).standard_normal(result.shape)
    gradient[examples:] = 0
    return gradient.astype(jnp.dtype(result.dtype))


def take_examples(call: OpCall, arrays: Arrays, count: int) -> Arrays:
    """The first ``count`` examples of arrays with a batch, and the other arrays whole."""
    batch = call.main_array[0][0]
    return {
        name: array[:count] if name in {*call.batched, "result"} and array.shape[0] == batch else array
        for name, array in arrays.items()
    }
