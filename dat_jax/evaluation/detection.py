"""COCO average precision of boxes and masks, computed by pycocotools, and figures of detections."""

import contextlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dat_jax.evaluation.results import Evaluation
from dat_jax.ops.detection.masks import paste_masks
from dat_jax.visualization import charts

METRIC = "bbox/AP"  # the best checkpoint has the highest value of this metric
# COCO's summary: average precision over IoU .5:.05:.95, at .5, at .75, for small, medium and large objects; average recall with
# at most 1, 10 and 100 detections per image, and for small, medium and large objects.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

_MASK_THRESHOLD = 0.5  # of a pixel's probability
_MIN_SHOWN_SCORE = 0.3  # of detections in figures


def make_evaluator(
    predict: Callable, *, load_ground_truth: Callable[[], dict], category_ids: Sequence[int], masks: bool
) -> Callable[..., Evaluation]:
    """Make ``evaluate(variables, batches) -> Evaluation``, compiled once per shape of images.

    Args:
      predict: see ``tasks.detection.objective``.
      load_ground_truth: function that returns the result of ``data.coco.to_coco_ground_truth`` for the images; called at every
        evaluation.
      category_ids: COCO category id of every label.
      masks: whether masks are evaluated in addition to boxes.

    Returns:
      A function of variables and batches, see ``data.sized_batching.make_detection_eval_batches``. Its metrics are those of
      ``evaluate_coco``, over the images whose "mask" is 1, and "images", their number; those of the classes are "bbox/AP" and
      "segm/AP". Every process converts the detections of the images on its own devices; these are then gathered on all
      processes.
    """
    network = jax.jit(predict)

    def collect(batch, outputs, image_ids):
        """Return the detections of this process in a batch, and the ids of its images."""
        rows = jax.tree.map(_local_rows, {**outputs, **{name: batch[name] for name in ("original", "index", "mask")}})
        detections, evaluated = [], []
        for row in np.flatnonzero(rows["mask"] > 0):
            image = to_original({name: values[row] for name, values in rows.items()}, masks=masks)
            arrays = (image["boxes"], image["labels"], image["scores"], image["masks"])
            image_id = image_ids[rows["index"][row]]
            evaluated.append(image_id)
            detections += make_detections(*arrays, image_id=image_id, category_ids=category_ids)
        return detections, evaluated

    def evaluate(variables, batches):
        ground_truth = load_ground_truth()
        image_ids = [image["id"] for image in ground_truth["images"]]
        detections, evaluated, pending = [], [], None
        for batch in itertools.chain(batches, [None]):
            # The devices compute a batch while the host converts the outputs of the previous one.
            started = None if batch is None else (batch, network(variables, _network_inputs(batch)))
            if pending is not None:
                batch_detections, batch_ids = collect(*pending, image_ids)
                detections, evaluated = detections + batch_detections, evaluated + batch_ids
            pending = started
        if jax.process_count() > 1:
            detections, evaluated = _gather(detections, evaluated)
        kinds = ("bbox", "segm") if masks else ("bbox",)
        ground_truth = _restrict(ground_truth, set(evaluated))
        curves = {kind: compute_curves(ground_truth, detections, kind=kind) for kind in kinds}
        order = np.argsort(np.argsort(category_ids))  # position of each label's category among the sorted ids
        return Evaluation(
            {**_summarize(curves), "images": len(evaluated)},
            per_class={f"{kind}/AP": _class_precision(values["precision"])[order] for kind, values in curves.items()},
        )

    return evaluate


def to_original(outputs: dict[str, np.ndarray], *, masks: bool) -> dict[str, Any]:
    """Convert the outputs of one image to detections in the original image, on the host.

    Args:
      outputs: one row of every output of ``predict``, and "original", (height, width).
      masks: whether masks are pasted into the image.

    Returns:
      {"boxes": float32 (n, 4), x1, y1, x2, y2 in pixels of the original image, "scores": float32 (n,), descending, "labels":
      int32 (n,), "masks": bool (n, height, width), or None}.
    """
    valid = outputs["valid"]
    detections = {name: np.asarray(outputs[name])[valid] for name in ("boxes", "scores", "labels")}
    pasted = None
    if masks:
        height, width = (int(side) for side in outputs["original"])
        pasted = paste_masks(outputs["masks"][valid], detections["boxes"], (height, width), threshold=_MASK_THRESHOLD)
    return detections | {"masks": pasted}


def detect_record(network: Callable, variables, record: dict, *, masks: bool) -> dict[str, np.ndarray]:
    """Detect the objects of one example.

    Args:
      network: a jitted ``predict``.
      variables: variables of the model.
      record: "image", "valid", "scale" and "original" of one example, without a batch axis, and "sizes" if the padded image is
        the top left of a larger array.
      masks: whether masks are pasted into the image.

    Returns:
      See ``to_original``.
    """
    inputs = ("image", "valid", "scale", "sizes")
    outputs = network(variables, {name: np.asarray(record[name])[None] for name in inputs if name in record})
    outputs = {name: np.asarray(values[0]) for name, values in outputs.items()}
    return to_original({**outputs, "original": record["original"]}, masks=masks)


def save_figures(
    predict: Callable,
    variables,
    records: Sequence[tuple[dict, dict]],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    masks: bool,
    directory: pathlib.Path,
) -> None:
    """Save detections.png, with the ground truth of some examples and the detections with a score of at least 0.3.

    Args:
      predict: see ``make_evaluator``.
      variables: variables of the model.
      records: two dictionaries per example: the ground truth ("image", "boxes", "labels" and bool "masks" or None, all of the
        original image), and the record for ``detect_record``.
      class_names: names of the K classes.
      palette: their colors, uint8 (K, 3).
      masks: whether masks are predicted.
      directory: folder of the figure.
    """
    network, rows = jax.jit(predict), []
    for ground_truth, record in records:
        detections = detect_record(network, variables, record, masks=masks)
        is_shown = detections["scores"] >= _MIN_SHOWN_SCORE
        detections = {name: None if values is None else values[is_shown] for name, values in detections.items()}
        image = ground_truth["image"]
        rows.append({"objects": (image, ground_truth), "detections": (image, detections)})
    charts.save_detections(directory / "detections.png", rows, class_names=class_names, palette=palette)


def _network_inputs(batch):
    return {name: batch[name] for name in ("image", "valid", "scale", "sizes") if name in batch}


def _local_rows(array: jax.Array) -> np.ndarray:
    """Return the rows of a global array that are on the devices of this process, in order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def _restrict(ground_truth: dict, image_ids: set[int]) -> dict:
    """Return the ground truth of some images."""
    return {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in ground_truth["annotations"] if entry["image_id"] in image_ids],
        "categories": ground_truth["categories"],
    }


def _gather(detections: list[dict], image_ids: list[int]) -> tuple[list[dict], list[int]]:
    """Return the detections and the image ids of all processes."""
    text = np.frombuffer(json.dumps([detections, image_ids]).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    parts = [
        json.loads(row[:length].tobytes())
        for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]
    return [detection for part in parts for detection in part[0]], [number for part in parts for number in part[1]]


def evaluate_coco(
    ground_truth: dict, detections: Sequence[dict], *, kinds: Sequence[Literal["bbox", "segm"]] = ("bbox", "segm")
) -> dict[str, float]:
    """Compute COCO's twelve metrics for boxes, masks, or both.

    Args:
      ground_truth: "images", "annotations" and "categories" as in COCO files; see ``data.coco.to_coco_ground_truth``.
      detections: see ``make_detections``; all must be of images of the ground truth.
      kinds: "bbox" and "segm"; the latter requires a "segmentation" of every annotation and detection.

    Returns:
      {"bbox/AP", "bbox/AP50", ..., "segm/AP", ...} in percent, or -1 if the ground truth has no object of that size. Without
      detections, all other metrics are 0.

    Raises:
      ValueError: a detection is of another image.
    """
    return _summarize({kind: compute_curves(ground_truth, detections, kind=kind) for kind in kinds})


def _summarize(curves: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Return the twelve metrics of each kind from the results of ``compute_curves``."""
    metrics = {}
    for kind, values in curves.items():
        for name, value in zip(NAMES, values["stats"].tolist(), strict=True):
            metrics[f"{kind}/{name}"] = value if value < 0 else 100 * value
    return metrics


def _class_precision(precision: np.ndarray) -> np.ndarray:
    """Return the AP of each category in percent, by id, (K,); NaN for categories without objects."""
    of_all_sizes = precision[:, :, :, 0, -1]  # with at most 100 detections per image
    values = 100 * of_all_sizes.mean(axis=(0, 1))
    return np.where(of_all_sizes.max(axis=(0, 1)) < 0, np.nan, values)


def compute_curves(
    ground_truth: dict, detections: Sequence[dict], *, kind: Literal["bbox", "segm"]
) -> dict[str, np.ndarray]:
    """Compute precision and recall of COCO's evaluation for one kind.

    Boxes of detections are ignored in the evaluation of masks, so that small, medium and large refer to the area of the masks.

    Args:
      ground_truth, detections: see ``evaluate_coco``; they are not modified.
      kind: "bbox" or "segm".

    Returns:
      {"precision": float64 (10 IoUs, 101 recalls, K categories by id, 4 areas, 3 limits), "recall": float64 (10, K, 4, 3),
      "stats": float64 (12,)}. Areas are all, small, medium and large; limits are 1, 10 and 100 detections per image. Values are
      from 0 to 1, or -1 without ground truth. "stats" are their means in the order of ``NAMES``.

    Raises:
      ValueError: a detection is of another image.
    """
    image_ids = {image["id"] for image in ground_truth["images"]}
    unknown = [detection["image_id"] for detection in detections if detection["image_id"] not in image_ids]
    if unknown:
        raise ValueError(f"The image {unknown[0]} of a detection is not in the ground truth.")
    ignored_key = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{key: value for key, value in detection.items() if key != ignored_key} for detection in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        dataset = {**ground_truth, "annotations": [dict(entry) for entry in ground_truth["annotations"]]}
        coco.dataset = dataset  # pyright: ignore[reportAttributeAccessIssue] (JSON, a typed dictionary in the stub)
        coco.createIndex()
        evaluation = COCOeval(coco, _load_results(coco, results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: evaluation.eval[name] for name in ("precision", "recall")} | {"stats": np.array(evaluation.stats)}


def _load_results(ground_truth: COCO, results: list[dict]) -> COCO:
    if results:
        return ground_truth.loadRes(results)  # pyright: ignore[reportArgumentType] (lists are missing in the stub)
    empty = COCO()  # loadRes requires at least one result
    empty.dataset = {**ground_truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def make_detections(
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    masks: np.ndarray | None = None,
    *,
    image_id: int,
    category_ids: Sequence[int],
) -> list[dict]:
    """Convert the detections of an image to COCO's result format, for ``evaluate_coco`` and for JSON files.

    Args:
      boxes: float (n, 4), x1, y1, x2, y2 in pixels of the original image.
      labels: int (n,), from 0.
      scores: float (n,).
      masks: bool (n, H, W), of the original image, or None.
      image_id: id of the image in the ground truth.
      category_ids: COCO category id of every label.

    Returns:
      {"image_id", "category_id", "bbox": x, y, width, height, "score"} per detection, and with masks "segmentation", a
      compressed RLE with counts of type str. Detections with a box or score that is not finite are left out.
    """
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64)
    coco_boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    detections = []
    for index in np.flatnonzero(np.isfinite(coco_boxes).all(axis=1) & np.isfinite(scores)):
        detection = {
            "image_id": int(image_id),
            "category_id": int(category_ids[int(labels[index])]),
            "bbox": coco_boxes[index].tolist(),
            "score": float(scores[index]),
        }
        detections.append(detection | ({} if masks is None else {"segmentation": encode_mask(masks[index])}))
    return detections


def encode_mask(mask: np.ndarray) -> dict:
    """Encode a mask, bool (H, W), as a compressed RLE, {"size": [H, W], "counts": str}."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    counts = encoded["counts"].decode()  # pyright: ignore[reportAttributeAccessIssue] (bytes, not str as in the stub)
    return {"size": [int(side) for side in encoded["size"]], "counts": counts}
