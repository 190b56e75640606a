"""The model with kernels compared with the plain one: parameters, training with drop path, gradients, loops over blocks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.ops import dispatch
from tests.helpers import tiny_config
from tests.helpers.random_variables import random_variables
from tests.reference import compare


@pytest.fixture(autouse=True)
def interpreted_kernels():
    with dispatch.interpreted_kernels():
        yield


def make_model(implementation, **overrides):
    """One stage with both kinds of attention, on a map of 8 x 8."""
    settings = dict(num_classes=3, dim_stem=4, dims=(4,), drop_path_rate=0.6, dtype=jnp.float64)
    return dat_jax.DAT(**tiny_config.ONE_STAGE | settings | overrides, implementation=implementation)


def make_step(model, images):
    """A function of the variables that returns gradients and logits of training with drop path."""

    def loss(variables):
        logits = model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(3)})
        return jnp.sin(logits).sum(), logits

    return jax.grad(loss, has_aux=True)


def count_kernels(model, images):
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return str(jax.make_jaxpr(make_step(model, images))(variables)).count("pallas_call[")


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, dict(layer_scale_init=(0.5,)), dict(stages=("NDND",), scan_blocks=True)])
def test_kernels_equal_the_plain_model_in_training(x64, overrides):
    """Drop path drops the same examples."""
    images = jax.random.normal(jax.random.key(0), (3, 32, 32, 3))
    plain, kernels = (make_model(name, **overrides) for name in ("plain", "pallas"))
    variables = random_variables(plain, images)
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(m.init, jax.random.key(0), images)) for m in (plain, kernels)]
    assert shapes[0] == shapes[1]
    steps = (jax.jit(make_step(m, images), compiler_options=compare.compiler_options()) for m in (plain, kernels))
    (expected_gradients, expected), (gradients, logits) = (step(variables) for step in steps)
    assert float(jnp.abs(expected[0] - expected[1]).max()) > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)
    # Parameters and their gradients are float32, of which 1.2e-7 is the relative step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2.5e-7, atol=1e-8), gradients, expected_gradients)


def test_a_block_consists_of_kernels(x64):
    """Forward and backward: local perception, attention and MLP, and for keys the norm with the query and the sampling."""
    images = jnp.ones((2, 32, 32, 3))
    assert count_kernels(make_model("pallas"), images) == 2 * (3 + 5)
    assert count_kernels(make_model("pallas", layer_scale_init=(0.5,)), images) == 2 * (3 + 4)
    assert count_kernels(make_model("plain"), images) == 0


def test_maps_whose_branch_does_not_fit_run_op_by_op():
    """The backward pass of the branch would need 121 MiB of VMEM for 48 x 48 pixels of 256 channels, in the D block."""
    settings = dict(
        image_size=192, dims=(256,), num_heads=(8,), num_groups=(4,), dtype=jnp.bfloat16, drop_path_rate=0.0
    )
    settings |= dict(key_strides=(4,), offset_kernels=(7,), neighborhood_sizes=(7,))
    images = jax.ShapeDtypeStruct((1, 192, 192, 3), jnp.float32)
    found = {kind: make_model("pallas", stages=(kind,), **settings) for kind in "ND"}
    names = {}
    for kind, model in found.items():
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        text = str(jax.make_jaxpr(lambda v, x, m=model: make_step(m, x)(v))(variables, images))
        names[kind] = set(re.findall(r"attention_branch|attention_backward|deformable_rows", text))
    assert "attention_branch" in names["N"]
    assert "attention_branch" not in names["D"]
    assert names["D"]
