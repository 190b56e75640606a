"""Anchors, assignment, samples, losses, gradients and detections against golden arrays of the published detectors."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.conversion.detectors import detector_from_official, detector_to_official, detector_variables
from dat_jax.evaluation.detection import to_original
from dat_jax.models import rpn
from dat_jax.models.retinanet import STRIDES, RetinaNet
from dat_jax.tasks.detection.anchors import assign_anchors, level_shapes, make_level_anchors
from dat_jax.tasks.detection.objective import default_settings
from dat_jax.tasks.detection.rcnn import rcnn_detect, rcnn_loss, sample_rois
from dat_jax.tasks.detection.retinanet import RetinaNetSettings, retinanet_detect, retinanet_loss
from dat_jax.tasks.detection.rpn import choose_proposals
from tests.helpers.golden_files import channels_last, load, relative_error
from tests.helpers.padded_images import surround

# Relative tolerances of values, which were computed in float64 and stored in float32, and of losses.
TOLERANCES = {"float64": (5e-6, 1e-7), "float32": (1e-4, 1e-4)}
# Relative tolerances of gradient norms in float64. In the cascade, rounding matters near the kinks of ReLU.
NORMS_CLOSE = {"retinanet": 1e-8, "maskrcnn": 2e-6, "cascade": 5e-6}
TRUTHS = 6  # ground truth boxes per image, including padding
RCNN = ["maskrcnn", "cascade"]
QUICK_KINDS = ["retinanet", "maskrcnn", pytest.param("cascade", marks=pytest.mark.slow)]


def make(kind, dtype):
    """The model, its variables, images and the batch."""
    arrays, config, metas, state_dict = load(kind)
    model = detector_from_official(config, dtype=jnp.dtype(dtype))
    variables = detector_variables(model, {name: np.asarray(x).astype(dtype) for name, x in state_dict.items()})
    images = channels_last(arrays["images"].astype(dtype))
    height, width = images.shape[1:3]
    batch = {
        "valid": np.array([meta["img_shape"][:2] for meta in metas], np.int32),
        "scale": np.array([meta["scale_factor"] for meta in metas], np.float32),
        "boxes": np.full((2, TRUTHS, 4), np.nan, np.float32),  # padding may be anything
        "labels": np.full((2, TRUTHS), -7, np.int32),
        "box_mask": np.zeros((2, TRUTHS), bool),
    }
    masks = np.ones((2, TRUTHS, height, width), np.uint8)
    for image in range(2):
        count = len(arrays[f"gt_bboxes{image}"])
        batch["boxes"][image, :count] = arrays[f"gt_bboxes{image}"]
        batch["labels"][image, :count] = arrays[f"gt_labels{image}"]
        batch["box_mask"][image, :count] = True
        if not isinstance(model, RetinaNet):
            rows, columns = arrays[f"gt_masks_shape{image}"][1:]
            bits = np.unpackbits(arrays[f"gt_masks{image}"], axis=1)[:, : rows * columns]
            masks[image, :count] = 0
            masks[image, :count, :rows, :columns] = bits.reshape(count, rows, columns)
    batch["masks"] = np.packbits(masks, axis=-1)
    return model, variables, images, jax.tree.map(jnp.asarray, batch)


def settings_of(model, config, mode="firstk"):
    """Settings of the recorded arrays; in the mode "all" every candidate is sampled."""
    if isinstance(model, RetinaNet):
        test = config["test_cfg"]
        return RetinaNetSettings(candidates=test["nms_pre"], max_detections=test["max_per_img"])
    train, test = config["train_cfg"], config["test_cfg"]
    first = train["rcnn"][0] if model.cascade else train["rcnn"]
    samples = [train["rpn"]["sampler"], first["sampler"]]
    everything = mode == "all"
    return dataclasses.replace(
        default_settings(model),
        rpn_samples=20_000 if everything else samples[0]["num"],
        rpn_positive=1.0 if everything else samples[0]["pos_fraction"],
        roi_samples=300 if everything else samples[1]["num"],
        roi_positive=1.0 if everything else samples[1]["pos_fraction"],
        train_candidates=train["rpn_proposal"]["nms_pre"],
        train_proposals=train["rpn_proposal"]["max_per_img"],
        test_candidates=test["rpn"]["nms_pre"],
        test_proposals=test["rpn"]["max_per_img"],
        max_detections=test["rcnn"]["max_per_img"],
    )


def check_detections(kind, dtype, *, in_larger_arrays=False):
    arrays, config, metas, _ = load(kind)
    (model, variables, images, batch), (close, _) = make(kind, dtype), TOLERANCES[dtype]
    settings, sizes = settings_of(model, config), None
    if in_larger_arrays:
        images, sizes = surround(images, rows=64)
        batch["sizes"] = jnp.asarray(sizes)

    def detect(module, images):
        if isinstance(module, RetinaNet):
            return retinanet_detect(module, module(images, sizes=sizes), batch, settings), None
        proposals = choose_proposals(
            module,
            module.propose(module.pyramid(images, sizes=sizes), sizes=sizes),
            batch["valid"],
            candidates=settings.test_candidates,
            count=settings.test_proposals,
            iou_threshold=settings.proposal_iou,
        )
        return rcnn_detect(module, images, batch, settings), proposals

    detections, proposals = jax.jit(nn.apply(detect, model))(variables, images)
    for image in range(2):
        expected = arrays[f"test.det_bboxes{image}"]
        assert int(detections["valid"][image].sum()) == len(expected)
        count = np.s_[image, : len(expected)]
        np.testing.assert_array_equal(detections["labels"][count], arrays[f"test.det_labels{image}"])
        assert relative_error(detections["boxes"][count], expected[:, :4]) < close
        assert relative_error(detections["scores"][count], expected[:, 4]) < close
        if kind == "retinanet":
            continue
        expected = arrays[f"test.proposals{image}"]
        assert int(proposals.valid[image].sum()) == len(expected)
        assert relative_error(proposals.boxes[image, : len(expected)], expected[:, :4]) < close
        assert relative_error(proposals.scores[image, : len(expected)], expected[:, 4]) < close
        check_masks(arrays, kind, image, jax.tree.map(lambda x: np.asarray(x[image]), detections), metas[image], close)  # noqa: B023


def check_masks(arrays, kind, image, detections, meta, close):
    masks = detections["masks"][detections["valid"]]
    if kind == "cascade":
        assert relative_error(masks[::6], arrays[f"test.mask_prob_merged_6{image}"]) < close
    else:  # 60 detections per image
        logits = arrays["test.mask0.logits_own_6"][10 * image : 10 * image + 10].astype(float)
        assert relative_error(masks[::6], 1 / (1 + np.exp(-logits))) < close
    pasted = to_original({**detections, "original": meta["ori_shape"][:2]}, masks=True)["masks"]
    shape = arrays[f"test.masks_shape{image}"]
    assert pasted.shape == tuple(shape)
    expected = np.unpackbits(arrays[f"test.masks{image}"], axis=1)[:, : shape[1] * shape[2]].reshape(shape)
    differing = (pasted != expected).sum(axis=(1, 2))
    assert (differing <= arrays["test.masks_ambiguous"].reshape(2, -1)[image]).all()


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_detections(kind):
    check_detections(kind, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", *RCNN])
def test_detections_in_float64(kind, x64):
    check_detections(kind, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", *RCNN])
def test_detections_in_larger_arrays_in_float64(kind, x64):
    check_detections(kind, "float64", in_larger_arrays=True)


def compute_losses(kind, mode, dtype):
    """The model, a function of parameters that returns (loss, (metrics, model state)), and the parameters."""
    _, config, _, _ = load(kind)
    model, variables, images, batch = make(kind, dtype)
    settings = settings_of(model, config, mode)

    def compute(module, images):
        if isinstance(module, RetinaNet):
            return retinanet_loss(module, module(images, train=True), batch)
        return rcnn_loss(module, images, batch, None, settings)

    def loss(params):
        apply = nn.apply(compute, model, mutable=["batch_stats"])
        (value, metrics), state = apply({**variables, "params": params}, images)
        return value, (metrics, state)

    return model, loss, variables["params"]


def check_losses(kind, mode, dtype, value, metrics):
    arrays, exact = load(kind)[0], TOLERANCES[dtype][1]
    assert relative_error(value, arrays[f"{mode}.loss_total"]) < exact
    expected = expected_metrics(arrays, f"{mode}.loss.", kind)
    assert set(metrics) == set(expected)
    for name, x in expected.items():
        assert relative_error(metrics[name], x) < 10 * exact, name


def expected_metrics(arrays, prefix, kind):
    sums = {key.removeprefix(prefix): x.sum() for key, x in arrays.items() if key.startswith(prefix)}
    if kind == "retinanet":
        return {"class_loss": sums["loss_cls"], "box_loss": sums["loss_bbox"]}
    expected = {"rpn_class_loss": sums["loss_rpn_cls"], "rpn_box_loss": sums["loss_rpn_bbox"]}
    ours = {"loss_cls": "class_loss", "loss_bbox": "box_loss", "loss_mask": "mask_loss", "acc": "accuracy"}
    for stage in range(3) if kind == "cascade" else [None]:
        before, after = ("", "") if stage is None else (f"s{stage}.", f"_{stage}")
        expected |= {f"{name}{after}": sums[f"{before}{published}"] for published, name in ours.items()}
    return expected


@pytest.mark.parametrize("kind", ["retinanet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in RCNN)])
def test_losses(kind):
    mode = "all" if kind == "retinanet" else "firstk"
    _, loss, params = compute_losses(kind, mode, "float32")
    value, (metrics, _) = jax.jit(loss)(params)
    check_losses(kind, mode, "float32", value, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RCNN)
def test_losses_of_all_candidates(kind, x64):
    _, loss, params = compute_losses(kind, "all", "float64")
    value, (metrics, _) = jax.jit(loss)(params)
    check_losses(kind, "all", "float64", value, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", *RCNN])
def test_losses_and_gradients_in_float64(kind, x64):
    """Every loss, the norms of the gradients, and the statistics of BatchNorm after the step."""
    arrays, mode = load(kind)[0], "all" if kind == "retinanet" else "firstk"
    model, loss, params = compute_losses(kind, mode, "float64")
    (value, (metrics, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    check_losses(kind, mode, "float64", value, metrics)
    ours = detector_to_official(model, jax.device_get({"params": gradients, **state}))
    for key, x in arrays.items():
        if key.startswith(f"{mode}.after."):
            assert relative_error(ours[key.removeprefix(f"{mode}.after.")], x) < 1e-6, key
    prefix = f"{mode}.gradnorm."
    norms = {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}
    assert len(norms) == len(jax.tree.leaves(gradients))
    for name, x in norms.items():
        norm = np.linalg.norm(ours[name])
        if x < 1e-12 or name.endswith("proj_k.bias"):  # zero in exact arithmetic
            assert norm < 1e-3 * max(norms.values()), name
        else:
            assert relative_error(norm, x) < NORMS_CLOSE[kind], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", *RCNN])
def test_anchors_and_their_assignment(kind):
    arrays, _, _, _ = load(kind)
    model, variables, images, batch = make(kind, "float32")
    strides = STRIDES if kind == "retinanet" else rpn.STRIDES
    outputs = jax.eval_shape(model.apply, variables, images)
    anchors = make_level_anchors(model, outputs, strides)
    for level in range(2, 5):
        np.testing.assert_array_equal(anchors[level], arrays[f"anchors{level}"])
    thresholds = dict(positive=0.5, negative=0.4, min_positive=0.0)
    if kind != "retinanet":
        thresholds = dict(positive=0.7, negative=0.3, min_positive=0.3)
    options = dict(strides=strides, inside_only=kind == "cascade", **thresholds)
    codes = jax.jit(lambda batch: assign_anchors(anchors, level_shapes(outputs), batch, **options))(batch)
    for image in range(2):
        np.testing.assert_array_equal(codes[image], arrays[f"anchor_assigned{image}"])
        np.testing.assert_array_equal(codes[image] != -3, arrays[f"anchor_considered{image}"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", RCNN)
def test_sampled_rois(kind):
    """Positive RoIs with their ground truth, and background, sampled from the recorded proposals of every stage."""
    arrays, config, _, _ = load(kind)
    model, _, _, batch = make(kind, "float32")
    settings = settings_of(model, config)
    for index, stage in enumerate(settings.stages):
        boxes = [arrays[f"firstk.rcnn{index}.in_boxes{image}"] for image in range(2)]
        most = max(map(len, boxes))
        valid = jnp.array([np.arange(most) < len(x) for x in boxes])
        padded = jnp.array([np.pad(x, ((0, most - len(x)), (0, 0)), constant_values=np.nan) for x in boxes])
        rois = sample_rois(padded, valid, batch, None, stage, settings)
        for image in range(2):
            name = f"firstk.rcnn{index}"
            known = np.concatenate([arrays[f"gt_bboxes{image}"], boxes[image]])
            positives, negatives = arrays[f"{name}.pos_inds{image}"], arrays[f"{name}.neg_inds{image}"]
            count = len(positives) + len(negatives)
            assert int(rois.valid[image].sum()) == count
            np.testing.assert_array_equal(
                rois.boxes[image, :count], known[np.concatenate([positives, negatives])].astype(np.float32)
            )
            truths = np.concatenate([arrays[f"{name}.pos_gt{image}"], np.full(len(negatives), -1)])
            np.testing.assert_array_equal(rois.ground_truth[image, :count], truths)
            is_truth = np.concatenate([positives, negatives]) < len(arrays[f"gt_bboxes{image}"])
            np.testing.assert_array_equal(rois.is_ground_truth[image, :count], is_truth)
