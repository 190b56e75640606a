"""Random inputs, and comparison of values and gradients of functions."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings

from dat_jax.training.compilation import known_options


def compiler_options():
    """Compiler options that compile tiny programs three to five times faster; compilation dominates their time."""
    return known_options({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})


def few_examples(count):
    """Hypothesis settings for a few fixed examples, because each new shape is compiled."""
    fixture = HealthCheck.function_scoped_fixture  # fixture x64 is the same for all examples
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[fixture])


def run(function, *arguments):
    """Output of a jitted function as a numpy array."""
    return np.asarray(jax.jit(function, compiler_options=compiler_options())(*arguments))


def normal(seed, *shapes):
    """Random arrays of the given shapes."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


def random_points(seed, shape, map_shape, *, margin=2.0):
    """Points (*shape, 2), in pixels, on and around a map; none has an integer coordinate."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-margin, np.asarray(map_shape) - 1 + margin, (*shape, 2))


def value_and_gradients(function, *arguments):
    """Output of a function, and the gradients of a weighted sum of it with respect to each argument."""

    def weighted_sum(*arguments):
        out = function(*arguments)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * weights).sum(), out

    differentiated = jax.value_and_grad(weighted_sum, argnums=tuple(range(len(arguments))), has_aux=True)
    (_, out), gradients = jax.jit(differentiated, compiler_options=compiler_options())(*arguments)
    return [np.asarray(x) for x in (out, *gradients)]


def assert_same(functions, reference, *arguments, tolerance=1e-10):
    """Checks that functions, by name, have the output and gradients of a reference, in float64."""
    expected = value_and_gradients(reference, *arguments)
    assert all(np.isfinite(x).all() for x in expected)
    for name, function in functions.items():
        actual = value_and_gradients(function, *arguments)
        for index, (actual_array, expected_array) in enumerate(zip(actual, expected, strict=True)):
            what = f"{name}: " + (f"gradient of argument {index - 1}" if index else "output")
            assert actual_array.dtype == expected_array.dtype == np.float64, what
            np.testing.assert_allclose(actual_array, expected_array, rtol=tolerance, atol=tolerance, err_msg=what)


def assert_close_in_bfloat16(function, *arguments, tolerance, keep_float32=()):
    """Checks that bfloat16 arguments give a bfloat16 output close to the float32 output.

    Arguments with an index in ``keep_float32`` stay float32.
    """
    full = [np.asarray(x, np.float32) for x in arguments]
    half = [x if index in keep_float32 else x.astype(jnp.bfloat16) for index, x in enumerate(full)]
    actual, expected = run(function, *half), run(function, *full)
    assert actual.dtype == jnp.bfloat16
    assert expected.dtype == np.float32
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=tolerance, atol=tolerance)
