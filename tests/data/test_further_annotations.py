"""Files of COCO's layout as other programs write them: read as they are meant, or refused in one sentence."""

import gzip
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from dat_jax.data.coco import decode_mask, load_detection_source
from dat_jax.errors import UserError
from tests.helpers.logs import collect_logs
from tests.helpers.photographs import photographs

HEIGHT, WIDTH = 40, 60
PIXELS = photographs(width=WIDTH, height=HEIGHT)[0]
BOXES = [[5.0, 6.0, 25.0, 16.0], [30.0, 10.0, 40.0, 22.0]]  # x1, y1, x2, y2


def make_content():
    """An image with two objects, in the order of ``BOXES``, of the categories 2 and 9."""
    annotations = []
    for number, (category, (x1, y1, x2, y2)) in enumerate(zip((2, 9), BOXES, strict=True), start=1):
        entry = {"id": number, "image_id": 1, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        entry |= {"area": (x2 - x1) * (y2 - y1), "iscrowd": 0, "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}
        annotations.append(entry)
    return {
        "images": [{"id": 1, "file_name": "x.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": annotations,
        "categories": [{"id": 2, "name": "two"}, {"id": 9, "name": "nine"}],
    }


def load(directory, content, split="train", name="x.png"):
    """Write a data set of one image, with a file of annotations that is a dict or bytes, and read it."""
    folder = "train" if split == "train" else "val"
    (directory / "annotations").mkdir()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (directory / "annotations" / f"{folder}.json").write_bytes(data)
    (directory / folder / name).parent.mkdir(parents=True)
    Image.fromarray(PIXELS).save(directory / folder / name, "PNG")
    return load_detection_source("", split=split, directory=str(directory))


def entry(kind, **changes):
    """A function that makes the content with changes of its first image, annotation or category; ``...`` removes a key."""

    def make():
        content = make_content()
        first = content[kind][0]
        for key, value in changes.items():
            if value is ...:
                del first[key]
            else:
                first[key] = value
        return content

    return make


def renumbered(image_id=1, categories=(2, 9)):
    content = make_content()
    content["images"][0]["id"] = image_id
    for number, category, annotation in zip(categories, content["categories"], content["annotations"], strict=True):
        annotation.update(image_id=image_id, category_id=number)
        category["id"] = number
    return content


def every_annotation(**changes):
    content = make_content()
    for annotation in content["annotations"]:
        annotation.update(changes)
    return content


def encoded(encoding, prefix=b"", **options):
    return lambda: prefix + json.dumps(make_content(), **options).encode(encoding)


def edited(old, new):
    return lambda: json.dumps(make_content()).encode().replace(old, new)


def extended(**lists):
    content = make_content()
    for name, entries in lists.items():
        content[name] += entries
    return content


# Content of the file, and what differs from the plain one: boxes, names, category ids, image id.
READABLE = {
    "byte order mark": (encoded("utf-8", b"\xef\xbb\xbf"), {}),
    "blank lines and indentation": (encoded("utf-8", b"\n\n", indent=1), {}),
    "NaN in a key that is not read": (entry("annotations", score=float("nan")), {}),
    "numbers with exponents": (edited(b"[5.0, 6.0, 20.0, 10.0]", b"[5e0, 6E0, 2e+1, 100e-1]"), {}),
    "no annotation ids": (entry("annotations", id=...), {}),
    "equal annotation ids": (entry("annotations", id=2), {}),
    "no iscrowd": (entry("annotations", iscrowd=...), {}),
    "null iscrowd": (entry("annotations", iscrowd=None), {}),
    "category 0": (lambda: renumbered(categories=(0, 9)), {"category_ids": (0, 9)}),
    "categories with gaps": (lambda: renumbered(categories=(700, 90_000)), {"category_ids": (700, 90_000)}),
    "image id above 2^53": (lambda: renumbered(2**60 + 1), {"image_id": 2**60 + 1}),
    "negative image id": (lambda: renumbered(-3), {"image_id": -3}),
    "unused category": (
        lambda: extended(categories=[{"id": 50, "name": "other"}]),
        {"category_ids": (2, 9, 50), "class_names": ("two", "nine", "other")},
    ),
    "other alphabets": (entry("categories", name="straße 犬"), {"class_names": ("straße 犬", "nine")}),
    "uncompressed run lengths": (
        entry("annotations", segmentation={"size": [HEIGHT, WIDTH], "counts": [206, 10, 30, 10, 2144]}),
        {"pixels": 20},
    ),
    "box of no size": (entry("annotations", bbox=[5, 5, 0, 0], area=0), {"boxes": BOXES[1:]}),
    "box of negative size": (entry("annotations", bbox=[25, 16, -20, -10]), {"boxes": BOXES[1:]}),
    "box outside the image": (entry("annotations", bbox=[100, 100, 5, 5]), {"boxes": BOXES[1:]}),
    "box over the border": (
        entry("annotations", bbox=[-5, 30, 20, 30]),
        {"boxes": [[0.0, 30.0, 15.0, 40.0], BOXES[1]]},
    ),
}


@pytest.mark.parametrize("kind", READABLE)
def test_readable_files_have_the_objects_that_are_meant(kind, tmp_path):
    make, changes = READABLE[kind]
    with collect_logs() as messages:
        source = load(tmp_path, make())
    record = source[0]
    boxes = changes.get("boxes", BOXES)
    assert record["boxes"].tolist() == boxes
    assert source.category_ids == changes.get("category_ids", (2, 9))
    assert source.class_names == changes.get("class_names", ("two", "nine"))
    assert source.image_id(0) == changes.get("image_id", 1)
    assert record["labels"].tolist() == [0, 1][-len(boxes) :]
    if "boxes" not in changes:
        assert decode_mask(record["masks"][0]).sum() == changes.get("pixels", 200)
    assert any("Left out: 1" in text or "1 boxes clipped" in text for text in messages) == ("boxes" in changes)


def many_boxes(*, corners):
    """Twelve small boxes all over the image, as x, y, width, height or x1, y1, x2, y2."""
    content = make_content()
    content["annotations"] = []
    for x in (4, 19, 34, 49):
        for y in (3, 15, 28):
            box = [x, y, x + 8, y + 9] if corners else [x, y, 8, 9]
            content["annotations"].append({"image_id": 1, "category_id": 2, "bbox": box, "area": 72})
    return content


def test_boxes_that_fit_only_as_corners_are_refused(tmp_path):
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    assert len(load(tmp_path / "right", many_boxes(corners=False))[0]["boxes"]) == 12
    with pytest.raises(
        UserError, match=r"8 of 12 boxes of .*train\.json reach beyond their image, and all fit as x1, y1,"
    ):
        load(tmp_path / "wrong", many_boxes(corners=True))


START = r"train\.json are not valid JSON: expected '\{{' at byte 0, got {}"
HERE = r"^Annotation 1 of .*train\.json has "
FRACTIONS = r"All 2 boxes of .*\.json have values from 0 to 1: expected x, y, width and height in pixels"
POLYGON = HERE + r"a polygon that is not a list of at least three pairs of x and y\.$"
MASK = {"size": [HEIGHT, WIDTH], "counts": [206, 10, 2184]}

# Content of the file, and the message expected.
REFUSED = {
    "UTF-16": (encoded("utf-16"), START.format("'ÿþ{")),
    "gzip": (lambda: gzip.compress(json.dumps(make_content()).encode()), START.format(r"'\\x1f")),
    "YOLO": (lambda: b"0 0.5 0.5 0.1 0.1\n", START.format(r"'0 0\.5")),
    "Pascal VOC": (lambda: b"<annotation><size/></annotation>", START.format("'<annotatio")),
    "list of annotations": (lambda: json.dumps(make_content()["annotations"]).encode(), START.format(r"'\[{")),
    "JSON lines": (
        lambda: "\n".join(map(json.dumps, make_content()["annotations"])).encode(),
        r"expected the end of the file at byte \d+, got '\{\"id\": 2",
    ),
    "two files in one": (lambda: 2 * json.dumps(make_content()).encode(), "expected the end of the file at byte"),
    "empty file": (lambda: b"", r"not valid JSON: the file ends too early\.$"),
    "truncated": (lambda: json.dumps(make_content()).encode()[:-50], "not valid JSON: "),
    "single quotes": (lambda: repr(make_content()).encode(), "not valid JSON: Expecting property name|Expecting value"),
    "Latin-1": (
        lambda: json.dumps(entry("categories", name="straße")(), ensure_ascii=False).encode("latin-1"),
        "not valid JSON: 'utf-8' codec can't decode",
    ),
    "file of LabelMe": (lambda: {"version": "5.0", "shapes": []}, "have no list 'images': expected a file of COCO"),
    "annotations without images": (lambda: {"annotations": []}, "have no list 'images'"),
    "null for the annotations": (lambda: make_content() | {"annotations": None}, "have no list 'annotations'"),
    "NaN area": (
        entry("annotations", area=float("nan")),
        HERE + "an invalid 'area': expected a finite number, got NaN",
    ),
    "infinite box": (entry("annotations", bbox=[1, 2, float("inf"), 3]), HERE + "bbox .*, got Infinity"),
    "box as text": (entry("annotations", bbox=["1", "2", "3", "4"]), HERE + "bbox .*: expected a number, got '1'"),
    "size as text": (entry("images", height="40"), r"^Image 1 of .* 'height': expected an integer, got '40'\.$"),
    "size as a float": (entry("images", height=40.0), r"'height': expected an integer, got 40\.0\.$"),
    "id as text": (entry("annotations", id="a7"), r"^Annotation 'a7' of .*: expected an integer, got 'a7'\.$"),
    "image id as text": (lambda: renumbered("x.png"), r"^Image 'x\.png' of .*: expected an integer"),
    "id above 2^63": (lambda: renumbered(2**63), r"'id': expected an integer, got 9223372036854775808\.$"),
    "no box": (entry("annotations", bbox=...), HERE + r"no 'bbox'\.$"),
    "no area": (entry("annotations", area=...), HERE + r"no 'area'\.$"),
    "no image id": (entry("annotations", image_id=...), HERE + r"no 'image_id'\.$"),
    "no image size": (entry("images", width=...), r"^Image 1 of .* has no 'width'\.$"),
    "null box": (entry("annotations", bbox=None), HERE + r"an invalid 'bbox': expected a list, got null\.$"),
    "null category": (entry("annotations", category_id=None), HERE + "an invalid 'category_id': .* got null"),
    "some without a mask": (entry("annotations", segmentation=None), HERE + r"no mask, although others have one\.$"),
    "equal image ids": (lambda: extended(images=make_content()["images"]), r"has the image 1 more than once\.$"),
    "equal category ids": (
        lambda: extended(categories=[{"id": 2, "name": "b"}]),
        r"has the category 2 more than once\.$",
    ),
    "category without a name": (entry("categories", name=""), "has a class named '': expected text in UTF-8"),
    "category with a line break": (entry("categories", name="a\nb"), r"has a class named 'a\\nb': expected text in"),
    "category with a number for a name": (entry("categories", name=3), r"'name': expected text, got 3\.$"),
    "unlisted categories": (
        lambda: every_annotation(category_id=1),
        r"no image to train on: .* Left out: 2 annotations of unlisted categories",
    ),
    "unlisted images": (lambda: every_annotation(image_id=7), "Left out: 2 annotations of unlisted images"),
    "boxes as fractions": (lambda: every_annotation(bbox=[0.1, 0.2, 0.3, 0.4]), FRACTIONS),
    "polygon as fractions": (
        entry("annotations", segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]),
        HERE + r"polygons with coordinates from 0 to 1: expected pixels\.$",
    ),
    "polygon of two points": (entry("annotations", segmentation=[[1, 2, 3, 4]]), POLYGON),
    "polygon with an odd number": (entry("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), POLYGON),
    "polygon without a list around it": (entry("annotations", segmentation=[1, 2, 3, 4, 5, 6]), POLYGON),
    "polygon of pairs": (entry("annotations", segmentation=[[[1, 2], [3, 4], [5, 6]]]), POLYGON),
    "run lengths of another size": (
        entry("annotations", segmentation=MASK | {"size": [WIDTH, HEIGHT]}),
        HERE + r"a mask of 60 x 40 pixels: expected 40 x 60, the size of its image\.$",
    ),
    "run lengths that are too short": (
        entry("annotations", segmentation=MASK | {"counts": [206, 10]}),
        HERE + r"a mask with invalid counts: expected 2400 pixels in total\.$",
    ),
    "compressed run lengths that are text": (
        entry("annotations", segmentation=MASK | {"counts": "abc"}),
        HERE + r"a mask with invalid compressed counts\.$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_in_one_sentence(kind, tmp_path):
    make, message = REFUSED[kind]
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, make())
    assert "\n" not in str(error.value)


def test_validation_boxes_as_fractions_are_refused(tmp_path):
    with pytest.raises(UserError, match=FRACTIONS):
        load(tmp_path, every_annotation(bbox=[0.1, 0.2, 0.3, 0.4]), split="validation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"height": WIDTH, "width": HEIGHT},
            r"40 x 60 pixels: expected 60 x 40 .* The height and the width are exchanged\.$",
        ),
        ({"height": HEIGHT + 1}, r"has 40 x 60 pixels: expected 41 x 60 as in .*train\.json\.$"),
    ],
)
def test_wrong_sizes_of_images_are_refused(tmp_path, changes, message):
    source = load(tmp_path, entry("images", **changes)())
    with pytest.raises(UserError, match=message):
        source[0]


@pytest.mark.parametrize("name", ["sub/x.png", "./x.png", "with space.png", "ü.png"])
def test_file_names_below_the_folder_are_read(tmp_path, name):
    record = load(tmp_path, entry("images", file_name=name)(), name=name)[0]
    np.testing.assert_array_equal(record["image"], PIXELS)


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("train/x.png", "x.png"),
        ("sub\\x.png", "sub/x.png"),
        ("C:\\data\\x.png", "x.png"),
        ("https://example.org/x.png", "x.png"),
        ("/home/me/data/x.png", "x.png"),
        ("x%20y.png", "x y.png"),
        ("X.PNG", "x.png"),
        ("x.jpg", "x.png"),
        ("x", "x.png"),
        ("x.png ", "x.png"),
        (unicodedata.normalize("NFC", "é.png"), unicodedata.normalize("NFD", "é.png")),
    ],
)
def test_other_file_names_are_refused_with_the_one_that_is_meant(tmp_path, listed, file):
    with pytest.raises(UserError) as error:
        load(tmp_path, entry("images", file_name=listed)(), name=file)
    message = str(error.value)
    assert f"are not in {tmp_path / 'train'}: {listed}." in message
    assert message.endswith(f"which has {file!a}, which is similar to {listed!a}.")


def test_file_names_without_a_similar_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.json are not in .*train: photo\.png\.$"):
        load(tmp_path, entry("images", file_name="photo.png")())


def test_empty_file_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^Image 1 of .* invalid 'file_name': expected a path, got ''\.$"):
        load(tmp_path, entry("images", file_name="")())
