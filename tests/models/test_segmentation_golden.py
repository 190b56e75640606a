"""Backbone and segmentors reproduce recorded arrays of the published models: outputs, loss, gradients and evaluation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.conversion import dense, official, segmentors
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.evaluation.segmentation import make_segmenter
from dat_jax.models.backbone import Backbone
from dat_jax.ops.layers.resize import resize_bilinear
from dat_jax.tasks.segmentation.objective import make_segmentation_objective, segmentation_loss
from tests.helpers.golden_files import Golden, channels_last, relative_error
from tests.helpers.padded_images import surround

HEADS = ["sem_fpn_mini", "upernet_mini"]
# For values computed in float64 and stored in float32, for values stored in float64, and for gradient norms.
TOLERANCES = {"float64": (1e-7, 1e-8, 1e-8), "float32": (1e-4, 1e-4, 1e-3)}


@functools.cache
def load(name, dtype):
    golden = Golden(name, dtype)
    model = segmentors.segmentor_from_official(golden.config, dtype=jnp.dtype(dtype))
    return golden, model, segmentors.segmentor_variables(model, golden.state_dict)


def check_backbone(dtype):
    golden, (arrays_close, values_close, norms_close) = Golden("backbone_mini", dtype), TOLERANCES[dtype]
    config = {key: value for key, value in golden.config.items() if key not in ("out_indices", "use_checkpoint")}
    dat = official.model_from_official(config, dtype=jnp.dtype(dtype))
    model = Backbone(dat, dtype=jnp.dtype(dtype))
    images = channels_last(golden.arrays["a.images"].astype(dtype))
    expected = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    # In a segmentor the names of the backbone have the prefix "backbone.".
    recorded = {f"backbone.{name}": array for name, array in golden.state_dict.items()}
    entries = [
        official.Entry(path, leaf.shape, *dense.name_entry(("backbone", *path), dat, ()))
        for path, leaf in flatten(expected).items()
    ]
    params = official.assemble(recorded, entries, is_ignored=lambda name: official.is_ignored(name[9:], dat))

    def loss(params):
        maps = model.apply({"params": params}, images)
        return sum(jnp.tanh(x).mean() for x in maps), maps

    (value, maps), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for index, x in enumerate(maps):
        assert golden.map_error(f"a.feat{index}", x) < arrays_close
    assert relative_error(value, golden.arrays["a.loss"]) < 10 * values_close  # tanh of both signs cancels
    norms = {f"backbone.{name}": norm for name, norm in golden.group("gradnorm.").items()}
    check_norms(
        {e.name: e.transform.to_official(np.asarray(flatten(gradients)[e.path])) for e in entries}, norms, norms_close
    )


def flatten(tree):
    import flax

    return flax.traverse_util.flatten_dict(tree)


def check_norms(gradients, norms, tolerance):
    assert set(gradients) == set(norms)
    for name, expected in norms.items():
        norm = np.linalg.norm(gradients[name])
        # Zero in exact arithmetic: a shift of all keys, or one that BatchNorm removes.
        if expected < 1e-12 or (name.endswith("proj_k.bias") and name.replace("proj_k.bias", "rpe_table") in norms):
            assert norm < 1e-4, name
        else:
            assert relative_error(norm, expected) < tolerance, name


def check_evaluation_mode(name, dtype):
    (golden, model, variables), (close, _, _) = load(name, dtype), TOLERANCES[dtype]
    outputs, state = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]))(
        variables, golden.images
    )
    first = lambda key: jnp.moveaxis(outputs[key], -1, 1)  # noqa: E731
    sown = state["intermediates"]
    for index, x in enumerate(sown["neck" if "neck" in sown else "backbone"]["__call__"][0]):
        assert relative_error(jnp.abs(x).mean(), golden.arrays[f"feat.mean_abs{index}"]) < close
        if "neck" in sown:
            x = jnp.moveaxis(x, -1, 1)  # every fourth row and column of the finest level is recorded
            x, key = (x, f"neck{index}") if index else (x[:, :, ::4, ::4], "neck0_4")
            assert relative_error(x, golden.arrays[key]) < close
    assert relative_error(first("logits"), golden.arrays["logits"]) < close
    if "aux_logits" in golden.arrays:
        assert relative_error(first("auxiliary_logits"), golden.arrays["aux_logits"]) < close
    full = resize_bilinear(outputs["logits"], golden.images.shape[1:3])

    # Evaluation of an image that fills only a part of the input.
    meta = json.loads(str(golden.arrays["test.meta"]))
    (height, width, _), original = meta["img_shape"], tuple(meta["ori_shape"][:2])
    probabilities = jax.nn.softmax(resize_bilinear(full[:1, :height, :width], original), axis=-1)
    assert relative_error(jnp.moveaxis(probabilities, -1, 1)[..., ::3, ::3], golden.arrays["test.prob_3"]) < close
    check_labels(probabilities[0].argmax(axis=-1), golden.arrays["test.pred"], probabilities[0], close)


def check_labels(actual, expected, probabilities, tolerance):
    """Checks that labels are equal where the two likeliest classes differ by more than the tolerance: nearly everywhere."""
    top = np.sort(np.asarray(probabilities), axis=-1)[..., -2:]
    clear = top[..., 1] - top[..., 0] > 2 * tolerance
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(actual)[clear], expected[clear])


def check_multi_scale(name, dtype, *, in_larger_arrays=False):
    """Checks evaluation from raw image to label map: resizing, six views, mean of their probabilities."""
    (golden, model, variables), (close, _, _) = load(name, dtype), TOLERANCES[dtype]
    image = np.ascontiguousarray(golden.arrays["ms.raw_bgr"][..., ::-1])
    transform = make_segmentation_eval_transform(
        scale=tuple(golden.arrays["ms.img_scale"].tolist()), ratios=(0.5, 1.0, 1.5)
    )
    record = transform({"image": image, "label": np.zeros(image.shape[:2], np.uint8)})
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    for index, expected in golden.group("ms.view").items():
        np.testing.assert_array_equal(record[f"view_{index}"].transpose(2, 0, 1), expected)
    inputs = [(record[f"view_{index}"] - mean) / std for index in range(3)]

    def predict(variables, batch):  # inputs are normalized already, which excludes their rounding
        if not in_larger_arrays:
            return model.apply(variables, batch["image"])
        sizes = model.apply(variables, batch["sizes"], method="logits_sizes")
        return {**model.apply(variables, batch["image"], sizes=batch["sizes"]), "sizes": sizes}

    views, sizes = [jnp.asarray(x, dtype)[None] for x in inputs], None
    if in_larger_arrays:
        views, sizes = zip(*map(surround, views), strict=True)
    size = jnp.array([image.shape[:2]])
    labels, confidence = make_segmenter(predict, flip=True)(variables, views, size, image.shape[:2], sizes)
    two_likeliest = golden.arrays["ms.top2"]
    assert relative_error(confidence[0], two_likeliest[1]) < close
    check_labels(labels[0], golden.arrays["ms.pred"], np.moveaxis(two_likeliest, 0, -1), close)


def check_training(name, dtype):
    (golden, model, variables), (close, exact, norms_close) = load(name, dtype), TOLERANCES[dtype]
    labels = jnp.asarray(golden.arrays["train.labels"])
    assert (labels == 255).any()

    def loss(params):
        outputs, state = model.apply(
            {**variables, "params": params},
            golden.images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        value, accuracy = segmentation_loss(outputs["logits"], labels)
        metrics = {"train.decode.loss_ce": value, "train.decode.acc_seg": accuracy}
        if "auxiliary_logits" in outputs:
            auxiliary, accuracy = segmentation_loss(outputs["auxiliary_logits"], labels)
            metrics |= {"train.aux.loss_ce": 0.4 * auxiliary, "train.aux.acc_seg": accuracy}
            value += 0.4 * auxiliary
        return value, (metrics, outputs, state)

    (value, (metrics, outputs, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert relative_error(value, golden.arrays["train.loss"]) < exact
    for key, actual in metrics.items():
        assert relative_error(actual, golden.arrays[key]) < max(exact, 1e-6 if key.endswith("acc_seg") else 0), key
    assert relative_error(jnp.moveaxis(outputs["logits"], -1, 1), golden.arrays["train.logits"]) < 10 * close
    ours = segmentors.segmentor_to_official(model, {"params": gradients, **state})
    for key, expected in golden.group("after.").items():
        if not key.endswith("tracked"):
            assert relative_error(ours[key], expected) < close, key
    ours = {key: x for key, x in ours.items() if not key.endswith(("running_mean", "running_var", "tracked"))}
    check_norms(ours, golden.group("gradnorm."), norms_close)


@pytest.mark.slow
def test_backbone():
    check_backbone("float32")


@pytest.mark.slow
def test_backbone_in_float64(x64):
    check_backbone("float64")


@pytest.mark.parametrize("name", HEADS)
def test_float32(name):
    check_evaluation_mode(name, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_losses_and_gradients_in_float32(name):
    check_training(name, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_float64(name, x64):
    check_evaluation_mode(name, "float64")
    check_training(name, "float64")


@pytest.mark.slow
def test_multi_scale_and_flip():
    check_multi_scale("sem_fpn_mini", "float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_multi_scale_and_flip_in_float64(name, x64):
    check_multi_scale(name, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_multi_scale_and_flip_in_larger_arrays_in_float64(name, x64):
    check_multi_scale(name, "float64", in_larger_arrays=True)


@pytest.mark.slow
def test_loss_of_the_task_equals_the_loss_of_the_model():
    """The task gets uint8 images and clears padding; the model gets normalized images."""
    golden, model, variables = load("upernet_mini", "float32")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8),
        "label": rng.integers(0, 7, (2, 64, 64), dtype=np.uint8),
        "valid": np.array([[64, 40], [50, 64]], np.int32),
    }
    batch["image"][0, :, 40:], batch["image"][1, 50:] = 0, 0
    batch["label"][0, :, 40:], batch["label"][1, 50:] = 255, 255
    images = (batch["image"] - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    images[0, :, 40:], images[1, 50:] = 0, 0
    task = make_segmentation_objective(model, auxiliary_weight=0.4)
    value, metrics, state = jax.jit(task.loss)(variables, batch, jax.random.key(0))

    def compute_losses(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        outputs, _ = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return [segmentation_loss(outputs[key], batch["label"])[0] for key in ("logits", "auxiliary_logits")]

    main, auxiliary = jax.jit(compute_losses)(variables, images.astype(np.float32))
    np.testing.assert_allclose(value, main + 0.4 * auxiliary, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], value)
    assert list(state) == ["batch_stats"]
    assert not golden.config["decode_head"]["dropout_ratio"]
