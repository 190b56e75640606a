"""The training step: meshes agree, parts of a batch add up, averages follow, draws differ by step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dat_jax.config import get_classification_config, list_configs, load_config
from dat_jax.parallel import sharding
from dat_jax.profiling import hlo
from dat_jax.profiling.step_report import StandIn
from dat_jax.tasks.objective import Objective
from dat_jax.tasks.registry import get_task_class
from dat_jax.training.averaging import make_average
from dat_jax.training.optimizers.clipping import clip_by_global_norm, global_norm
from dat_jax.training.state import TrainState, copy_state, make_state
from dat_jax.training.step import make_train_step
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config


def losses_on(mesh: dict[str, int], devices, monkeypatch) -> tuple[list[float], object]:
    monkeypatch.setattr(jax, "devices", lambda: devices)
    config = tiny_config.get_config(stages=("D",), dim_stem=128, dims=(128,), num_heads=(4,), num_groups=(2,)).unlock()
    config.mesh.update(mesh)
    recipe = get_classification_config().augmentation  # what is drawn must not depend on the mesh either
    for name in ("erasing_probability", "mixup_alpha", "cutmix_alpha"):
        config.augmentation[name] = recipe[name]
    trainer = Trainer(config)
    state, losses = trainer.initialize(), []
    for batch in itertools.islice(trainer.train_batches(start_step=0), 5):
        state, metrics = trainer.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.slow
def test_five_steps_are_the_same_on_every_mesh(monkeypatch):
    devices = jax.devices()
    assert len(devices) == 8
    wanted, _ = losses_on({"data": 1, "fsdp": 1}, devices[:1], monkeypatch)
    assert wanted[0] != wanted[4]
    for mesh in ({"data": 8, "fsdp": 1}, {"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 8}):
        losses, state = losses_on(mesh, devices, monkeypatch)
        np.testing.assert_allclose(losses, wanted, rtol=1e-5, err_msg=str(mesh))
        kernel = state.params["stages_0"]["blocks_0"]["mlp"]["linear1"]["kernel"]  # 128 x 512
        moment = state.opt_state[1][0].mu["stages_0"]["blocks_0"]["mlp"]["linear1"]["kernel"]
        for array in (kernel, moment):
            assert array.addressable_shards[0].data.size == 128 * 512 // mesh["fsdp"]
        assert state.params["cls_head"]["bias"].addressable_shards[0].data.shape == (2,)


def moving_average(decay, *, warmup=False):
    config = get_classification_config()
    config.update(ema_decay=decay, ema_warmup=warmup)
    return make_average(config)


def linear_objective():
    """loss = mean of (w . x - y)^2, with a count of calls as model state and noise from the key as a metric."""

    def init(key, batch):
        return {"params": {"w": jnp.ones(3)}, "calls": jnp.zeros(())}

    def loss(variables, batch, key):
        error = batch["x"] @ variables["params"]["w"] - batch["y"]
        value = (error**2).mean()
        return value, {"loss": value, "draw": jax.random.uniform(key)}, {"calls": variables["calls"] + 1}

    return Objective(init=init, loss=loss, predict=lambda variables, batch: {})


def run_steps(count, **options):
    objective, optimizer = linear_objective(), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.asarray(rng.normal(size=8), jnp.float32)}
    frozen = {"w": False}
    variables = objective.init(jax.random.key(0), batch)
    state = make_state(variables, optimizer=optimizer, frozen=frozen, averaged="average" in options)
    options |= dict(objective=objective, optimizer=optimizer, frozen=frozen, schedule=lambda count: 0.1, seed=0)
    step = jax.jit(make_train_step(**options))
    states, metrics = [state], []
    for _ in range(count):
        state, values = step(states[-1], batch)
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    whole, metrics = run_steps(3)
    parts, part_metrics = run_steps(3, accumulate_steps=4)
    np.testing.assert_allclose(parts[-1].params["w"], whole[-1].params["w"], rtol=1e-6)
    np.testing.assert_allclose(part_metrics[-1]["loss"], metrics[-1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(part_metrics[-1]["grad_norm"], metrics[-1]["grad_norm"], rtol=1e-6)
    assert (float(whole[-1].model_state["calls"]), float(parts[-1].model_state["calls"])) == (3, 12)


def test_averaged_weights_follow_the_weights_and_are_what_is_evaluated():
    states, _ = run_steps(2, average=moving_average(0.75))
    first, second, third = (state.params["w"] for state in states)
    average = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
    np.testing.assert_allclose(states[-1].ema_params["w"], average, rtol=1e-6)
    assert states[-1].eval_variables["params"] is states[-1].ema_params
    assert run_steps(1)[0][-1].ema_params is None


def test_the_decay_of_averaged_weights_grows_during_a_warmup():
    states, _ = run_steps(3, average=moving_average(0.5, warmup=True))
    weights, average = [state.params["w"] for state in states], states[0].params["w"]
    for step, after in enumerate(weights[1:]):
        decay = min(0.5, 1 - (1 + step) ** (-2 / 3))
        average = decay * average + (1 - decay) * after
    np.testing.assert_allclose(states[-1].ema_params["w"], average, rtol=1e-5)
    np.testing.assert_allclose(states[1].ema_params["w"], weights[1], rtol=1e-6)


def test_a_step_that_is_not_finite_only_counts():
    """A loss of infinity in the third of four steps: the fourth goes on from the second."""
    objective, optimizer = linear_objective(), optax.adam(0.1)
    rng = np.random.default_rng(0)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), "y": jnp.asarray(rng.normal(size=8), jnp.float32)}
    bad = batch | {"y": batch["y"].at[2].set(jnp.inf)}
    frozen = {"w": False}
    variables = objective.init(jax.random.key(0), batch)
    state = make_state(variables, optimizer=optimizer, frozen=frozen, averaged=True)
    options = dict(objective=objective, optimizer=optimizer, frozen=frozen, schedule=lambda count: 0.1, seed=0)
    step = jax.jit(make_train_step(**options, average=moving_average(0.5)))
    states, counts = [state], []
    for which in (batch, batch, bad, bad, batch):
        state, metrics = step(states[-1], which)
        states.append(state)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
    assert counts == [(0, 0), (0, 0), (1, 1), (2, 2), (2, 0)]
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4, 5]
    for name in ("params", "model_state", "opt_state", "ema_params"):
        jax.tree.map(np.testing.assert_array_equal, getattr(states[4], name), getattr(states[2], name))
    after_two, _ = step(states[2].replace(step=states[4].step), batch)
    jax.tree.map(np.testing.assert_array_equal, states[5].params, after_two.params)
    assert not np.array_equal(states[5].params["w"], states[2].params["w"])


def test_random_draws_differ_by_step_and_repeat_with_the_seed():
    draws = [float(metrics["draw"]) for metrics in run_steps(3)[1]]
    assert len(set(draws)) == 3
    assert draws == [float(metrics["draw"]) for metrics in run_steps(3)[1]]


@pytest.mark.parametrize(("norm", "wanted"), [(10.0, 10 * 5 / (10 + 1e-6)), (2.0, 2.0)])
def test_clipping_follows_pytorch(norm, wanted):
    clip = clip_by_global_norm(5.0)
    gradients = {"a": jnp.array([0.6 * norm]), "b": jnp.array([0.8 * norm])}
    clipped, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(optax.tree.norm(clipped), wanted, rtol=1e-6)


def test_the_norm_is_that_of_all_leaves_whatever_their_names():
    rng = np.random.default_rng(0)
    shapes = {"blocks_10": (3, 4), "blocks_9": (5,), "cls_head": (), "9": (2, 1, 3)}
    tree = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    tree = {"stages_0": tree, "stages_1": jax.tree.map(jnp.negative, tree)}
    np.testing.assert_allclose(global_norm(tree), optax.tree.norm(tree), rtol=1e-6)


def test_a_copied_state_shares_no_memory():
    weights = np.zeros(64, np.float32)
    params = {"w": jax.device_put(weights)}
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, model_state={}, opt_state=(), ema_params=params)
    own = copy_state(state)
    places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((own.params, own.ema_params))}
    assert len(places) == 2
    assert not places & {weights.ctypes.data, params["w"].unsafe_buffer_pointer()}


def stand_in(config):
    """In the place of a data set that is not there; the embedded ones themselves."""
    if not config.data.directory:
        return None
    return (StandIn(2048, tuple(map(str, range(get_task_class(config.task).published_classes)))),) * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", list_configs())
def test_the_step_of_every_configuration_has_consistent_shapes(name):
    config = load_config(name).unlock()
    if "distillation" in config:
        config.distillation.teacher = ""  # its weights are not here; see test_teachers.py
    trainer = Trainer(config, sources=stand_in(config))
    config = trainer.config  # with derived values
    trainer.check_train_batch()
    batch = trainer.task.example_batch(config.batch_size)
    state, metrics = jax.eval_shape(trainer.train_step, trainer.abstract_state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), trainer.abstract_state
    )
    of_task = {"classification": {"top1"}, "segmentation": {"accuracy"}, "detection": {"class_loss", "box_loss"}}[
        config.task
    ]
    head = config.get("head", {}).get("name")
    if head == "upernet":
        of_task |= {"main_loss", "auxiliary_loss"}
    elif head in ("mask_rcnn", "cascade_mask_rcnn"):
        stages = ("_0", "_1", "_2") if head == "cascade_mask_rcnn" else ("",)
        of_task = {f"{name}{stage}" for stage in stages for name in ("class_loss", "box_loss", "mask_loss", "accuracy")}
        of_task |= {"rpn_class_loss", "rpn_box_loss"}
    if "mesa" in config and config.mesa.weight:
        of_task = {*of_task, "mesa"}
    assert set(metrics) == {"loss", *of_task, "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (2, 4)])
def test_devices_exchange_parameters_and_gradients_only(data, fsdp):
    """Left to itself the partitioner gathers activations where parameters are split."""
    config = tiny_config.get_config(dim_stem=128, dims=(128,), num_heads=(4,), num_groups=(2,)).unlock()
    config.mesh.update(data=data, fsdp=fsdp)
    config.batch_size = 64  # so that activations are larger than parameters
    trainer = Trainer(config)
    where = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in trainer.task.example_batch(64).items()
    }
    compiled = trainer.jitted_train_step.lower(trainer.abstract_state, batch).compile()
    found = hlo.collectives(hlo.parse(compiled.as_text()))
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(trainer.abstract_state.params))
    allowed = {"all-reduce": 2 * size, "reduce-scatter": size} | ({"all-gather": size} if fsdp > 1 else {})
    assert set(found) <= set(allowed), found
    assert ("all-gather" in found) == (fsdp > 1)
    for kind, counted in found.items():
        assert counted["bytes"] <= 1.01 * allowed[kind], (kind, counted, size)
