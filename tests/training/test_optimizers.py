"""Optimizers by name: against optax alone, Muon's split, resuming, and weights that are averaged."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import dat_jax
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.config import get_classification_config, validate
from dat_jax.errors import UserError
from dat_jax.training.optimizers.named import OPTIMIZERS, find_evaluation_params, is_updated_by_muon, make_optimizer
from dat_jax.training.optimizers.parameter_groups import find_groups, name_parameters
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config

SCHEDULE = optax.linear_schedule(1e-2, 1e-3, 10)


def make_params():
    """A matrix that is large enough for Adafactor to factor, a convolution's kernel and a vector, with names of the model."""
    rng = np.random.default_rng(0)
    shapes = {"linear1": (160, 144), "conv": (3, 3, 4, 8), "bias": (16,)}
    leaves = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return {"stages_0": {"blocks_0": leaves}}


def make_config(name, **keys):
    config = get_classification_config().optimizer
    config.update(name=name, clip_norm=0.0, **keys)
    return config


def run(optimizer, steps=10, evaluated=False):
    """The parameters after some steps with random gradients, and the state of the optimizer."""
    params, rng = make_params(), np.random.default_rng(1)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return find_evaluation_params(state, params) if evaluated else params


def decays(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def no_decay(params):
    return jax.tree.map(lambda leaf: False, params)


def adafactor_with_decay():
    """optax.adafactor, whose decay is not scaled by the learning rate: that is done here, by hand."""
    inner = optax.adafactor(SCHEDULE, multiply_by_parameter_scale=False)

    def update(updates, state, params):
        count, inner_state = state
        updates, inner_state = inner.update(updates, inner_state, params)
        rate = SCHEDULE(count)
        updates = jax.tree.map(lambda u, p, d: u - rate * 0.05 * p * d, updates, params, decays(params))
        return updates, (count + 1, inner_state)

    return optax.GradientTransformation(lambda params: (0, inner.init(params)), update)


ALONE = {
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.05, mask=decays),
    "lamb": lambda: optax.lamb(SCHEDULE, weight_decay=0.05, mask=decays),
    "lion": lambda: optax.lion(SCHEDULE, weight_decay=0.05, mask=decays),
    "adafactor": adafactor_with_decay,
    "sgd": lambda: optax.chain(
        optax.add_decayed_weights(0.05, decays), optax.sgd(SCHEDULE, momentum=0.9, nesterov=True)
    ),
    "schedule_free_adamw": lambda: contrib.schedule_free(
        optax.adamw(SCHEDULE, b1=0.0, weight_decay=0.05, mask=decays), SCHEDULE, b1=0.9
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_ten_steps_are_those_of_optax_alone(name):
    config, params = make_config(name), make_params()
    optimizer = make_optimizer(SCHEDULE, find_groups(params, config), config)
    got, wanted = run(optimizer), run(ALONE[name]())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_ten_steps_of_muon_are_those_of_optax_alone():
    """optax's Muon has a mask for the decay of the matrices only, so here nothing else decays."""
    config, params = make_config("muon"), make_params()
    groups = find_groups(params, config)
    assert is_updated_by_muon(params) == {"stages_0": {"blocks_0": {"linear1": True, "conv": False, "bias": False}}}
    groups.decays["stages_0"]["blocks_0"]["conv"] = False
    alone = contrib.muon(SCHEDULE, weight_decay=0.05, adam_weight_decay=0.0, consistent_rms=0.2)
    got, wanted = run(make_optimizer(SCHEDULE, groups, config)), run(alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, wanted)


def test_every_optimizer_is_compared():
    assert {*ALONE, "muon"} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_decay_do_not_depend_on_it(name):
    def steps(weight_decay):
        config = make_config(name, weight_decay=weight_decay)
        return run(make_optimizer(SCHEDULE, find_groups(make_params(), config), config))["stages_0"]["blocks_0"]

    much, none = steps(0.5), steps(0.0)
    np.testing.assert_array_equal(much["bias"], none["bias"])
    for leaf in ("linear1", "conv"):
        difference = np.linalg.norm(none[leaf]) - np.linalg.norm(much[leaf])
        assert difference > 0.005 * np.linalg.norm(none[leaf])


def test_the_first_step_of_muon_has_the_given_root_mean_square():
    config, params = make_config("muon", weight_decay=0.0), make_params()
    after = run(make_optimizer(lambda count: 1.0, find_groups(params, config), config), steps=1)
    change = jax.tree.map(lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2))), after, params)["stages_0"]["blocks_0"]
    assert 0.15 < change["linear1"] < 0.25


def test_muon_updates_the_linear_layers_of_dat_pp_tiny():
    """Every matrix of the model: linear layers, the last layer of each offset network, and the head."""
    model = dat_jax.create_model("dat_pp_tiny")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    names = jax.tree.leaves(name_parameters(params))
    matrices = [name for name, muon in zip(names, jax.tree.leaves(is_updated_by_muon(params)), strict=True) if muon]
    layers = sorted({"/".join(name.split("/")[2:]) if name.startswith("stages") else name for name in matrices})
    attention = ["conv_offset_3", "proj", "proj_k", "proj_out", "proj_q", "proj_v", "qkv"]
    assert layers == sorted(
        [f"attn/{layer}/kernel" for layer in attention]
        + ["mlp/linear1/kernel", "mlp/linear2/kernel", "cls_head/kernel"]
    )
    blocks = sum(map(len, model.stages))
    deformable = sum(stage.count("D") for stage in model.stages)
    assert len(matrices) == 5 * deformable + 2 * (blocks - deformable) + 2 * blocks + 1


def test_average_of_schedule_free_adamw_starts_at_the_weights_and_falls_behind():
    config = make_config("schedule_free_adamw", weight_decay=0.0)
    params = make_params()
    optimizer = make_optimizer(lambda count: 1e-2, find_groups(params, config), config)
    start = find_evaluation_params(optimizer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), start, params)

    def distance(evaluated):
        after = run(optimizer, evaluated=evaluated)
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (after, params)), strict=True))

    assert 0 < distance(evaluated=True) < distance(evaluated=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer.name": "adam"},
            r"config\.optimizer\.name must be one of adamw, .*schedule_free_adamw, got 'adam'",
        ),
        (
            {"optimizer.name": "schedule_free_adamw", "ema_decay": 0.9},
            r"config\.ema_decay must be 0 and config\.ema_decays empty for schedule_free",
        ),
        ({"optimizer.name": "schedule_free_adamw", "optimizer.b1": 0.0}, r"config\.optimizer\.b1 must be above 0"),
        (
            {"optimizer.lion.b3": 0.5},
            r"Unknown key config\.optimizer\.lion\.b3; did you mean config\.optimizer\.lion\.b",
        ),
        ({"optimizer.muon.steps": 0}, r"config\.optimizer\.muon\.steps must be an integer of at least 1, got 0"),
    ],
)
def test_impossible_settings_are_named(values, message):
    config = tiny_config.get_config().unlock()
    for path, value in values.items():
        *groups, key = path.split(".")
        group = config
        for name in groups:
            group = group[name]
        group[key] = value
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bit_for_bit(name, tmp_path):
    """Four steps at once, and two with a checkpoint between them and two others."""
    config = tiny_config.get_config().unlock()
    config.optimizer.name = name
    config.mesh.data = 1
    trainer = Trainer(config, devices=jax.devices()[:1])
    batches = list(itertools.islice(trainer.train_batches(start_step=0), 4))
    states = [trainer.initialize()]
    for batch in batches:
        states.append(trainer.train_step(jax.tree.map(jnp.copy, states[-1]), batch)[0])
    with Checkpoints(tmp_path / "checkpoints", metric="top1") as checkpoints:
        checkpoints.save(states[2], metadata={}, metrics={"top1": 0.5})
        checkpoints.wait()
        state = checkpoints.restore(2, trainer.abstract_state)[0]
    for batch in batches[2:]:
        state, metrics = trainer.train_step(state, batch)
    assert np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state, states[4])
    assert any(np.any(a != b) for a, b in zip(*(jax.tree.leaves(s.params) for s in (state, states[2])), strict=True))
    if name == "schedule_free_adamw":
        assert state.eval_variables["params"] is state.ema_params
