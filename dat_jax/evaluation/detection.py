"""COCO's average precision of boxes and of masks, by pycocotools, and pictures of detections."""

import contextlib
import io
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dat_jax.ops.detection.masks import paste_masks
from dat_jax.visualization import charts as plots

METRIC = "bbox/AP"  # what the best checkpoint is best in
# Of COCO's summary: precision over IoU .5:.05:.95, at .5, at .75, of small, medium and large objects; recall with at most 1, 10
# and 100 detections an image, and of small, medium and large objects.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

_MASK_THRESHOLD = 0.5  # of a pixel's probability
_SHOWN_SCORE = 0.3  # from which on a detection is drawn


def make_evaluator(
    predict: Callable, *, load_ground_truth: Callable[[], dict], category_ids: Sequence[int], masks: bool
) -> Callable[..., dict[str, float]]:
    """Makes ``evaluate(variables, batches) -> metrics``, compiled once for each shape that images come in.

    Args:
      predict: see ``tasks.detection.detector``.
      load_ground_truth: gives what ``data.coco.to_coco_ground_truth`` makes of the images; asked for at every evaluation.
      category_ids: of the labels, in order.
      masks: whether masks are judged beside boxes.

    Returns:
      A function of variables and batches, as ``data.batching.make_detection_eval_batches`` makes them. It gives what
      ``evaluate_coco`` does, and "images". Every process makes the detections of the images on its own devices; then each
      gets those of all.
    """
    network = jax.jit(predict)

    def evaluate(variables, batches):
        truth = load_ground_truth()
        image_ids = [image["id"] for image in truth["images"]]
        found, seen, pending = [], 0, None

        def collect(batch, outputs):
            rows = jax.tree.map(_own_rows, {**outputs, **{name: batch[name] for name in ("original", "index", "mask")}})
            detections = []
            for row in np.flatnonzero(rows["mask"] > 0):
                one = to_original({name: values[row] for name, values in rows.items()}, masks=masks)
                names = dict(image_id=image_ids[rows["index"][row]], category_ids=category_ids)
                detections += make_detections(one["boxes"], one["labels"], one["scores"], one["masks"], **names)
            return detections, int((rows["mask"] > 0).sum())

        for batch in itertools.chain(batches, [None]):
            # The devices compute a batch while the one before becomes detections.
            started = None if batch is None else (batch, network(variables, _inputs(batch)))
            if pending is not None:
                detections, count = collect(*pending)
                found, seen = found + detections, seen + count
            pending = started
        if jax.process_count() > 1:
            found, seen = _of_all_processes([found, seen])
        kinds = ("bbox", "segm") if masks else ("bbox",)
        return {**evaluate_coco(truth, found, kinds=kinds), "images": seen}

    return evaluate


def to_original(outputs: dict[str, np.ndarray], *, masks: bool) -> dict[str, np.ndarray]:
    """The detections of one image, on the host.

    Args:
      outputs: of ``predict``, one row of each, and "original", (height, width).
      masks: whether to paste the masks into the image.

    Returns:
      {"boxes": float32 (n, 4), x1, y1, x2, y2 in pixels of the original image, "scores": float32 (n,), descending, "labels":
      int32 (n,), "masks": bool (n, height, width), or None}.
    """
    valid = outputs["valid"]
    found = {name: np.asarray(outputs[name])[valid] for name in ("boxes", "scores", "labels")}
    pasted = None
    if masks:
        shape = tuple(int(side) for side in outputs["original"])
        pasted = paste_masks(outputs["masks"][valid], found["boxes"], shape, threshold=_MASK_THRESHOLD)
    return found | {"masks": pasted}


def detect_record(network: Callable, variables, record: dict, *, masks: bool) -> dict[str, np.ndarray]:
    """``to_original`` of one example: "image", "valid", "scale", "original", not in a batch; ``network`` is a jitted predict."""
    outputs = network(variables, {name: np.asarray(record[name])[None] for name in ("image", "valid", "scale")})
    outputs = {name: np.asarray(values[0]) for name, values in outputs.items()}
    return to_original({**outputs, "original": record["original"]}, masks=masks)


def save_pictures(
    predict: Callable,
    variables,
    records: Sequence[tuple[dict, dict]],
    *,
    class_names: Sequence[str],
    palette: np.ndarray,
    masks: bool,
    directory: pathlib.Path,
) -> None:
    """detections.png: the objects of some examples, and what is detected with a score of 0.3 or more.

    Args:
      predict: see ``make_evaluator``.
      variables: of the model.
      records: of each, the original "image", "boxes", "labels" and bool "masks" (or None), and what ``detect_record`` wants.
      class_names, palette: of the K classes, uint8 (K, 3).
      masks: whether masks are predicted.
      directory: where it goes.
    """
    network, rows = jax.jit(predict), []
    for truth, record in records:
        found = detect_record(network, variables, record, masks=masks)
        shown = found["scores"] >= _SHOWN_SCORE
        found = {name: None if values is None else values[shown] for name, values in found.items()}
        rows.append({"objects": (truth["image"], truth), "detections": (truth["image"], found)})
    plots.save_detections(directory / "detections.png", rows, class_names=class_names, palette=palette)


def _inputs(batch):
    return {name: batch[name] for name in ("image", "valid", "scale")}


def _own_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global array that lie on this process's devices, in order."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def _of_all_processes(found: list) -> list:
    """[detections, number of images] of all processes, from those of each."""
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(text)] = text
    parts = [
        json.loads(row[:length].tobytes())
        for row, length in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]
    return [[detection for part in parts for detection in part[0]], sum(part[1] for part in parts)]


def evaluate_coco(
    ground_truth: dict, detections: Sequence[dict], *, kinds: Sequence[str] = ("bbox", "segm")
) -> dict[str, float]:
    """COCO's twelve numbers for boxes, for masks, or for both.

    Args:
      ground_truth: "images", "annotations" and "categories" as in COCO's files; see ``data.coco.to_coco_ground_truth``.
      detections: see ``make_detections``; of images of the ground truth.
      kinds: "bbox" and "segm", which wants a "segmentation" of every annotation and detection.

    Returns:
      {"bbox/AP", "bbox/AP50", ..., "segm/AP", ...}: percent; -1 where the ground truth has no object of such a size. All
      others are 0 where there are no detections.

    Raises:
      ValueError: a detection of another image.
    """
    metrics = {}
    for kind in kinds:
        stats = compute_curves(ground_truth, detections, kind=kind)["stats"]
        for name, value in zip(NAMES, stats.tolist(), strict=True):
            metrics[f"{kind}/{name}"] = value if value < 0 else 100 * value
    return metrics


def compute_curves(ground_truth: dict, detections: Sequence[dict], *, kind: str) -> dict[str, np.ndarray]:
    """What COCO's evaluation finds for one kind, "bbox" or "segm"; arguments as for ``evaluate_coco``, which stay as they are.

    Detections of masks are judged without their boxes, so that small, medium and large are said of the masks.

    Returns:
      {"precision": float64 (10 IoUs, 101 recalls, K categories by id, 4 areas: all, small, medium, large, 3 limits: 1, 10, 100
      detections), "recall": float64 (10, K, 4, 3), both from 0 to 1 or -1 for no ground truth, "stats": float64 (12,), the
      means of them in the order of ``NAMES``}.
    """
    images = {image["id"] for image in ground_truth["images"]}
    others = [detection["image_id"] for detection in detections if detection["image_id"] not in images]
    if others:
        raise ValueError(f"The image {others[0]} of a detection is none of the ground truth.")
    left_out = {"bbox": "segmentation", "segm": "bbox"}[kind]
    results = [{key: value for key, value in detection.items() if key != left_out} for detection in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**ground_truth, "annotations": [dict(entry) for entry in ground_truth["annotations"]]}
        truth.createIndex()
        evaluation = COCOeval(truth, _load_results(truth, results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: evaluation.eval[name] for name in ("precision", "recall")} | {"stats": np.array(evaluation.stats)}


def _load_results(truth: COCO, results: list[dict]) -> COCO:
    if results:
        return truth.loadRes(results)
    empty = COCO()  # loadRes wants a first one
    empty.dataset = {**truth.dataset, "annotations": []}
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
    """An image's results as COCO's files have them, for ``evaluate_coco``, and for JSON.

    Args:
      boxes: float (n, 4), x1, y1, x2, y2 in pixels of the original image.
      labels: int (n,), from 0.
      scores: float (n,).
      masks: bool (n, H, W), of the original image, or None.
      image_id: the image's number in the ground truth.
      category_ids: of the labels, in order.

    Returns:
      {"image_id", "category_id", "bbox": x, y, width, height, "score"}, and with masks "segmentation", a compressed RLE whose
      counts are text, of each. A result with a number that is not finite is left out.
    """
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64)
    sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    found = []
    for index in np.flatnonzero(np.isfinite(sizes).all(axis=1) & np.isfinite(scores)):
        detection = {
            "image_id": int(image_id),
            "category_id": int(category_ids[int(labels[index])]),
            "bbox": sizes[index].tolist(),
            "score": float(scores[index]),
        }
        found.append(detection | ({} if masks is None else {"segmentation": encode_mask(masks[index])}))
    return found


def encode_mask(mask: np.ndarray) -> dict:
    """A mask bool (H, W) -> compressed RLE, {"size": [H, W], "counts": text}."""
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode()}
