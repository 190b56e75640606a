"""Forward-mode differentiation, which ``implementation="plain"`` supports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.models.backbone import Backbone
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.layers.mlp import conv_mlp
from tests.models.test_mesh_axes import make_classifier

SIDE = 32


def random_like(tree, seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape) * 0.1), tree)


def make_function(model):
    """A function of the parameters, and random float64 parameters and tangents."""
    images = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables):
        return sum((leaf**2).mean() for leaf in jax.tree.leaves(model.apply(variables, images)))

    return loss, random_like(shapes, 1), random_like(shapes, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kinds", ["ND", "LS", "PEX"])
def test_plain_model_has_forward_mode_and_hessian_vector_products(kinds):
    model = make_classifier(kinds, implementation="plain", dtype=jnp.float64)
    loss, variables, tangents = make_function(model)
    step = 1e-5

    @jax.jit
    def derivatives(variables):
        return jax.jvp(jax.value_and_grad(loss), (variables,), (tangents,))

    def shifted(factor):
        return jax.tree.map(lambda x, t: x + factor * t, variables, tangents)

    (_, _), computed = derivatives(variables)
    upper, lower = derivatives(shifted(step))[0], derivatives(shifted(-step))[0]
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * step), upper, lower)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), computed, expected)


def test_plain_backbone_has_forward_mode():
    dat = make_classifier("ND", implementation="plain", remat="blocks")
    loss, variables, tangents = make_function(Backbone(dat, out_indices=(0,)))
    product = jax.eval_shape(lambda v: jax.jvp(jax.grad(loss), (v,), (tangents,))[1], variables)
    assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, variables)


def test_fast_model_raises_the_error_of_jax_in_forward_mode():
    loss, variables, tangents = make_function(make_classifier("N"))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jit(lambda v: jax.jvp(loss, (v,), (tangents,))).lower(variables)


@pytest.mark.usefixtures("x64")
def test_plain_ops_have_forward_mode():

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 4)))

    def attend(x):
        return neighborhood_attention(
            x, 2 * x, x, jnp.ones((2, 5, 5)), kernel_size=3, num_heads=2, implementation="plain"
        )

    def mlp(x):
        weights = (
            jnp.ones((4, 8)),
            jnp.ones(8),
            jnp.ones((3, 3, 1, 8)) / 9,
            jnp.ones(8),
            jnp.ones((8, 4)),
            jnp.ones(4),
        )
        return conv_mlp(x, *weights, implementation="plain")

    for op in (jax.jit(attend), jax.jit(mlp)):
        tangent = jax.jvp(op, (x,), (x,))[1]
        np.testing.assert_allclose(tangent, (op(x * (1 + 1e-6)) - op(x * (1 - 1e-6))) / 2e-6, rtol=1e-5, atol=1e-6)
