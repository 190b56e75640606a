"""Random inputs, and comparison of functions by value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings

from dat_jax.training.compilation import known_options


def compiler_options():
    """Options that compile three to five times faster: the programs are tiny, compiling is most of the time."""
    return known_options({"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False})


def few_examples(count):
    """Hypothesis settings: always the same few examples, as each new shape is compiled anew."""
    fixture = HealthCheck.function_scoped_fixture  # x64 is the same for all examples
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=[fixture])


def run(function, *arguments):
    """The function's output as a numpy array."""
    return np.asarray(jax.jit(function, compiler_options=compiler_options())(*arguments))


def normal(seed, *shapes):
    """Random arrays of these shapes."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for shape in shapes]


def random_points(seed, shape, map_shape, *, margin=2.0):
    """(*shape, 2) pixels on and around a map, none of them on a pixel line."""
    generator = np.random.default_rng(seed)
    return generator.uniform(-margin, np.asarray(map_shape) - 1 + margin, (*shape, 2))


def value_and_gradients(function, *arguments):
    """Output, then the gradient of a weighted sum of it with respect to each argument."""

    def weighted_sum(*arguments):
        out = function(*arguments)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return (out * weights).sum(), out

    differentiated = jax.value_and_grad(weighted_sum, argnums=tuple(range(len(arguments))), has_aux=True)
    (_, out), gradients = jax.jit(differentiated, compiler_options=compiler_options())(*arguments)
    return [np.asarray(x) for x in (out, *gradients)]


def assert_same(functions, reference, *arguments, tolerance=1e-10):
    """Each of the named functions has the reference's output and gradients, in float64."""
    wanted = value_and_gradients(reference, *arguments)
    assert all(np.isfinite(x).all() for x in wanted)
    for name, function in functions.items():
        got = value_and_gradients(function, *arguments)
        for index, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            what = f"{name}: " + (f"gradient of argument {index - 1}" if index else "output")
            assert mine.dtype == theirs.dtype == np.float64, what
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance, err_msg=what)


def assert_close_in_bfloat16(function, *arguments, tolerance, kept=()):
    """bfloat16 arguments (but those whose index is in ``kept``) give a bfloat16 output near the float32 one."""
    full = [np.asarray(x, np.float32) for x in arguments]
    half = [x if index in kept else x.astype(jnp.bfloat16) for index, x in enumerate(full)]
    got, wanted = run(function, *half), run(function, *full)
    assert got.dtype == jnp.bfloat16
    assert wanted.dtype == np.float32
    np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=tolerance, atol=tolerance)
