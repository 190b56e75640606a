"""Attention weights of a model's blocks, computed again, give what its attention gave."""

import jax
import numpy as np
import pytest

from dat_jax.models.attention_weights import compute_attention
from dat_jax.models.dat import DAT
from tests.helpers.random_variables import random_variables

STAGES = 4
IMAGES = np.random.default_rng(1).standard_normal((2, 48, 64, 3)).astype(np.float32)


def make_model(**settings):
    """Every kind of bias; the last stage's map is smaller than the window."""
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


@pytest.fixture(scope="module", params=[{}, RELEASED], ids=["dat_pp", "cvpr2022"])
def looked(request):
    model = make_model(**request.param)
    variables = random_variables(model, IMAGES)
    capture = dict(
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: module.name in ("attn", "proj_v", "qkv", "rpe_table"),
    )
    _, state = jax.jit(lambda v, x: model.apply(v, x, **capture))(variables, IMAGES)
    found = jax.jit(lambda v, x: compute_attention(model, v, x))(variables, IMAGES)
    return model, variables, jax.device_get(state["intermediates"]), jax.device_get(found)


def test_weights_times_values_are_the_output_of_the_models_own_attention(looked):
    _, variables, states, found = looked
    assert list(found) == [
        f"stages_{i}/blocks_{j}" for i, j in ((0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (3, 0), (3, 1))
    ]
    for name, block in found.items():
        stage, index = name.split("/")
        params, state = variables["params"][stage][index]["attn"], states[stage][index]["attn"]
        wanted = state["__call__"][0]
        weights = block["weights"]
        if "positions" in block:
            values, projection = state["proj_v"]["__call__"][0], params["proj_out"]
            heads = np.stack(np.split(values, weights.shape[1], axis=-1), axis=1)  # (B, M, N, D)
            out = np.moveaxis(weights @ heads, 1, 2).reshape(wanted.shape)
            if "rpe_table" in state:
                out = out + state["rpe_table"]["__call__"][0]  # "dwc"
            np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
            assert block["references"].shape == block["positions"].shape[2:]
        else:
            values, projection = np.split(state["qkv"]["__call__"][0], 3, axis=-1)[2], params["proj"]
            out = _attend_to_windows(weights, values)[:, : wanted.shape[1], : wanted.shape[2]]
        kernel = projection["kernel"].reshape(out.shape[-1], -1)
        np.testing.assert_allclose(out @ kernel + projection["bias"], wanted, rtol=1e-5, atol=1e-5)


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


def test_keys_are_where_the_model_says_and_every_group_has_its_own(looked):
    _, _, states, found = looked
    positions = found["stages_2/blocks_0"]["positions"]
    np.testing.assert_array_equal(positions, states["stages_2"]["blocks_0"]["attn"]["positions"][0])
    assert positions.shape[:2] == (2, 2)
    assert abs(positions[:, 0] - positions[:, 1]).max() > 1e-3


def test_a_model_whose_blocks_are_scanned_and_recomputed_has_the_same(looked):
    model, variables, _, found = looked
    model = model.clone(scan_blocks=True, remat="blocks")
    again = jax.jit(lambda v, x: compute_attention(model, v, x))(variables, IMAGES)
    assert found
    assert set(again) == set(found)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), found)


def test_keys_without_offsets_have_no_bias():
    model = make_model(use_offsets=(False,) * 4)
    variables = random_variables(model, IMAGES)
    found = compute_attention(model, variables, IMAGES)["stages_0/blocks_1"]
    positions = found["positions"]
    np.testing.assert_allclose(positions[0, 0], np.clip(found["references"], -1, 1))
