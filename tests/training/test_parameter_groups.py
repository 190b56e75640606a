"""Which parameters learn, and how fast: frozen parameters, layers, factors, and the table of groups."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax.config import get_classification_config, load_config
from dat_jax.errors import UserError
from dat_jax.models.lora import init_adapters
from dat_jax.training.optimizers.parameter_groups import (
    describe_groups,
    find_factors,
    find_frozen,
    find_groups,
    find_layers,
    merge,
    name_parameters,
    select,
)
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def get_params(name):
    model = dat_jax.create_model(name)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


@pytest.fixture(scope="module")
def classifier():
    return get_params("dat_pp_tiny")


@pytest.fixture(scope="module")
def segmentor():
    config = load_config("quickstart_segmentation")
    return Trainer(config).abstract_state.params


def list_frozen(params, *patterns):
    """Names of the frozen parameters."""
    names, frozen = (jax.tree.leaves(tree) for tree in (name_parameters(params), find_frozen(params, patterns)))
    return {name for name, is_frozen in zip(names, frozen, strict=True) if is_frozen}


def by_name(params, tree):
    return dict(zip(jax.tree.leaves(name_parameters(params)), jax.tree.leaves(tree), strict=True))


def list_names(params, *starts):
    return {name for name in jax.tree.leaves(name_parameters(params)) if name.startswith(starts)}


def test_patterns_of_a_classifier(classifier):
    head = list_names(classifier, "cls_norm", "cls_head")
    assert len(head) == 4
    everything = list_names(classifier, "")
    assert list_frozen(classifier) == set()
    assert list_frozen(classifier, "backbone") == list_frozen(classifier, "all_but_head") == everything - head
    assert list_frozen(classifier, "stages.0") == list_names(classifier, "patch_proj", "stages_0")
    first_two = list_names(classifier, "patch_proj", "stages_0", "down_projs_0", "stages_1")
    assert list_frozen(classifier, "stages.0-1") == list_frozen(classifier, "stages.1", "stages.0") == first_two
    offsets = list_frozen(classifier, "*/conv_offset_*")
    assert offsets == {name for name in everything if "conv_offset" in name} != set()


def test_patterns_of_a_segmentor(segmentor):
    backbone = list_names(segmentor, "backbone/")
    head = list_names(segmentor, "decode_head")
    assert head
    assert backbone
    assert list_frozen(segmentor, "backbone").isdisjoint(head)
    assert list_frozen(segmentor, "backbone") >= backbone
    assert list_frozen(segmentor, "stages.3") == list_names(
        segmentor, "backbone/dat/stages_3", "backbone/dat/down_projs_2"
    )


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("stage_0/*",), r"'stage_0/\*' matches no parameter. Expected backbone, .*patch_proj, stages_0, stages_1"),
        (("stages.7",), r"'stages\.7' matches no parameter"),
        (("*",), r"leaves no parameter that could learn"),
        (("backbone", "cls_*"), r"leaves no parameter that could learn"),
    ],
)
def test_patterns_that_cannot_be_meant(classifier, patterns, message):
    with pytest.raises(UserError, match=message):
        find_frozen(classifier, patterns)


def test_layers_of_dat_pp_tiny_against_a_hand_count(classifier):
    """Stages of 2, 4, 18 and 2 blocks: the stem is 0, blocks are 1 to 26, the head is 27."""
    layers, last = find_layers(classifier)
    assert last == 27
    got = by_name(classifier, layers)
    wanted = {
        "patch_proj/conv1/kernel": 0,
        "stages_0/blocks_0/norm1/scale": 1,
        "stages_0/blocks_1/attn/rpe_table": 2,
        "down_projs_0/conv/kernel": 3,
        "stages_1/blocks_0/lpu/kernel": 3,
        "stages_1/blocks_3/mlp/linear2/bias": 6,
        "down_projs_1/norm/scale": 7,
        "stages_2/blocks_0/attn/qkv/kernel": 7,
        "stages_2/blocks_9/attn/proj_q/kernel": 16,
        "stages_2/blocks_17/attn/conv_offset_0/kernel": 24,
        "down_projs_2/conv/kernel": 25,
        "stages_3/blocks_1/norm2/bias": 26,
        "cls_norm/scale": 27,
        "cls_head/kernel": 27,
    }
    assert {name: got[name] for name in wanted} == wanted
    assert set(got.values()) == set(range(28))


def test_layers_of_a_segmentor_end_with_its_head_and_the_norms_of_its_maps(segmentor):
    layers, last = find_layers(segmentor)
    got = by_name(segmentor, layers)
    assert last == 7  # stages of 2, 2, 1 and 1 blocks
    assert {layer for name, layer in got.items() if name.startswith("decode_head")} == {7}
    assert {layer for name, layer in got.items() if name.startswith("backbone/norm")} == {7}
    assert got["backbone/dat/patch_proj/conv1/kernel"] == 0
    assert got["backbone/dat/down_projs_1/conv/kernel"] == got["backbone/dat/stages_2/blocks_0/lpu/kernel"] == 5


def test_factors_multiply(classifier):
    factors = by_name(classifier, find_factors(classifier, layer_decay=0.5, backbone_factor=0.1, offset_factor=10.0))
    assert factors["cls_head/kernel"] == 1
    np.testing.assert_allclose(factors["stages_3/blocks_1/norm2/bias"], 0.5 * 0.1)
    np.testing.assert_allclose(factors["patch_proj/conv1/kernel"], 0.5**27 * 0.1)
    np.testing.assert_allclose(factors["stages_3/blocks_1/attn/conv_offset_3/kernel"], 0.5 * 0.1 * 10)


def test_decay_of_offset_networks_can_be_left_out(classifier):
    config = get_classification_config().optimizer
    name = "stages_3/blocks_1/attn/conv_offset_3/kernel"
    assert by_name(classifier, find_groups(classifier, config).decays)[name]
    config.decay_offsets = False
    decays = by_name(classifier, find_groups(classifier, config).decays)
    assert not decays[name]
    assert decays["stages_3/blocks_1/attn/proj_q/kernel"]


def test_table_of_groups(classifier):
    config = get_classification_config().optimizer
    config.update(freeze=("stages.0-2",), layer_decay=0.5)
    rows = describe_groups(classifier, find_groups(classifier, config), peak_rate=1e-3)
    total = sum(leaf.size for leaf in jax.tree.leaves(classifier))
    assert list(rows) == [
        "down_projs_0-1, patch_proj, stages_0/blocks_0-1, stages_1/blocks_0-3, stages_2/blocks_0-17",
        "down_projs_2, stages_3/blocks_0",
        "stages_3/blocks_1",
        "cls_head, cls_norm",
    ]
    assert [text.rpartition(" ")[2] for text in rows.values()] == ["frozen", "0.00025", "0.0005", "0.001"]
    counts = [int(text.split()[0].replace(",", "")) for text in rows.values()]
    assert sum(counts) == total
    assert counts[-1] == 512 * 1000 + 1000 + 2 * 512
    assert list(rows.values())[-1] == "514,024 parameters, 512,000 with weight decay, peak learning rate 0.001"


def test_selected_parameters_are_put_back():
    params = {"a": {"b": jnp.ones(2), "c": jnp.zeros(3)}, "d": jnp.ones(1)}
    frozen = {"a": {"b": True, "c": False}, "d": True}
    learned = select(params, frozen)
    assert jax.tree.leaves(jax.tree.map(jnp.shape, learned, is_leaf=None)) == [3]
    merged = merge(jax.tree.map(lambda leaf: leaf + 5, learned), params)
    assert {name: float(leaf[0]) for name, leaf in by_name(params, merged).items()} == {"a/b": 1, "a/c": 5, "d": 1}


def make_trainer(**optimizer):
    config = tiny_config.get_config().unlock()
    config.optimizer.update(optimizer)
    config.mesh.data, config.ema_decay = 1, 0.9
    return Trainer(config, devices=jax.devices()[:1])


def count_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_frozen_parameters_cost_nothing_and_do_not_change():
    """Twenty steps: parameters and averages bit for bit, bytes of the optimizer's state, FLOPs of the compiled step."""
    learning, frozen = make_trainer(), make_trainer(freeze=("all_but_head",))
    batches = list(itertools.islice(learning.train_batches(start_step=0), 20))
    flops = []
    for trainer in (learning, frozen):
        cost = trainer.jitted_train_step.lower(trainer.abstract_state, batches[0]).compile().cost_analysis()
        flops.append(cost["flops"])
    assert flops[1] < 0.5 * flops[0]

    head = {name: frozen.abstract_state.params[name] for name in ("cls_norm", "cls_head")}
    assert count_bytes(frozen.abstract_state.opt_state) < 2 * count_bytes(head) + 32
    assert count_bytes(learning.abstract_state.opt_state) > 2 * count_bytes(frozen.abstract_state.params)

    state = start = frozen.initialize()
    start = jax.device_get(start)  # the steps take its memory
    for batch in batches:
        state, metrics = frozen.train_step(state, batch)
    assert np.isfinite(metrics["loss"])
    for name, leaf in start.params.items():
        for after in (state.params[name], state.ema_params[name]):
            changed = [np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(leaf), strict=True)]
            assert all(changed) if name in head else not any(changed), name


@pytest.mark.slow
def test_a_factor_of_the_learning_rate_scales_the_first_step():
    plain, slower = make_trainer(clip_norm=0.0), make_trainer(clip_norm=0.0, backbone_factor=0.25)
    batch = next(plain.train_batches(start_step=0))
    start = plain.initialize()
    one, other = (trainer.train_step(jax.tree.map(jnp.copy, start), batch)[0].params for trainer in (plain, slower))
    for name in start.params:
        factor = 1 if name.startswith("cls_") else 0.25
        for before, a, b in zip(*(jax.tree.leaves(tree[name]) for tree in (start.params, one, other)), strict=True):
            np.testing.assert_allclose(b - before, factor * (a - before), atol=2e-7)


def test_table_of_one_group_and_of_adapters(classifier):
    config = get_classification_config().optimizer
    total = sum(leaf.size for leaf in jax.tree.leaves(classifier))
    (row,) = describe_groups(classifier, find_groups(classifier, config), peak_rate=1e-3).items()
    assert row[0] == "all"
    assert row[1].startswith(f"{total:,} parameters, ")
    assert row[1].endswith(" with weight decay, peak learning rate 0.001")
    key = jax.random.key(0)
    adapters = jax.eval_shape(lambda params: init_adapters(key, params, rank=2, layers=("mlp",)), classifier)
    params = {**classifier, "lora": adapters}
    frozen, learned = describe_groups(params, find_groups(params, config), peak_rate=1e-3)
    assert learned.startswith("cls_head, cls_norm, adapters of stages_0/blocks_0-1, adapters of stages_1/blocks_0-3")
    assert "cls_head" not in frozen
