"""The model and its settings: block types, position biases, sizes, dtypes, drop path, initialization, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.models.attention import POSITION_BIAS_KINDS
from dat_jax.models.dat import STAGE_TYPES
from tests.helpers.random_variables import random_variables
from tests.helpers.tiers import slow
from tests.reference import compare


def make_small(**overrides):
    """A model of two stages with one block each."""
    settings = dict(
        num_classes=5,
        image_size=64,
        dim_stem=8,
        dims=(16, 24),  # different from the stem, and not doubled
        stages=("N", "D"),
        num_heads=(2, 2),
        num_groups=(1, 2),
        key_strides=(2, 2),
        offset_kernels=(3, 3),
        offset_range_factors=(-1, -1),
        position_bias=("table", "table"),
        use_offsets=(True, True),
        window_sizes=(7, 7),
        neighborhood_sizes=(7, 7),
        reduction_ratios=(2, 2),
        lpu=(True, True),
        conv_mlp=(True, True),
        layer_scale_init=(-1, -1),
    )
    return dat_jax.DAT(**{**settings, **overrides})


def random_images(*shape):
    return jax.random.normal(jax.random.key(0), (*shape, 3))


def apply(model, variables, images, **options):
    return jax.jit(lambda v, x: model.apply(v, x, **options))(variables, images)


def run(model, images, **options):
    return apply(model, random_variables(model, images), images, **options)


@pytest.mark.parametrize("kind", [kind if kind == "D" else slow(kind) for kind in sorted(STAGE_TYPES)])
def test_every_block_type_takes_any_map_and_differentiates(kind):
    model, images = make_small(stages=(kind, kind), layer_scale_init=(0.5, 0.5)), random_images(1, 45, 70)
    variables = random_variables(model, images)
    gradients = jax.jit(jax.grad(lambda v: (model.apply(v, images) ** 2).sum()))(variables)["params"]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for block in (gradients["stages_0"]["blocks_0"], gradients["stages_1"]["blocks_0"]):
        attention = {"conv": block["conv"]} if kind == "X" else block["attn"]
        assert all(jnp.abs(leaf).max() > 0 for path, leaf in jax.tree_util.tree_leaves_with_path(attention))


@pytest.mark.slow
@pytest.mark.parametrize("use_offsets", [True, False])
@pytest.mark.parametrize("kind", POSITION_BIAS_KINDS)
def test_every_position_bias_takes_any_map(kind, use_offsets):
    model = make_small(stages=("D", "D"), position_bias=(kind, kind), use_offsets=(use_offsets, use_offsets))
    variables = random_variables(model, random_images(1, 64, 64))
    for shape in [(64, 64), (33, 90)]:
        logits, state = apply(model, variables, random_images(2, *shape), mutable=["intermediates"])
        assert logits.shape == (2, 5)
        assert jnp.isfinite(logits).all()
        positions = state["intermediates"]["stages_1"]["blocks_0"]["attn"]["positions"][0]
        height, width = (math.ceil(math.ceil(side / 8) / 2) for side in shape)
        assert positions.shape == (2, 2, height, width, 2)
        assert jnp.abs(positions).max() <= 1
    has_table = any("rpe_table" in name for name in variables["params"]["stages_1"]["blocks_0"]["attn"])
    assert has_table == (kind != "none" and use_offsets)


@pytest.mark.slow
def test_fixed_bias_is_not_resized_on_the_map_it_was_made_for():
    model, images = make_small(position_bias=("none", "fixed")), random_images(1, 64, 64)
    variables = random_variables(model, images)
    table = variables["params"]["stages_1"]["blocks_0"]["attn"]["rpe_table"]
    assert table.shape == (2, 8 * 8, 4 * 4)
    gradients = jax.jit(jax.grad(lambda v: model.apply(v, images).sum()))(variables)["params"]
    assert jnp.abs(gradients["stages_1"]["blocks_0"]["attn"]["rpe_table"]).max() > 0


def test_positions_without_offsets_equal_the_reference_grid():
    model = make_small(use_offsets=(True, False))
    _, state = run(model, random_images(1, 64, 64), mutable=["intermediates"])
    positions = state["intermediates"]["stages_1"]["blocks_0"]["attn"]["positions"][0]
    lines = np.minimum((np.arange(4) + 0.5) / 3 * 2 - 1, 1)
    np.testing.assert_allclose(positions[0, 0, :, 0, 0], lines, rtol=1e-6)
    np.testing.assert_allclose(positions[0, 1, 0, :, 1], lines, rtol=1e-6)


@pytest.mark.slow
def test_smallest_image_has_a_map_of_one_pixel():
    model = dat_jax.create_model("dat_pp_nano", image_size=32, stages=("N", "N", "N", "D"))
    logits = run(model, random_images(1, 32, 32))
    assert jnp.isfinite(logits).all()
    assert [x.shape[1:3] for x in run(model, random_images(1, 32, 32), method="features")] == [
        (8, 8),
        (4, 4),
        (2, 2),
        (1, 1),
    ]


def test_features_round_sizes_up_with_convolutions_and_down_with_patches():
    for conv_patches, expected in [(True, [(12, 17), (6, 9)]), (False, [(11, 16), (5, 8)])]:
        maps = run(make_small(conv_patches=conv_patches), random_images(1, 45, 67), method="features")
        assert [x.shape[1:3] for x in maps] == expected
        assert [x.shape[3] for x in maps] == [16, 24]


def test_bfloat16_is_close_to_float32_with_float32_parameters_and_positions():
    images = random_images(2, 64, 64)
    variables = random_variables(make_small(), images)
    expected = apply(make_small(), variables, images)
    actual, state = apply(make_small(dtype=jnp.bfloat16), variables, images, mutable=["intermediates"])
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert actual.dtype == jnp.float32
    assert state["intermediates"]["stages_1"]["blocks_0"]["attn"]["positions"][0].dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=0.05 * float(jnp.abs(expected).max()))
    assert apply(make_small(dtype=jnp.bfloat16), variables, images, method="features")[0].dtype == jnp.bfloat16


def test_drop_path_drops_whole_examples_only_in_training():
    images = jnp.broadcast_to(random_images(1, 64, 64), (16, 64, 64, 3))
    model = make_small(drop_path_rate=0.5)
    variables = random_variables(model, images)
    evaluated = apply(model, variables, images)
    np.testing.assert_allclose(evaluated, jnp.broadcast_to(evaluated[:1], evaluated.shape), rtol=1e-4)
    trained = apply(model, variables, images, train=True, rngs={"dropout": jax.random.key(2)})
    # The last block has two branches, each dropped or not for a whole example: at most four different results.
    assert 2 <= len(np.unique(np.round(np.asarray(trained), 4), axis=0)) <= 4


def test_drop_path_rates_rise_linearly():
    model = dat_jax.create_model("dat_pp_nano", drop_path_rate=0.5).bind({})
    rates = [rate for stage in model.stage_modules for rate in stage.drop_path_rates]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 6))


def value_gradients_and_intermediates(model, variables, images):
    def loss(params):
        out, state = model.apply({"params": params}, images, mutable=["intermediates"])
        return (out**2).sum(), state

    program = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compare.compiler_options())
    return program(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [dict(scan_blocks=True), dict(remat="blocks"), dict(remat="dots"), dict(remat="dots", scan_blocks=True)],
)
def test_scan_and_remat_change_nothing(x64, options):
    """Compares loss, gradients and key positions, for parameters with the same names."""
    settings = dict(stages=("NDND", "DD"), dtype=jnp.float64, drop_path_rate=0.2)
    images = random_images(2, 40, 56).astype(jnp.float64)
    plain, model = make_small(**settings), make_small(**settings, **options)
    variables = random_variables(plain, images)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, variables, random_variables(model, images))
    assert all(jax.tree.leaves(same))
    (expected_loss, expected_state), expected = value_gradients_and_intermediates(plain, variables, images)
    (loss, state), gradients = value_gradients_and_intermediates(model, variables, images)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), state, expected_state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), gradients, expected)


def test_scan_compiles_one_repetition():
    model = make_small(stages=("NDNDND", "D"))
    images = random_images(1, 64, 64)
    variables = random_variables(model, images)
    products = [
        str(jax.make_jaxpr(lambda v, m=m: m.apply(v, images))(variables)).count("dot_general")
        for m in (model, model.clone(scan_blocks=True))
    ]
    assert products[1] < 0.5 * products[0]


@pytest.mark.slow
def test_scan_uses_the_drop_path_rate_of_each_block():
    """Rates 0, 1/6 ... 1/2: each of the two branches of the last block is dropped for half of the examples."""
    images = jnp.broadcast_to(random_images(1, 64, 64), (64, 64, 64, 3))
    model = make_small(stages=("D", "DDD"), drop_path_rate=0.5, scan_blocks=True)
    variables = random_variables(model, images)
    zeroed = jax.tree.map(jnp.zeros_like, variables["params"]["stages_1"])
    zeroed["blocks_2"] = variables["params"]["stages_1"]["blocks_2"]  # only the last block changes its input
    variables = {"params": {**variables["params"], "stages_1": zeroed}}
    trained = apply(model, variables, images, train=True, rngs={"dropout": jax.random.key(2)})
    results, counts = np.unique(np.round(np.asarray(trained), 4), axis=0, return_counts=True)
    assert 3 <= len(results) <= 4
    assert counts.max() < 40
    with pytest.raises(ValueError, match="Unknown remat 'all'; choose one of none, blocks, dots"):
        apply(make_small(remat="all"), variables, images)


def test_initialization_equals_the_published_one():
    model = make_small(stages=("ND", "D"), image_size=224)
    params = jax.jit(model.init)(jax.random.key(0), random_images(1, 64, 64))["params"]
    block = params["stages_0"]["blocks_1"]
    for layer, fan_in in [
        (block["attn"]["proj_q"], 16),
        (block["mlp"]["linear2"], 64),
        (block["mlp"]["dwc"], 9),
        (params["patch_proj"]["conv2"], 4 * 9),
        (params["cls_head"], 24),
    ]:
        bound = 1 / np.sqrt(fan_in)
        for leaf in (layer["kernel"], layer["bias"]):
            assert jnp.abs(leaf).max() <= bound
            if leaf.size > 100:
                np.testing.assert_allclose(jnp.std(leaf), bound / np.sqrt(3), rtol=0.15)
    assert "bias" not in block["attn"]["conv_offset_3"]
    np.testing.assert_allclose(jnp.std(block["attn"]["rpe_table"]), 0.01, rtol=0.15)
    np.testing.assert_allclose(jnp.std(params["stages_0"]["blocks_0"]["attn"]["rpb"]), 0.02, rtol=0.25)
    np.testing.assert_array_equal(params["cls_norm"]["scale"], 1)


@pytest.mark.parametrize(
    ("overrides", "shape", "message"),
    [
        (dict(), (1, 31, 64), "sides of at least 32 pixels, got"),
        (dict(), (0, 64, 64), "at least one, with sides of at least 32 pixels, got .0, 64, 64, 3"),
        (dict(stages=("N", "Q")), (1, 64, 64), "Unknown block type 'Q'.*choose from"),
        (dict(num_heads=(3, 2)), (1, 64, 64), "3 heads do not divide 16 channels"),
        (dict(num_groups=(1, 5)), (1, 64, 64), "5 groups must divide"),
        (dict(lpu=(True,)), (1, 64, 64), "lpu expected one entry for each of the 2 stages"),
        (dict(position_bias=("table", "tabel")), (1, 64, 64), "Unknown position bias 'tabel'; choose one of table"),
        (dict(stages=("E", "D"), num_heads=(8, 2)), (1, 64, 64), "multiple of 4 \\* 8 heads"),
        (dict(stages=("X", "D"), window_sizes=(4, 7)), (1, 64, 64), "X blocks need an odd window size, got 4"),
        (dict(drop_path_rate=1.0), (1, 64, 64), "drop_path_rate must be in .0, 1., got 1.0"),
        (dict(implementation="rows"), (1, 64, 64), "Unknown implementation 'rows'"),  # of one op, not of all
        (
            dict(implementation="fast"),
            (1, 64, 64),
            "Unknown implementation 'fast'; choose one of auto, plain, pallas, triton",
        ),
    ],
)
def test_invalid_settings_raise(overrides, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(make_small(**overrides).init, jax.random.key(0), jnp.zeros((*shape, 3)))
