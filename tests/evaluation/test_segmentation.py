"""mIoU and related metrics: a case by hand, a confusion matrix, and evaluation over views, windows and devices."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dat_jax.data.ade20k import make_palette
from dat_jax.data.segmentation_sources import SegmentationArraySource
from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
from dat_jax.data.sized_batching import choose_eval_buckets, make_sized_eval_batches
from dat_jax.errors import UserError
from dat_jax.evaluation import segmentation
from dat_jax.ops.layers.resize import resize_bilinear
from dat_jax.parallel import sharding
from dat_jax.tasks.segmentation.objective import make_segmentation_objective
from tests.helpers import tiny_segmentation
from tests.helpers.tiers import slow

CLASSES = 5


def quarter(images):
    """A substitute for a network: logits at a quarter of the size, from fixed weights of the resized image."""
    height, width = (-(-side // 4) for side in images.shape[1:3])
    weights = np.random.default_rng(0).standard_normal((3, CLASSES)).astype(np.float32)
    scaled = resize_bilinear(images.astype(jnp.float32) / 64 - 2, (height, width))
    rows = jnp.linspace(-1, 1, height)[None, :, None, None] * jnp.arange(CLASSES).reshape(1, 1, 1, CLASSES)
    columns = jnp.linspace(-1, 1, width)[None, None, :, None] * jnp.arange(CLASSES)[::-1].reshape(1, 1, 1, CLASSES)
    return jnp.einsum("bhwc,ck->bhwk", scaled, weights) + rows + columns


def predict(variables, batch):
    return {"logits": quarter(batch["image"])}


def confusion(labels, predictions, classes):
    """Return the number of pixels by label and prediction, (classes, classes)."""
    valid = labels != 255
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels[valid], predictions[valid]), 1)
    return matrix


def reference_metrics(matrix):
    correct, labeled, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    ious, accuracies = [], []
    for k in range(len(matrix)):
        union = labeled[k] + predicted[k] - correct[k]
        if union:
            ious.append(correct[k] / union)
        if labeled[k]:
            accuracies.append(correct[k] / labeled[k])
    return {"mIoU": 100 * np.mean(ious), "mAcc": 100 * np.mean(accuracies), "aAcc": 100 * correct.sum() / labeled.sum()}


def one_hot_logits(predictions, classes):
    """Logits with the given predictions at full size, as for an image of four times the size."""
    return jnp.asarray(np.eye(classes, dtype=np.float32)[predictions] * 20)


def evaluate_maps(labels, predictions, classes):
    """Evaluate predictions with label maps of the size of the logits."""
    height, width = labels.shape[1:]
    evaluate = segmentation.make_evaluator(lambda logits, batch: {"logits": logits})
    tiles = np.full((len(labels), 1, 64, 64), 255, np.uint8)
    tiles[:, 0, :height, :width] = labels
    batch = {
        "view_0": np.zeros((len(labels), height, width, 3), np.uint8),
        "label": tiles,
        "origin": np.zeros((len(labels), 1, 2), np.int32),
        "size": np.full((len(labels), 2), (height, width), np.int32),
        "mask": np.ones(len(labels), np.float32),
    }
    return evaluate(one_hot_logits(predictions, classes), [batch])


def test_a_case_computed_by_hand():
    labels = np.array([[[0, 0, 1], [1, 2, 255]]], np.uint8)
    predictions = np.array([[[0, 1, 1], [1, 0, 2]]])
    # IoU of class 0: 1 / 3 (two labeled, two predicted); 1: 2 / 3; 2: 0 / 1, without the ignored pixel; 3: undefined.
    evaluation = evaluate_maps(labels, predictions, 4)
    metrics = evaluation.metrics
    assert metrics["mIoU"] == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3)
    assert metrics["mAcc"] == pytest.approx(100 * (1 / 2 + 1 + 0) / 3)
    assert metrics["aAcc"] == pytest.approx(100 * 3 / 5)
    assert metrics["images"] == 1
    np.testing.assert_allclose(evaluation.per_class["IoU"], [100 / 3, 200 / 3, 0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(evaluation.per_class["accuracy"], [50, 100, 0, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(evaluation.per_class["pixels"], [2, 2, 1, 0])


def test_a_thousand_random_maps():
    rng = np.random.default_rng(1)
    classes = 7
    labels = rng.integers(0, classes + 1, (1000, 12, 9)).astype(np.uint8)
    labels[labels == classes] = 255
    labels[:, :2] = 3  # uneven class frequencies
    predictions = rng.integers(0, classes - 1, (1000, 12, 9))  # the last class is never predicted
    predictions = np.where(rng.uniform(size=labels.shape) < 0.6, np.where(labels < classes, labels, 0), predictions)
    expected = reference_metrics(confusion(labels, predictions, classes))
    metrics = evaluate_maps(labels, predictions, classes).metrics
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-9), name


def test_metrics_without_labeled_pixels_are_zero():
    labels = np.full((1, 4, 4), 255, np.uint8)
    metrics = evaluate_maps(labels, np.zeros((1, 4, 4), int), 3).metrics
    assert [metrics[name] for name in ("mIoU", "mAcc", "aAcc", "loss")] == [0, 0, 0, 0]


def make_source(sizes, seed=0):
    rng = np.random.default_rng(seed)
    images = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((w, h))) for h, w in sizes
    ]
    labels = [
        np.repeat(np.repeat(rng.integers(0, CLASSES, (5, 5)), 20, 0), 20, 1)[:h, :w].astype(np.uint8) for h, w in sizes
    ]
    for label in labels:
        label[:3] = 255
    return SegmentationArraySource(images, labels, tuple("abcde"))


SIZES = [(60, 80), (60, 80), (80, 60), (61, 80), (60, 80), (50, 90)]


def evaluate_one_by_one(source, *, scale, ratios, flip):
    """Reference that applies the published steps to one image at a time."""
    matrix = 0
    for index in range(len(source)):
        record = source[index]
        height, width = record["label"].shape
        total = 0
        for ratio in ratios:
            transform = make_segmentation_eval_transform(scale=scale, ratios=(ratio,))
            view = transform(record)["view_0"]
            for mirrored in (False, True) if flip else (False,):
                image = view[:, ::-1] if mirrored else view
                logits = resize_bilinear(quarter(jnp.asarray(image)[None]), view.shape[:2])
                probabilities = jax.nn.softmax(resize_bilinear(logits, (height, width)), axis=-1)[0]
                total += probabilities[:, ::-1] if mirrored else probabilities
        matrix = matrix + confusion(record["label"], np.asarray(total).argmax(axis=-1), CLASSES)
    return reference_metrics(matrix)


@pytest.mark.slow
@pytest.mark.parametrize(("ratios", "flip"), [((1.0,), False), ((0.5, 1.0, 1.3), True)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_batches_of_many_sizes_equal_single_images(ratios, flip, batch_size):
    source = make_source(SIZES)
    scale = (200, 70)
    transform = make_segmentation_eval_transform(scale=scale, ratios=ratios)
    evaluate = segmentation.make_evaluator(predict, flip=flip)
    metrics = evaluate({}, make_sized_eval_batches(source, transform, batch_size=batch_size)).metrics
    assert metrics["images"] == len(source)
    for name, value in evaluate_one_by_one(source, scale=scale, ratios=ratios, flip=flip).items():
        assert metrics[name] == pytest.approx(value, rel=2e-3), (
            name
        )  # a pixel or two may be on the boundary between two classes


def test_programs_of_many_sizes_are_discarded(monkeypatch):
    """On CPU, XLA crashes at about a hundred programs, when the process has no memory maps left."""
    source, transform = make_source(SIZES), make_segmentation_eval_transform(scale=(96, 48), ratios=(1.0,))
    batches = list(make_sized_eval_batches(source, transform, batch_size=1))
    shapes = [batch["view_0"].shape for batch in batches]
    assert len(set(shapes)) > 2
    metrics = segmentation.make_evaluator(predict)({}, batches).metrics
    traced = []

    def count(variables, batch):
        traced.append(batch["image"].shape)
        return predict(variables, batch)

    monkeypatch.setattr(segmentation, "_MOST_MEMORY_MAPS", 0)
    assert segmentation.make_evaluator(count)({}, batches).metrics == metrics
    assert traced == [shape for index, shape in enumerate(shapes) if index == 0 or shape != shapes[index - 1]]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how many memory maps a process has")
def test_discarding_programs_returns_their_memory_maps():
    before = segmentation._count_memory_maps()
    program = jax.jit(lambda image: jnp.tanh(image) @ jnp.cos(image).T)
    discard = segmentation._make_discarding([program])
    for side in range(8, 40):
        discard([np.zeros((side, side))])
        program(np.zeros((side, side), np.float32))
    assert segmentation._count_memory_maps() > before + 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_MOST_MEMORY_MAPS", before)
        discard([np.zeros((4, 4))])
    assert segmentation._count_memory_maps() < before + 30


def test_several_devices_count_each_image_once():
    source = make_source(SIZES)
    transform = make_segmentation_eval_transform(scale=(200, 70))
    evaluate = segmentation.make_evaluator(predict)
    single = evaluate({}, make_sized_eval_batches(source, transform, batch_size=1)).metrics
    mesh = sharding.make_mesh(data=4, fsdp=2)
    batches = make_sized_eval_batches(source, transform, batch_size=8)
    sharded = evaluate({}, (sharding.put_batch(batch, mesh) for batch in batches)).metrics
    assert sharded == pytest.approx(single, rel=1e-6)


def test_windows_cover_images_as_published():
    sides = jnp.array([70, 100, 40, 64, 160])
    whole = segmentation.slide(sides, 160, window=0, stride=0)
    assert whole.starts.tolist() == [[0]] * 5
    assert whole.length.tolist() == sides.tolist()
    windows = segmentation.slide(sides, 160, window=64, stride=48)
    used = [
        [start for start, is_used in zip(*row, strict=True) if is_used]
        for row in zip(windows.starts.tolist(), windows.used.tolist(), strict=True)
    ]
    assert used == [[0, 6], [0, 36], [0], [0], [0, 48, 96]]
    assert windows.length.tolist() == [64, 64, 40, 64, 64]


@pytest.mark.parametrize("flip", [False, True])
def test_logits_of_windows_are_averaged(flip):
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize((100, 70)))
    windows = [(top, left, 64, 64) for top in (0, 6) for left in (0, 36)]
    total = 0
    for mirrored in (False, True) if flip else (False,):
        view = image[:, ::-1] if mirrored else image
        logits, count = np.zeros((70, 100, CLASSES)), np.zeros((70, 100, 1))
        for top, left, height, width in windows:
            cut = np.s_[top : top + height, left : left + width]
            logits[cut] += resize_bilinear(quarter(jnp.asarray(view[cut])[None]), (height, width))[0]
            count[cut] += 1
        probabilities = jax.nn.softmax(resize_bilinear(jnp.asarray(logits / count)[None], (35, 45)), axis=-1)[0]
        total += probabilities[:, ::-1] if mirrored else probabilities
    expected = np.asarray(total).max(axis=-1) / (1 + flip)
    segment = segmentation.make_segmenter(predict, flip=flip, window=64, stride=48)
    labels, probabilities = segment({}, [image[None]], jnp.array([[35, 45]]), (35, 45))
    np.testing.assert_allclose(probabilities[0], expected, atol=1e-5)
    assert (np.asarray(labels[0]) == np.asarray(total).argmax(axis=-1)).mean() > 0.999


def test_figures_are_saved(tmp_path):
    source = make_source(SIZES[:3])
    transform = make_segmentation_eval_transform(scale=(200, 70))
    records = [transform(source[index]) | {"image": source[index]["image"]} for index in range(3)]
    segmentation.save_figures(
        segmentation.make_segmenter(predict),
        {},
        records,
        class_names=source.class_names,
        palette=make_palette(CLASSES),
        directory=tmp_path,
    )
    with Image.open(tmp_path / "segmentations.png") as figure:
        assert min(figure.size) > 300


class Bucketed:
    """Evaluation of a random segmentor in float64, by buckets or with an array of its own size for each image."""

    scale, sizes = (200, 70), [(60, 80), (61, 85), (60, 80), (80, 60), (50, 90), (90, 52), (60, 83)]

    def __init__(self, count=7):
        self.sizes = self.sizes[:count]
        model, variables = tiny_segmentation.random_segmentor(num_classes=CLASSES, dtype=jnp.float64)
        self.variables = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
        self.predict = make_segmentation_objective(model, auxiliary_weight=0.0).predict
        self.source = make_source(self.sizes)

    def evaluate(self, choice, *, ratios, **options):
        transform = make_segmentation_eval_transform(scale=self.scale, ratios=ratios)
        buckets = choose_eval_buckets(self.source, transform, choice)
        evaluate = segmentation.make_evaluator(self.predict, exact=buckets is None, **options)
        batches = list(make_sized_eval_batches(self.source, transform, batch_size=3, buckets=buckets))
        return evaluate(self.variables, batches), {batch["view_0"].shape for batch in batches}


@pytest.mark.parametrize(
    ("ratios", "options"),
    [
        ((1.0,), {}),
        slow((0.75, 1.0, 1.25), dict(flip=True)),
        slow((1.0,), dict(window=48, stride=32)),
        slow((0.8, 1.0), dict(window=64, stride=48, flip=True)),
    ],
)
def test_buckets_change_no_result(x64, ratios, options):
    bucketed = Bucketed(count=7 if options or len(ratios) > 1 else 3)
    by_size, sizes = bucketed.evaluate("exact", ratios=ratios, **options)
    by_bucket, buckets = bucketed.evaluate("auto", ratios=ratios, **options)
    assert len(buckets) < len(sizes)
    assert by_bucket.metrics["images"] == by_size.metrics["images"] == len(bucketed.sizes)
    assert by_bucket.metrics == pytest.approx(by_size.metrics, rel=1e-9)
    for name, values in by_size.per_class.items():
        np.testing.assert_array_equal(by_bucket.per_class[name], values)


def test_buckets_that_are_given_or_not_needed(x64):
    bucketed = Bucketed()
    transform = make_segmentation_eval_transform(scale=bucketed.scale)
    assert choose_eval_buckets(bucketed.source, transform, "exact") is None
    assert choose_eval_buckets(bucketed.source, transform, "96x128,128x96") == [(96, 128), (128, 96)]
    assert choose_eval_buckets(make_source([(60, 80)] * 3), transform, "auto") is None
    with pytest.raises(UserError, match="No bucket holds an image of"):
        next(make_sized_eval_batches(bucketed.source, transform, batch_size=2, buckets=[(64, 64)]))
