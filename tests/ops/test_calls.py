"""Calls of ops with "auto": what is recorded of them, and that a choice is used in the call that it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.ops import dispatch
from dat_jax.ops.attention.grid_sample import grid_sample
from dat_jax.ops.attention.neighborhood import neighborhood_attention
from dat_jax.ops.calls import chosen_implementations, recorded_calls

FEATURES, POINTS = jnp.ones((8, 4, 5, 6)), jnp.ones((8, 2, 3, 2))
KEY = "grid_sample(features=float32[8,4,5,6],points=float32[8,2,3,2])".replace(",p", ", p")


def test_a_call_is_recorded_with_shapes_dtypes_and_options():
    with recorded_calls(differentiated=False) as calls:
        grid_sample(FEATURES, points=POINTS)
        grid_sample(FEATURES, POINTS)
    assert list(calls) == [KEY]
    x, table = jnp.ones((2, 4, 4, 6), jnp.bfloat16), jnp.ones((2, 5, 5))
    with recorded_calls(differentiated=True) as calls:
        neighborhood_attention(x, x, x, table, kernel_size=3, num_heads=2, sizes=None)
    (call,) = calls.values()
    assert call.key == (
        "gradient of neighborhood_attention(query=bfloat16[2,4,4,6], key=bfloat16[2,4,4,6], value=bfloat16[2,4,4,6], "
        "table=float32[2,5,5], kernel_size=3, num_heads=2)"
    )
    assert call.main_array == ((2, 4, 4, 6), "bfloat16")


def test_calls_with_a_given_implementation_are_not_recorded():
    with recorded_calls(differentiated=False) as calls:
        grid_sample(FEATURES, POINTS, implementation="gather")
    assert calls == {}
    grid_sample(FEATURES, POINTS)  # after the context
    assert calls == {}


@pytest.mark.parametrize(("choices", "gathers"), [({}, True), ({KEY: "matmul"}, False), ({"another": "matmul"}, True)])
def test_a_choice_is_used_in_its_call(choices, gathers):
    with chosen_implementations(choices, differentiated=False):
        text = str(jax.make_jaxpr(lambda x, y: grid_sample(x, y))(FEATURES, POINTS))
    assert (" gather[" in text) == gathers


def test_a_choice_for_gradients_is_not_used_without_them():
    with chosen_implementations({f"gradient of {KEY}": "matmul"}, differentiated=False):
        text = str(jax.make_jaxpr(lambda x, y: grid_sample(x, y))(FEATURES, POINTS))
    assert " gather[" in text
    with chosen_implementations({f"gradient of {KEY}": "matmul"}, differentiated=True):
        text = str(jax.make_jaxpr(lambda x, y: grid_sample(x, y))(FEATURES, POINTS))
    assert " gather[" not in text


def test_on_a_mesh_a_call_has_the_batch_of_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    with recorded_calls(differentiated=False) as calls, dispatch.split_batch(mesh, mesh.axis_names):
        grid_sample(FEATURES, POINTS)
    assert list(calls) == ["grid_sample(features=float32[1,4,5,6], points=float32[1,2,3,2])"]
