"""Conversion of classifiers: a round trip of every type of block, and an error that names everything that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax import conversion
from dat_jax.conversion.official import official_shapes
from tests.helpers.golden_files import Golden, relative_error
from tests.helpers.random_variables import random_variables

SMALL = dict(
    img_size=64,
    num_classes=3,
    dim_stem=8,
    dims=[16, 32, 32, 32],
    depths=[1, 1, 1, 1],
    heads=[2, 2, 2, 2],
    groups=[1, 2, 2, 2],
    use_pes=[True] * 4,
    strides=[4, 2, 1, 1],
    offset_range_factor=[-1] * 4,
    ksizes=[5, 3, 3, 3],
    heads_q=[1, 1, 1, 1],
)
# Block types -> settings, and the published names and shapes of some parameters.
CASES = {
    "NLSP": (
        dict(stage_spec=["N", "L", "S", "P"], sr_ratios=[1, 1, 1, 2], use_lpus=[True] * 4, use_dwc_mlps=[True] * 4),
        {
            "stages.0.proj.weight": (16, 8, 1, 1),
            "stages.0.attns.0.qkv.weight": (48, 16),
            "stages.0.attns.0.rpb": (2, 5, 5),
            "stages.1.attns.0.proj_qkv.weight": (96, 32),
            "stages.2.attns.0.relative_position_bias_table": (169, 2),
            "stages.3.attns.0.q.weight": (32, 32, 1, 1),
            "stages.3.attns.0.kv.bias": (64,),
            "stages.3.attns.0.proj.weight": (32, 32, 1, 1),
            "stages.3.attns.0.proj_ds.0.weight": (32, 32, 2, 2),
            "stages.3.attns.0.proj_ds.1.norm.weight": (32,),
            "stages.0.mlps.0.linear1.0.weight": (64, 16, 1, 1),
            "stages.0.mlps.0.dwc.weight": (64, 1, 3, 3),
            "stages.0.local_perception_units.0.bias": (16,),
        },
    ),
    "EXXE": (
        dict(stage_spec=["E", "X", "X", "E"], layer_scale_values=[0.1] * 4, use_conv_patches=True),
        {
            "stages.0.attns.0.qkv.weight": (12, 16),
            "stages.0.attns.0.dep_conv.bias": (18,),
            "stages.0.attns.0.dep_conv1.weight": (18, 1, 3, 3),
            "stages.0.attns.0.relative_position_bias_table": (1, 2, 1, 9, 1, 1),
            "stages.0.attns.0.proj.weight": (16, 4),
            "stages.0.layer_scales.1.weight": (16,),
            "stages.1.attns.0.weight": (32, 1, 7, 7),
            "stages.1.ln_cnvnxt.0.norm.bias": (32,),
            "stages.1.mlps.0.chunk.linear1.weight": (128, 32),
            "patch_proj.3.weight": (8, 4, 3, 3),
            "down_projs.0.0.weight": (32, 16, 3, 3),
        },
    ),
    "DDDD": (
        dict(
            stage_spec=["D", "D", "D", "D"],
            dwc_pes=[True, False, False, False],
            fixed_pes=[False, True, False, False],
            log_cpb=[False, False, True, False],
            no_offs=[False, False, False, True],
        ),
        {
            "stages.0.attns.0.rpe_table.weight": (16, 1, 3, 3),
            "stages.0.attns.0.conv_offset.0.weight": (16, 1, 5, 5),
            "stages.0.attns.0.conv_offset.3.weight": (2, 16, 1, 1),
            "stages.1.attns.0.rpe_table": (2, 64, 16),
            "stages.2.attns.0.rpe_table.0.weight": (32, 2),
            "stages.2.attns.0.rpe_table.2.weight": (1, 32),
            "stages.3.attns.0.proj_q.weight": (32, 32, 1, 1),
            "patch_proj.0.weight": (8, 3, 4, 4),
        },
    ),
}


def make_case(name):
    settings, _ = CASES[name]
    config = {**SMALL, **settings}
    config["stage_spec"] = [list(kinds) for kinds in config["stage_spec"]]
    model = conversion.model_from_official(config)
    variables = random_variables(model, jnp.zeros((1, 64, 64, 3)))
    return config, model, variables, conversion.to_official(model, variables["params"])


@pytest.mark.parametrize("name", CASES)
def test_block_types_round_trip_with_published_names(name):
    config, model, variables, state_dict = make_case(name)
    shapes = {key: array.shape for key, array in state_dict.items()}
    assert shapes == official_shapes(model)
    for key, shape in CASES[name][1].items():
        assert shapes[key] == shape
    assert not any(key.startswith("stages.3.attns.0.rpe_table") for key in shapes)
    restored_model, restored = conversion.from_official(config, state_dict)
    assert restored_model == model
    for restored_array, array in zip(jax.tree.leaves(restored), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(restored_array, array)


def test_unused_published_weights_are_ignored():
    config, _, variables, state_dict = make_case("EXXE")
    one_hot = np.tile(np.eye(9).reshape(9, 1, 3, 3), (2, 1, 1, 1))
    extra = {"stages.0.attns.0.dep_conv.weight": one_hot, "stages.1.layer_scales.0.weight": np.ones(32)}
    _, restored = conversion.from_official(config, {**state_dict, **extra})
    assert jax.tree.structure(restored) == jax.tree.structure(variables)
    with pytest.raises(ValueError, match="1 fixed kernels that .*: stages.0.attns.0.dep_conv"):
        conversion.from_official(config, {**state_dict, "stages.0.attns.0.dep_conv.weight": one_hot * 2})

    config, _, _, state_dict = make_case("DDDD")
    conversion.from_official(config, {**state_dict, "stages.3.attns.0.conv_offset.0.weight": np.ones((16, 1, 3, 3))})


def test_golden_weights_round_trip_exactly():
    golden = Golden("pp_mini", np.float32)
    model, variables = conversion.from_official(golden.config, golden.state_dict)
    back = conversion.to_official(model, variables["params"])
    assert set(back) == set(golden.state_dict)
    for name, array in golden.state_dict.items():
        np.testing.assert_array_equal(back[name], array)


def test_buffers_may_be_missing():
    golden = Golden("v1_mini", np.float32)
    buffers = {key for key in golden.state_dict if key.endswith(("relative_position_index", "attn_mask"))}
    assert buffers
    without = {key: value for key, value in golden.state_dict.items() if key not in buffers}
    _, variables = conversion.from_official(golden.config, without)
    _, expected = conversion.from_official(golden.config, golden.state_dict)
    assert (
        relative_error(*(np.concatenate([x.ravel() for x in jax.tree.leaves(v)]) for v in (variables, expected))) == 0
    )


def test_one_error_names_unknown_missing_and_mis_shaped_weights():
    config, _, _, state_dict = make_case("NLSP")
    wrong = {**state_dict, "surprise": np.ones(3), "cls_head.weight": np.ones((5, 32))}
    del wrong["cls_norm.norm.bias"]
    with pytest.raises(ValueError, match="do not fit this model") as info:
        conversion.from_official(config, wrong)
    for part in (
        "1 unknown: surprise",
        "1 missing: cls_norm.norm.bias",
        "1 mis-shaped: cls_head.weight expected (3, 32), got (5, 32)",
    ):
        assert part in str(info.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(img_sise=64), "Unknown keys in the published configuration: \\['img_sise'\\]"),
        (dict(patch_size=8), "patch_size 4"),
        (dict(drop_rate=0.1), "no dropout"),
        (dict(depths=[2, 1, 1, 1]), "do not count the blocks"),
        (dict(stage_spec=[["Q"], ["N"], ["N"], ["N"]]), "unknown block type 'Q'"),
    ],
)
def test_unpublished_configurations_are_refused(settings, message):
    config = {**SMALL, "stage_spec": [["N"]] * 4, **settings}
    with pytest.raises(ValueError, match=message):
        conversion.from_official(config, {})


def test_published_defaults_require_groups_and_strides():
    """The published code crashes with its own defaults, groups and strides of -1 in stages with D blocks."""
    default = r"groups: expected a positive integer for stage 0, which has D blocks, got -1 \(from the default \[-1, -1, 3, 6\]"
    with pytest.raises(ValueError, match=default):
        conversion.model_from_official({})
    with pytest.raises(
        ValueError, match="strides: expected a positive integer for stage 0, which has D blocks, got -1"
    ):
        conversion.model_from_official({"groups": [1, 1, 3, 6]})
    model = conversion.model_from_official({"groups": [1, 1, 3, 6], "strides": [1, 1, 1, 1]})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert shapes["params"]["cls_head"]["kernel"].shape == (768, 1000)
