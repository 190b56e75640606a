"""Attention weights of a model's blocks reproduce the output of its attention."""

import jax
import numpy as np
import pytest

from dat_jax.models.attention_weights import compute_attention
from dat_jax.models.dat import DAT
from tests.helpers.random_variables import random_variables

STAGES = 4
IMAGES = np.random.default_rng(1).standard_normal((2, 48, 64, 3)).astype(np.float32)


def make_model(**settings):
    """A model with every kind of bias; the map of the last stage is smaller than the window."""
    return DAT(
        **dict(
            num_classes=3,
            image_size=64,
            dim_stem=8,
            dims=(8, 16, 16, 16),
            stages=("ND", "DLD", "D", "ND"),
            num_heads=(2, 4, 4, 4),
            num_groups=(1, 2, 2, 4),
            key_strides=(4, 2, 1, 1),
            offset_kernels=(3, 3, 3, 3),
            position_bias=("table", "fixed", "log_cpb", "dwc"),
            neighborhood_sizes=(3, 3, 3, 5),
            window_sizes=(4, 4, 4, 4),
        )
        | settings
    )


RELEASED = dict(
    deformable_form="cvpr2022", position_bias=("table", "fixed", "table", "dwc"), offset_range_factors=(2, -1, 2, -1)
)


@pytest.fixture(scope="module", params=[{}, pytest.param(RELEASED, marks=pytest.mark.slow)], ids=["dat_pp", "cvpr2022"])
def results(request):
    model = make_model(**request.param)
    variables = random_variables(model, IMAGES)
    capture = dict(
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in ("attn", "proj_v", "qkv", "rpe_table"),
    )
    _, state = jax.jit(lambda v, x: model.apply(v, x, **capture))(variables, IMAGES)
    attention = jax.jit(lambda v, x: compute_attention(model, v, x))(variables, IMAGES)
    return model, variables, jax.device_get(state["intermediates"]), jax.device_get(attention)


@pytest.mark.slow
def test_weights_times_values_equal_the_output_of_the_model(results):
    _, variables, states, attention = results
    assert list(attention) == [
        f"stages_{i}/blocks_{j}" for i, j in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (3, 0), (3, 1))
    ]
    for name, block in attention.items():
        stage, index = name.split("/")
        params, state = variables["params"][stage][index]["attn"], states[stage][index]["attn"]
        expected = state["__call__"][0]
        weights = block["weights"]
        if "positions" in block:
            values, projection = state["proj_v"]["__call__"][0], params["proj_out"]
            heads = np.stack(np.split(values, weights.shape[1], axis=-1), axis=1)  # (B, M, N, D)
            out = np.moveaxis(weights @ heads, 1, 2).reshape(expected.shape)
            if "rpe_table" in state:
                out = out + state["rpe_table"]["__call__"][0]  # "dwc"
            np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
            assert block["references"].shape == block["positions"].shape[2:]
        else:
            values, projection = np.split(state["qkv"]["__call__"][0], 3, axis=-1)[2], params["proj"]
            out = _attend_to_windows(weights, values)[:, : expected.shape[1], : expected.shape[2]]
        kernel = projection["kernel"].reshape(out.shape[-1], -1)
        np.testing.assert_allclose(out @ kernel + projection["bias"], expected, rtol=1e-5, atol=1e-5)


def _attend_to_windows(weights, values):
    _, _, height, width, size, _ = weights.shape
    heads = np.stack(np.split(values, weights.shape[1], axis=-1), axis=1)
    out = np.zeros(heads.shape, np.float32)
    for y in range(height):
        for x in range(width):
            top, left = (min(max(at - size // 2, 0), side - size) for at, side in ((y, height), (x, width)))
            window = heads[:, :, top : top + size, left : left + size]
            out[:, :, y, x] = (weights[:, :, y, x, ..., None] * window).sum(axis=(2, 3))
    return np.concatenate(list(np.moveaxis(out, 1, 0)), axis=-1)


def test_positions_equal_the_sown_ones_and_differ_between_groups(results):
    _, _, states, attention = results
    positions = attention["stages_2/blocks_0"]["positions"]
    np.testing.assert_array_equal(positions, states["stages_2"]["blocks_0"]["attn"]["positions"][0])
    assert positions.shape[:2] == (2, 2)
    assert abs(positions[:, 0] - positions[:, 1]).max() > 1e-3


@pytest.mark.slow
def test_scan_remat_and_kernels_change_nothing(results):
    model, variables, _, attention = results
    model = model.clone(scan_blocks=True, remat="blocks", implementation="pallas")
    again = jax.jit(lambda v, x: compute_attention(model, v, x))(variables, IMAGES)
    assert attention
    assert set(again) == set(attention)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), attention)


@pytest.mark.slow
def test_keys_without_offsets_have_no_bias():
    model = make_model(use_offsets=(False,) * 4)
    variables = random_variables(model, IMAGES)
    attention = compute_attention(model, variables, IMAGES)["stages_0/blocks_1"]
    positions = attention["positions"]
    np.testing.assert_allclose(positions[0, 0], np.clip(attention["references"], -1, 1))
