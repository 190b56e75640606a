"""A segmentor trains, is evaluated, goes on, and comes back: the same loop as for classifiers."""

import itertools

import flax
import jax
import numpy as np
import pytest
from PIL import Image

import dat_jax
from dat_jax import conversion
from dat_jax.checkpoints.class_names import read_class_names
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.loading import load_trained
from dat_jax.checkpoints.restore import initialize_state
from dat_jax.conversion.command import convert_from_official, convert_to_official
from dat_jax.errors import UserError
from dat_jax.parallel import sharding
from dat_jax.training.loop import _state_options, evaluate, train
from dat_jax.training.monitoring.metrics import read_metrics
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config, tiny_segmentation
from tests.helpers.logs import collect_logs
from tests.helpers.random_variables import random_variables
from tests.helpers.small_mesh import make_small_mesh


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Runs whose devices are not given use one; tests of several devices pass them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make_small_mesh)
        yield


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a whole run on one device, and what it gave."""
    directory = tmp_path_factory.mktemp("segmentor")
    return directory, train(tiny_segmentation.get_config(), str(directory))


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def test_it_learns_and_leaves_what_people_look_at(workdir):
    directory, result = workdir
    series = read_metrics(directory / "metrics.jsonl")
    assert series["train/loss"][12] < series["train/loss"][4]
    assert set(series["eval/mIoU"]) == {6, 12}
    assert result["images"] == 21
    assert result["mIoU"] == pytest.approx(max(series["eval/mIoU"].values()))
    assert read_class_names(directory, count=2) == tiny_segmentation.CLASS_NAMES
    for name in ("curves.png", "segmentations.png"):
        with Image.open(directory / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_to_the_same_numbers(workdir):
    directory, result = workdir
    assert evaluate(tiny_segmentation.get_config(), str(directory)) == pytest.approx(result)


@pytest.mark.slow
def test_a_run_that_stopped_goes_through_the_same_numbers(workdir, tmp_path):
    config = tiny_segmentation.get_config().unlock()
    config.steps = 6
    train(config, str(tmp_path))
    config.steps = 12
    train(config, str(tmp_path))
    halves, whole = (read_metrics(directory / "metrics.jsonl") for directory in (tmp_path, workdir[0]))
    assert halves["train/loss"][12] == whole["train/loss"][12]
    assert halves["eval/mIoU"][12] == whole["eval/mIoU"][12]


@pytest.mark.slow
def test_steps_do_not_change_frozen_batch_norm():
    """Not by weight decay either, while they change the convolutions."""
    config = tiny_segmentation.get_config().unlock()
    config.head.frozen_batch_norm = True
    config.mesh.update(data=1, fsdp=1)
    config.optimizer.update(decay_rule="all_but_norms_and_bn", weight_decay=0.1)
    trainer = Trainer(config, devices=jax.devices()[:1])
    state = trainer.initialize()
    before = jax.tree.map(np.asarray, {"params": state.params, **state.model_state})
    for batch in itertools.islice(trainer.train_batches(start_step=0), 2):
        state, _ = trainer.train_step(state, trainer.put_batch(batch))
    after = flat({"params": state.params, **state.model_state})
    for name, array in flat(before).items():
        if "/bn/" in name:
            np.testing.assert_array_equal(after[name], array)
        elif "decode_head" in name and name.endswith("/kernel"):
            assert np.any(after[name] != array), name
    assert any("/bn/" in name for name in after)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["sem_fpn", "upernet"])
def test_batch_norm_is_of_the_whole_batch_on_every_mesh(head):
    found = {}
    for devices, mesh in ((1, {"data": 1, "fsdp": 1}), (8, {"data": 4, "fsdp": 2})):
        config = tiny_segmentation.get_config(head).unlock()
        config.mesh.update(mesh)
        trainer = Trainer(config, devices=jax.devices()[:devices])
        state, losses = trainer.initialize(), []
        for batch in itertools.islice(trainer.train_batches(start_step=0), 3):
            state, metrics = trainer.train_step(state, trainer.put_batch(batch))
            losses.append(float(metrics["loss"]))
        found[devices] = losses, jax.device_get(state.model_state["batch_stats"])
    np.testing.assert_allclose(found[8][0], found[1][0], rtol=1e-5)
    for (name, many), one in zip(flat(found[8][1]).items(), flat(found[1][1]).values(), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-4, err_msg=name)
        assert (one != (1 if name.endswith("var") else 0)).all(), name


def test_a_work_directory_is_a_model(workdir):
    directory, _ = workdir
    model, variables = dat_jax.load_pretrained(directory)
    assert isinstance(model, dat_jax.Segmentor)
    logits = jax.jit(model.apply)(variables, np.zeros((1, 64, 96, 3), np.float32))["logits"]
    assert logits.shape == (1, 16, 24, 2)
    assert not np.array_equal(variables["batch_stats"]["decode_head"]["scale_heads_0_0"]["bn"]["mean"], np.zeros(16))


def test_weights_go_to_published_names_and_back(workdir, tmp_path):
    directory, _ = workdir
    convert_to_official(str(directory), str(tmp_path / "weights.safetensors"))
    model, variables = load_trained(directory)
    state_dict = conversion.read_weights(tmp_path / "weights.safetensors")
    back = flat(jax.device_get(conversion.segmentor_variables(model, state_dict)))
    for name, array in flat(variables).items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    # The command knows backbones by name only, and this one has none.
    files = str(tmp_path / "weights.safetensors"), str(tmp_path / "out")
    with pytest.raises(UserError, match="names or shapes of no known segmentor: expected SemanticFPN or UperNet"):
        convert_from_official(*files)
    with pytest.raises(UserError, match=r"sem_fpn on dat_pp_nano: .* unknown: backbone"):
        convert_from_official(*files, model="dat_pp_nano")
    with pytest.raises(UserError, match="Unknown model 'dat_pp_nono', did you mean 'dat_pp_nano'"):
        convert_from_official(*files, model="dat_pp_nono")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_reads_head_and_widths_from_the_weights(tmp_path):
    model = dat_jax.create_segmentor("sem_fpn", backbone="dat_pp_nano", num_classes=3, channels=8, neck_channels=8)
    shapes = conversion.segmentors.segmentor_shapes(model)
    rng = np.random.default_rng(0)
    state_dict = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    conversion.write_safetensors(tmp_path / "weights.safetensors", state_dict)
    convert_from_official(str(tmp_path / "weights.safetensors"), str(tmp_path / "export"))
    loaded, variables = load_trained(tmp_path / "export")
    assert (loaded.head, loaded.num_classes, loaded.channels, loaded.neck_channels) == ("sem_fpn", 3, 8, 8)
    bias = variables["params"]["decode_head"]["classifier"]["conv_seg"]["bias"]
    np.testing.assert_array_equal(bias, state_dict["decode_head.conv_seg.bias"])


@pytest.mark.slow
def test_an_export_comes_back(workdir, tmp_path):
    model, variables = load_trained(workdir[0])
    export_model(tmp_path / "export", model=model, variables=variables)
    again, loaded = load_trained(tmp_path / "export")
    assert again == model
    for name, array in flat(variables).items():
        np.testing.assert_array_equal(flat(loaded)[name], array, err_msg=name)
    config = tiny_config.get_config().unlock()
    config.init_from = str(tmp_path / "export")
    trainer = Trainer(config)
    with pytest.raises(UserError, match="classifier starts from those of a classifier"):
        initialize_state(trainer.config, **_state_options(trainer))


@pytest.mark.slow
def test_it_starts_from_a_classifier(tmp_path):
    classifier = dat_jax.create_model("dat_pp_nano", **tiny_segmentation.BACKBONE, num_classes=9)
    weights = random_variables(classifier, np.zeros((1, 64, 64, 3), np.float32))
    export_model(tmp_path / "classifier", model=classifier, variables=weights)
    config = tiny_segmentation.get_config().unlock()
    config.init_from = str(tmp_path / "classifier")
    trainer = Trainer(config)
    with collect_logs() as messages:
        state = initialize_state(trainer.config, **_state_options(trainer))
    assert any("backbone" in message and "classifier" in message for message in messages)
    backbone = flat(jax.device_get(state.params["backbone"]["dat"]))
    wanted = {name: array for name, array in flat(weights["params"]).items() if not name.startswith("cls_")}
    assert backbone.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(backbone[name], array, err_msg=name)
    fresh = trainer.initialize()
    np.testing.assert_array_equal(
        state.params["neck"]["lateral_convs_0"]["kernel"], fresh.params["neck"]["lateral_convs_0"]["kernel"]
    )


def test_another_head_is_another_model(workdir):
    config = tiny_segmentation.get_config().unlock()
    config.head.dropout = 0.2
    with pytest.raises(UserError, match=r"of another model: head.dropout 0.1, now 0.2"):
        train(config, str(workdir[0]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head.chanels", 4, "Segmentor has no attribute 'chanels', did you mean 'channels'"),
        ("head.name", "fcn", "Unknown head 'fcn'"),
        ("eval.ratios", (), "config.eval.ratios must be a non-empty tuple"),
        ("eval.window", 32, "config.eval.window and config.eval.stride must"),
        ("augmentation.min_ratio", 3.0, "config.augmentation.min_ratio must be at most max_ratio 2.0"),
        ("augmentation.distort", 1, "config.augmentation.distort must be True or False, got 1"),
        ("schedule.kind", "steps", "config.schedule.kind must be one of cosine, poly, step, got 'steps'"),
        ("data.image_size", 64, "Unknown key config.data.image_size"),
    ],
)
def test_mistakes_are_said(key, value, message):
    config = tiny_segmentation.get_config().unlock()
    *groups, last = key.split(".")
    group = config
    for name in groups:
        group = group[name]
    with group.ignore_type():
        group[last] = value
    with pytest.raises(UserError, match=message):
        Trainer(config)
