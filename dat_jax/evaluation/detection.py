"""COCO's average precision of boxes and of masks, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

METRIC = "bbox/AP"  # what the best checkpoint is best in
# Of COCO's summary: precision over IoU .5:.05:.95, at .5, at .75, of small, medium and large objects; recall with at most 1, 10
# and 100 detections an image, and of small, medium and large objects.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


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
