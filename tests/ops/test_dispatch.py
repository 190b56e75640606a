"""Choice between the algorithms of an op."""

import jax
import pytest

from dat_jax.ops import dispatch


def test_every_op_has_a_plain_algorithm():
    assert dispatch.PLAIN.keys() == dispatch.IMPLEMENTATIONS.keys()
    assert all(dispatch.PLAIN[op] in names for op, names in dispatch.IMPLEMENTATIONS.items())


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_a_named_algorithm_is_chosen(op):
    for name in dispatch.IMPLEMENTATIONS[op]:
        assert dispatch.choose(op, name, map_shape=(8, 8)) == name
    assert dispatch.choose(op, "plain", map_shape=(8, 8)) == dispatch.PLAIN[op]


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("map_shape", [(1, 1), (14, 14), (56, 56), (200, 334)])
def test_auto_chooses_one_of_the_algorithms(monkeypatch, op, platform, map_shape):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert dispatch.choose(op, "auto", map_shape=map_shape) in dispatch.IMPLEMENTATIONS[op]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_chooses_slice_only_for_a_fitting_table(monkeypatch, platform):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert dispatch.choose("position_bias", "auto", map_shape=(8, 8), table_fits=False) != "slice"


def test_auto_chooses_the_measured_algorithms_on_cpu():
    chosen = {op: dispatch.choose(op, "auto", map_shape=(56, 56), table_fits=True) for op in dispatch.IMPLEMENTATIONS}
    assert chosen == {
        "grid_sample": "gather",
        "position_bias": "slice",
        "neighborhood_attention": "rows",
        "deformable_attention": "products",
        "neighborhood_branch": "products",
        "deformable_branch": "products",
        "conv_mlp": "products",
        "local_perception": "products",
        "norm_linear": "products",
        "depthwise_conv": "shifts",
    }
    assert dispatch.choose("neighborhood_attention", "auto", map_shape=(16, 7)) == "dense"
    with dispatch.compiling_for("tpu"):
        chosen = [dispatch.choose("grid_sample", "auto", map_shape=shape) for shape in ((64, 64), (65, 64))]
    assert chosen == ["matmul", "gather"]


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_auto_replaces_a_kernel_that_does_not_fit(op):
    auto = dispatch.choose(op, "auto", map_shape=(56, 56))
    assert dispatch.choose(op, "pallas", map_shape=(56, 56), kernel_fits=lambda: False) == auto


@pytest.mark.parametrize("op", dispatch.IMPLEMENTATIONS)
def test_unknown_algorithm_raises_with_the_choices(op):
    choices = ", ".join(("auto", "plain", *dispatch.IMPLEMENTATIONS[op]))
    with pytest.raises(ValueError, match=f"{op} has no implementation 'fastest'; choose one of {choices}"):
        dispatch.choose(op, "fastest", map_shape=(8, 8))
