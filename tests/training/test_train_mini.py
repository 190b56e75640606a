"""Twenty recorded steps of the published model, through this project's training step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dat_jax
from dat_jax import conversion
from dat_jax.tasks.classification.objective import soft_cross_entropy
from dat_jax.tasks.objective import Objective
from dat_jax.training.optimizers.named import make_optimizer
from dat_jax.training.optimizers.parameter_groups import find_groups
from dat_jax.training.optimizers.weight_decay import decay_matrices
from dat_jax.training.schedule import warmup_cosine, warmup_poly, warmup_step
from dat_jax.training.state import make_state
from dat_jax.training.step import make_train_step
from tests.helpers.golden_files import Golden


def check_training(dtype: str, *, loss_tolerance: float, norm_tolerance: float, final_tolerance: float) -> None:
    golden = Golden("train_mini", dtype)
    hyper = json.loads(str(golden.arrays["hyper"]))
    model, variables = conversion.from_official(golden.config, golden.state_dict, dtype=jnp.dtype(dtype))
    schedule = warmup_cosine(
        base_lr=hyper["base_lr"],
        warmup_lr=hyper["warmup_lr"],
        min_lr=hyper["min_lr"],
        warmup_steps=hyper["warmup_steps"],
        total_steps=hyper["total_steps"],
    )
    config = dat_jax.config.get_classification_config().optimizer
    config.b1, config.b2 = hyper["betas"]
    config.update({name: hyper[name] for name in ("eps", "weight_decay", "clip_norm")})
    groups = find_groups(variables["params"], config)
    optimizer = make_optimizer(schedule, groups, config)
    batch = {"image": jnp.asarray(golden.images), "targets": jnp.asarray(golden.arrays["targets"], dtype)}

    def loss(variables, batch, key):
        value = soft_cross_entropy(model.apply(variables, batch["image"], train=True), batch["targets"])
        return value, {"loss": value}, {}

    objective = Objective(init=lambda key, batch: variables, loss=loss, predict=model.apply)
    options = dict(optimizer=optimizer, frozen=groups.frozen)
    state = make_state(variables, averaged=False, **options)
    step = jax.jit(make_train_step(objective=objective, schedule=schedule, seed=0, **options))
    for index in range(20):
        state, metrics = step(state, batch)
        np.testing.assert_allclose(schedule(index), golden.arrays["lr"][index], rtol=1e-6)
        np.testing.assert_allclose(
            metrics["loss"], golden.arrays["loss"][index], rtol=loss_tolerance, err_msg=f"step {index}"
        )
        np.testing.assert_allclose(metrics["grad_norm"], golden.arrays["grad_norm"][index], rtol=norm_tolerance)
    ours, final = conversion.to_official(model, state.params), golden.group("final_norm.")
    assert set(final) == set(ours)
    for name, wanted in final.items():
        if not name.endswith("proj_k.bias"):  # its gradient is only rounding, which Adam amplifies
            np.testing.assert_allclose(np.linalg.norm(ours[name]), wanted, rtol=final_tolerance, err_msg=name)


@pytest.mark.slow
def test_float32():
    check_training("float32", loss_tolerance=1e-3, norm_tolerance=1e-2, final_tolerance=1e-3)


@pytest.mark.slow
def test_float64(x64):
    check_training("float64", loss_tolerance=1e-9, norm_tolerance=1e-8, final_tolerance=1e-8)


def test_weight_decay_spares_the_recorded_names():
    golden = Golden("train_mini", np.float32)
    model, variables = conversion.from_official(golden.config, golden.state_dict)
    decays = conversion.to_official(
        model,
        jax.tree.map(lambda leaf, d: np.full(leaf.shape, d), variables["params"], decay_matrices(variables["params"])),
    )
    assert {name for name, decay in decays.items() if not decay.any()} == set(
        json.loads(str(golden.arrays["no_decay"]))
    )


def test_weight_decay_of_the_tiny_model_counts_as_published():
    model = dat_jax.create_model("dat_pp_tiny")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    sizes = jax.tree.map(lambda leaf, decays: (leaf.size, decays), params, decay_matrices(params))
    pairs = jax.tree.leaves(sizes, is_leaf=lambda x: isinstance(x, tuple))
    decayed, spared = [size for size, d in pairs if d], [size for size, d in pairs if not d]
    assert (len(decayed), sum(decayed), len(spared), sum(spared)) == (230, 23_736_450, 359, 226_426)


@pytest.mark.parametrize(("count", "wanted"), [(0, 0.1), (1, 0.1), (2, 0.55), (3, 0.5), (5, 0.0), (9, 0.0)])
def test_schedule_by_hand(count, wanted):
    """Two warm-up steps from 0.1 to 1, total 4: t is 0, 0, 1, then the cosine at t = 2 of 4, and 0 from t = 4 on."""
    schedule = warmup_cosine(base_lr=1.0, warmup_lr=0.1, min_lr=0.0, warmup_steps=2, total_steps=4)
    np.testing.assert_allclose(schedule(count), wanted, atol=1e-7)


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(0, 0.2), (2, 0.6), (4, 1.0), (15, 1.0), (16, 0.1), (24, 0.1), (25, 0.01), (10**6, 0.01)],
)
def test_drops_by_hand(count, wanted):
    """Ten steps an epoch. Four warm-up steps from a fifth, drops after 1.6 and 2.5 epochs."""
    schedule = warmup_step(
        base_lr=1.0, warmup_steps=4, warmup_ratio=0.2, drops=(1.6, 2.5), factor=0.1, steps_per_epoch=10
    )
    np.testing.assert_allclose(schedule(count), wanted, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(count), wanted, rtol=1e-6)


def test_drops_come_in_warm_up_too_as_in_mmcv():
    """An epoch of two steps in a warm-up of four from 0: the rate of the second epoch is a tenth."""
    schedule = warmup_step(base_lr=8.0, warmup_steps=4, warmup_ratio=0.0, drops=(1,), factor=0.1, steps_per_epoch=2)
    np.testing.assert_allclose([schedule(count) for count in range(5)], [0.0, 2.0, 0.4, 0.6, 0.8], rtol=1e-6)


def test_without_drops_or_warm_up_the_rate_stays():
    schedule = warmup_step(base_lr=3.0, warmup_steps=0, warmup_ratio=0.5, drops=(), factor=0.1, steps_per_epoch=2)
    np.testing.assert_array_equal([schedule(count) for count in (0, 1, 99)], 3.0)


@pytest.mark.parametrize(("count", "wanted"), [(0, 0.1), (1, 0.9 * 0.55), (2, 0.8), (5, 0.5), (10, 0.0), (11, 0.0)])
def test_poly_by_hand(count, wanted):
    schedule = warmup_poly(base_lr=1.0, power=1.0, warmup_steps=2, warmup_ratio=0.1, total_steps=10)
    np.testing.assert_allclose(schedule(count), wanted, rtol=1e-6)
