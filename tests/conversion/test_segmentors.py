"""Conversion of segmentors: names, shapes, parameter counts and values."""

import jax
import numpy as np
import pytest

from dat_jax.conversion import segmentors
from dat_jax.models.registry import create_segmentor
from tests.helpers.golden_files import read_keys

KEYS = [(head, size) for head in ("sem_fpn", "upernet") for size in ("tiny", "small", "base")]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "size"), KEYS)
def test_names_and_counts_equal_the_published_ones(head, size):
    total, recorded = read_keys(f"{head.replace('_', '')}_{size}")
    model = create_segmentor(head, backbone=f"dat_pp_{size}", num_classes=150)
    ours = segmentors.segmentor_shapes(model)
    counters = {name: shape for name, shape in recorded.items() if name.endswith("num_batches_tracked")}
    assert set(counters.values()) == {()}
    assert ours == {name: shape for name, shape in recorded.items() if name not in counters}
    assert total == sum(np.prod(shape) for name, shape in ours.items() if not name.endswith(("_mean", "_var")))
    published = {"sem_fpn": (27.70, 56.73, 97.16), "upernet": (53.76, 84.78, 127.20)}[head]
    assert round(total / 1e6, 2) == published[("tiny", "small", "base").index(size)]


@pytest.mark.slow
@pytest.mark.parametrize(("head", "size"), [("sem_fpn", "tiny"), ("upernet", "tiny")])
def test_full_size_state_dict_round_trip(head, size):
    rng = np.random.default_rng(0)
    _, recorded = read_keys(f"{head.replace('_', '')}_{size}")
    state_dict = {
        name: np.zeros((), np.int64) if name.endswith("tracked") else rng.standard_normal(shape, np.float32)
        for name, shape in recorded.items()
    }
    model = create_segmentor(head, backbone=f"dat_pp_{size}", num_classes=150)
    variables = segmentors.segmentor_variables(model, state_dict)
    back = segmentors.segmentor_to_official(model, jax.device_get(variables))
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_one_error_names_all_weights_that_do_not_fit():
    model = create_segmentor("sem_fpn", backbone="dat_pp_tiny", num_classes=150)
    _, recorded = read_keys("semfpn_tiny")
    state_dict = {name: np.zeros(shape, np.float32) for name, shape in recorded.items()}
    del state_dict["neck.fpn_convs.0.conv.bias"]
    state_dict["decode_head.more"] = np.zeros(3)
    state_dict["decode_head.conv_seg.bias"] = np.zeros(19)
    with pytest.raises(
        ValueError, match=r"unknown: decode_head.more.*missing: neck.fpn_convs.0.*expected \(150,\), got \(19,\)"
    ):
        segmentors.segmentor_variables(model, state_dict)


@pytest.mark.slow
def test_weight_decay_of_published_names():
    """The published code does not decay names with norm, rpe_table, relative_position_bias_table or absolute_pos_embed."""
    from dat_jax.training.optimizers.weight_decay import decay_all_but_norms

    for head in ("sem_fpn", "upernet"):
        model = create_segmentor(head, backbone="dat_pp_tiny", num_classes=150)
        params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))[
            "params"
        ]
        decays = jax.tree.map(lambda leaf, d: np.full(leaf.shape, d), params, decay_all_but_norms(params))
        stats = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape),
            jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32))[
                "batch_stats"
            ],
        )
        official = segmentors.segmentor_to_official(model, {"params": decays, "batch_stats": stats})
        undecayed = ("norm", "rpe_table", "relative_position_bias_table", "absolute_pos_embed")
        for name, array in official.items():
            if not name.endswith(("running_mean", "running_var", "tracked")):
                assert array.all() == (not any(word in name for word in undecayed)), name
        assert official["decode_head.conv_seg.bias"].all()
