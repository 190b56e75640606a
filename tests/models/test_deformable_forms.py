"""The two published forms of deformable attention as modules, compared with the definition in normalized coordinates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.models.attention import DeformableAttention
from dat_jax.ops import dispatch
from dat_jax.ops.attention.grid_sample import to_pixels
from tests.helpers.random_variables import random_variables
from tests.helpers.tiers import slow
from tests.reference import attention as reference
from tests.reference import compare, sampling

TABLE_MAP = (4, 5)
OTHER_MAPS = [slow(shape) for shape in ((4, 4), (1, 5), (6, 1), (1, 1))]


@pytest.fixture(autouse=True)
def interpreted_kernels():
    """Interprets Pallas kernels, as there is no TPU."""
    with dispatch.interpreted_kernels():
        yield


def make_attention(implementation="auto", *, form="cvpr2022", range_factor=2.0, bias="table"):
    return DeformableAttention(
        num_heads=4,
        num_groups=2,
        key_stride=1,
        offset_kernel=3,
        offset_range_factor=range_factor,
        position_bias=bias,
        use_offsets=True,
        table_shape=TABLE_MAP,
        form=form,
        dtype=jnp.float64,
        implementation=implementation,
    )


def attend_by_definition(params, x, positions):
    """Samples features at the positions, and computes the projections and the attention with half-pixel queries."""
    map_shape = x.shape[1:3]
    flat_positions = positions.reshape(*positions.shape[:2], -1, 2)

    def project(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"].reshape((1,) * (x.ndim - 1) + (-1,))

    sampled = sampling.grid_sample(x, to_pixels(flat_positions, map_shape))
    bias = sampling.position_bias(params["rpe_table"], flat_positions, map_shape, released=True)
    flat_query = project("proj_q", x).reshape(x.shape[0], -1, x.shape[-1])
    out = reference.attend(flat_query, project("proj_k", sampled), project("proj_v", sampled), num_heads=4, bias=bias)
    return project("proj_out", out.reshape(x.shape))


# The map that the table was made for; square and rectangular maps of other sizes; lines; one pixel, which has one key.
@pytest.mark.parametrize("map_shape", [TABLE_MAP, (7, 3), *OTHER_MAPS])
@pytest.mark.parametrize("range_factor", [2.0, slow(0.0), slow(-1.0)])
def test_released_form_equals_its_definition_on_any_map(x64, map_shape, range_factor):
    (x,) = compare.normal(0, (2, *map_shape, 8))
    variables = random_variables(make_attention(range_factor=range_factor), x)
    for implementation in ("auto", "plain", "pallas"):
        module = make_attention(implementation, range_factor=range_factor)
        actual, state = jax.jit(lambda v, x, m=module: m.apply(v, x, mutable=["intermediates"]))(variables, x)
        (positions,) = state["intermediates"]["positions"]
        assert positions.shape == (2, 2, *map_shape, 2)
        expected = attend_by_definition(variables["params"], x, positions)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_gradients_of_the_released_form_agree_between_implementations(x64):
    (x,) = compare.normal(1, (1, 5, 4, 8))
    variables = random_variables(make_attention(), x)

    def gradients(implementation):
        module = make_attention(implementation)
        return jax.jit(jax.grad(lambda v: jnp.sin(module.apply(v, x)).sum()))(variables)

    expected = gradients("plain")
    assert float(jnp.abs(expected["params"]["conv_offset_3"]["kernel"]).max()) > 1e-6
    for implementation in ("auto", "pallas"):
        jax.tree.map(
            lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-10),
            gradients(implementation),
            expected,
        )


@pytest.mark.slow
def test_forms_differ_for_the_same_parameters(x64):
    (x,) = compare.normal(2, (1, *TABLE_MAP, 8))
    variables = random_variables(make_attention(), x)
    released, later = (make_attention(form=form).apply(variables, x) for form in ("cvpr2022", "dat_pp"))
    assert float(jnp.abs(released - later).max()) > 1e-3


def test_models_have_the_form_that_their_published_weights_were_trained_with():
    forms = {name: dat_jax.create_model(name).deformable_form for name in dat_jax.list_models()}
    released = {"dat_tiny", "dat_small", "dat_base", "dat_base_384"}
    assert {name for name, form in forms.items() if form == "cvpr2022"} == released
    assert set(forms.values()) == {"cvpr2022", "dat_pp"}


def test_dat_base_384_has_windows_of_12_and_tables_for_384():
    model = dat_jax.create_model("dat_base_384")
    assert model.window_sizes == (12,) * 4
    assert [model.table_shape(stage=stage) for stage in range(4)] == [(96, 96), (48, 48), (24, 24), (12, 12)]
    assert math.prod(model.map_shape((384, 384), stage=3)) == 144


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(deformable_form="v1"), "Unknown deformable_form 'v1'; choose one of dat_pp, cvpr2022."),
        (dict(position_bias=("log_cpb",) * 4), 'Stage 2: deformable_form "cvpr2022" has no position bias "log_cpb".'),
    ],
)
def test_invalid_settings_raise(settings, message):
    model = dat_jax.create_model("dat_tiny", **settings)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
