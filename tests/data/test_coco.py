"""COCO files: reading, validation, and conversion to ground truth."""

import concurrent.futures
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from dat_jax.data.coco import (
    DigitsSource,
    decode_mask,
    load_coco,
    load_detection_source,
    to_coco_ground_truth,
)
from dat_jax.data.coco_json import _scan, read_table
from dat_jax.data.sources import describe_damage
from dat_jax.data.synthetic import compose
from dat_jax.errors import UserError
from tests.helpers.coco_files import annotation, bounds, real_images, write, write_real
from tests.helpers.photographs import photographs

SIZE = (40, 60)


def load(directory, split="validation"):
    return load_detection_source("", split=split, directory=str(directory))


def test_real_photographs_and_masks_are_read_back_unchanged(tmp_path):
    write_real(tmp_path, "val")
    source = load(tmp_path)
    real = real_images()
    assert len(source) == 2
    assert [source.image_id(k) for k in range(2)] == [7, 3]
    assert [source.size(k) for k in range(2)] == [(480, 640), (375, 500)]
    assert source.category_ids == tuple(sorted(source.category_ids))
    assert source.skipped == {}
    assert source.has_masks
    for index, expected in enumerate(real):
        record = source[index]
        assert set(record) == {"image", "boxes", "labels", "masks", "crowd"}
        np.testing.assert_array_equal(record["image"], expected["image"])
        assert [record[name].dtype for name in ("image", "boxes", "labels", "crowd")] == [
            *(np.uint8, np.float32, np.int32, bool)
        ]
        # The ids are 100 - label, so the labels are in the opposite order.
        assert [source.category_ids[k] for k in record["labels"]] == [100 - k for k in expected["labels"]]
        assert [source.class_names[k] for k in record["labels"]] == [f"thing {k}" for k in expected["labels"]]
        assert not record["crowd"].any()
        for mask, box, true in zip(record["masks"], record["boxes"], expected["masks"], strict=True):
            assert isinstance(mask["counts"], bytes)
            np.testing.assert_array_equal(decode_mask(mask), true)
            assert box.tolist() == bounds(true)
    # The published boxes of the first photograph include hidden parts, so only the second one is compared.
    np.testing.assert_allclose(source[1]["boxes"], real[1]["boxes"], atol=1)
    with pytest.raises(IndexError):
        source[2]


def test_a_source_can_be_pickled_and_read_by_threads(tmp_path):
    write_real(tmp_path)
    source = load(tmp_path, "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 6000
    copy = pickle.loads(pickled)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda k: (source, copy)[k % 3 % 2][k % 2], range(12)))
    for k, record in enumerate(records):
        assert record["damaged"] == 0
        np.testing.assert_array_equal(record["boxes"], source[k % 2]["boxes"])
        assert record["masks"] == source[k % 2]["masks"]


def test_the_ground_truth_equals_what_pycocotools_reads_from_the_file(tmp_path, capsys):
    write_real(tmp_path, "val")
    ours = COCO()
    ours.dataset = to_coco_ground_truth(load(tmp_path))
    ours.createIndex()
    theirs = COCO(str(tmp_path / "annotations/val.json"))
    assert ours.getCatIds() == sorted(theirs.getCatIds())
    assert {k: ours.cats[k]["name"] for k in ours.cats} == {k: theirs.cats[k]["name"] for k in theirs.cats}
    assert sorted(ours.imgs) == sorted(theirs.imgs)
    for number in ours.imgs:
        pairs = list(zip(ours.imgToAnns[number], theirs.imgToAnns[number], strict=True))
        assert pairs
        for a, b in pairs:
            assert [a[k] for k in ("bbox", "area", "category_id", "iscrowd")] == [
                b[k] for k in ("bbox", "area", "category_id", "iscrowd")
            ]
            assert a["segmentation"]["counts"].decode() == b["segmentation"]["counts"]
    assert min(ours.anns) == 1  # pycocotools treats the id 0 as no match


def disc(y=20, x=30, radius=8):
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def annotate(number, image_id=1, category_id=2, **changes):
    return annotation(number, image_id, category_id, disc(), **changes)


CATEGORIES = [{"id": 9, "name": "nine"}, {"id": 2, "name": "two"}]


def make(directory, annotations, *, categories=CATEGORIES, images=(1, 2, 3), size=SIZE, split="train"):
    images_by_id = dict(enumerate(photographs(width=size[1], height=size[0])))
    write(
        directory,
        images={number: images_by_id[number] for number in images},
        annotations=annotations,
        categories=categories,
        split=split,
    )
    return directory / "annotations" / f"{split}.json"


def test_images_without_an_annotation_are_evaluated_but_not_trained_on(tmp_path):
    annotations = [annotate(1, image_id=3), annotate(2, image_id=1, iscrowd=1), annotate(3, image_id=3, category_id=9)]
    for split in ("train", "val"):
        make(tmp_path, annotations, split=split)
    train, evaluation = load(tmp_path, "train"), load(tmp_path)
    assert [train.image_id(k) for k in range(len(train))] == [1, 3]
    assert train.skipped == {"crowd objects": 1, "images without an annotation": 1}
    assert train[1]["labels"].tolist() == [0, 1]
    assert train[0]["crowd"].tolist() == [True]
    assert [evaluation.image_id(k) for k in range(len(evaluation))] == [1, 2, 3]
    assert evaluation.skipped == {}
    empty = evaluation[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"] == []
    assert empty["labels"].shape == empty["crowd"].shape == (0,)
    ground_truth = to_coco_ground_truth(evaluation)
    assert len(ground_truth["images"]) == len(ground_truth["annotations"]) == 3


@pytest.mark.parametrize("size", [(31, 60), (60, 31)])
def test_small_images_are_evaluated_but_not_trained_on(tmp_path, size):
    box = {"bbox": [1, 1, 20, 20], "area": 400, "segmentation": [[1, 1, 21, 1, 21, 21]]}
    for split in ("train", "val"):
        path = make(tmp_path, [annotate(k, image_id=k) | box for k in (1, 2, 3)], size=size, split=split)
    assert len(load(tmp_path)) == 3
    with pytest.raises(
        UserError, match=r"train\.json have no image to train on: .* sides of 32 pixels.*3 images with a side below 32"
    ):
        load(tmp_path, "train")
    path = tmp_path / "annotations/train.json"
    source = load_coco(str(path), str(tmp_path / "train"), split="train", min_side=31)
    assert len(source) == 3


def test_skipped_annotations_are_counted(tmp_path):
    annotations = [
        annotate(1),
        annotate(2, image_id=77),
        annotate(3, category_id=4),
        annotate(4, ignore=1),
        annotate(5, bbox=[5, 5, 0, 8]),
        annotate(6, bbox=[5, 5, 8, 0.9]),
        annotate(7, bbox=[25, 5, -8, 8]),
        annotate(8, area=0),
        annotate(9, bbox=[60, 5, 8, 8]),
        annotate(10, bbox=[-9, 5, 9, 8]),
        annotate(11, bbox=[5, 40.5, 8, 8]),
        annotate(12, bbox=[-3.5, -2, 20, 90]),
        annotate(13, bbox=[50.25, 30, 20, 10]),
    ]
    make(tmp_path, annotations, split="val")
    source = load(tmp_path)
    assert source.skipped == {
        "annotations of unlisted images": 1,
        "annotations of unlisted categories": 1,
        'annotations marked "ignore"': 1,
        "empty boxes": 4,
        "boxes outside the image": 3,
        "boxes clipped to the image": 2,
    }
    assert source[0]["boxes"].tolist() == [[22 + 1, 12 + 1, 38, 28], [0, 0, 16.5, 40], [50.25, 30, 60, 40]]
    assert len(source[0]["masks"]) == len(source[0]["labels"]) == 3
    annotations = to_coco_ground_truth(source)["annotations"]
    assert len(annotations) == 11  # as in the published evaluation, all with a listed image and category
    assert annotations[-2]["bbox"] == [-3.5, -2, 20, 90]


def test_skipped_objects_may_have_no_mask(tmp_path):
    without_mask = {key: value for key, value in annotate(2, bbox=[5, 5, 0, 8]).items() if key != "segmentation"}
    make(tmp_path, [annotate(1), without_mask], split="val")
    source = load(tmp_path)
    assert len(source[0]["masks"]) == 1
    assert decode_mask(source.objects(0).masks[1]).sum() == 0


@pytest.mark.parametrize("absent", [None, [], "missing"])
def test_a_file_may_contain_boxes_only(tmp_path, absent):
    annotations = [annotate(k, image_id=k, segmentation=absent) for k in (1, 2, 3)]
    if absent == "missing":
        annotations = [{k: v for k, v in entry.items() if k != "segmentation"} for entry in annotations]
    path = make(tmp_path, annotations)
    source = load(tmp_path, "train")
    assert source[0]["masks"] is None
    assert not source.has_masks
    assert "segmentation" not in to_coco_ground_truth(source)["annotations"][0]
    annotations[1]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    make(tmp_path, annotations)
    with pytest.raises(UserError, match=rf"^Annotation 1 of {path} has no mask, although others have one\.$"):
        load(tmp_path, "train")


RLE = {"size": list(SIZE), "counts": [100, 50, 2250]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\]: expected 4 numbers .*, got 3"),
        ({"bbox": [1, 2, "3", 4]}, r"bbox \[1, 2, '3', 4\]: expected a number, got '3'"),
        ({"bbox": [1, 2, True, 4]}, "bbox .*: expected a number, got true"),
        ({"bbox": [1, 2, None, 4]}, "bbox .*: expected a number, got null"),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox .*: expected a number, got NaN"),
        ({"bbox": [1, 2, 3, 1e9]}, "bbox .*: expected finite numbers, got 1000000000.0"),
        ({"bbox": "box"}, "'bbox': expected a list, got 'box'"),
        ({"bbox": {"x": 1}}, "'bbox': expected a list"),
        ({"image_id": "1"}, "'image_id': expected an integer, got '1'"),
        ({"image_id": 1.0}, "'image_id': expected an integer, got 1.0"),
        ({"image_id": 2**70}, "'image_id': expected an integer"),
        ({"category_id": True}, "'category_id': expected an integer, got true"),
        ({"category_id": "2"}, "'category_id': expected an integer, got '2'"),
        ({"area": None}, "'area': expected a finite number, got null"),
        ({"area": "10"}, "'area': expected a finite number, got '10'"),
        ({"area": float("inf")}, "'area': expected a finite number, got Infinity"),
        ({"iscrowd": "0"}, "'iscrowd': expected 0 or 1, got '0'"),
        ({"iscrowd": "false"}, "'iscrowd': expected 0 or 1, got 'false'"),
        ({"iscrowd": 2}, "'iscrowd': expected 0 or 1, got 2"),
        ({"iscrowd": []}, r"'iscrowd': expected 0 or 1, got \[\]"),
        ({"iscrowd": float("nan")}, "'iscrowd': expected 0 or 1, got NaN"),
        ({"ignore": "0"}, "'ignore': expected 0 or 1, got '0'"),
        ({"segmentation": [[1, 2, 3, 4]]}, "has a polygon that is not a list of at least three pairs"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "has a polygon that is not a list of at least three pairs"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "has a polygon that is not a list of at least three pairs"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, "has a polygon that lies far outside any image"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "a polygon .*: expected a number, got '6'"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a polygon .*: expected a number, got NaN"),
        ({"segmentation": RLE | {"size": ["40", 60]}}, r"the size \['40', 60\]: expected a height and a width"),
        ({"segmentation": RLE | {"counts": 2400}}, "invalid counts"),
        ({"segmentation": 5}, "has a segmentation that is neither polygons nor a size with counts"),
        ({"segmentation": {"counts": [1]}}, "has a segmentation that is neither polygons nor a size with counts"),
        ({"segmentation": RLE | {"size": [40]}}, r"has a mask with the size \[40\]: expected a height and a width"),
        ({"segmentation": RLE | {"size": [0, 60]}}, "has a mask with the size"),
        ({"segmentation": RLE | {"counts": [100, 50, 2251]}}, "invalid counts: expected 2400 pixels in total"),
        ({"segmentation": RLE | {"counts": [100, -50, 2350]}}, "invalid counts: expected 2400 pixels in total"),
        ({"segmentation": RLE | {"counts": [[2400]]}}, r"invalid counts: expected integers, got \[2400\]"),
        ({"segmentation": RLE | {"counts": [2399, "1"]}}, "invalid counts: expected integers, got '1'"),
        ({"segmentation": RLE | {"counts": "PRc0"}}, "invalid counts: expected 2400 pixels in total"),
        ({"segmentation": RLE | {"counts": "PRc0o"}}, "invalid compressed counts"),
        (
            {"segmentation": {"size": [60, 40], "counts": [2400]}},
            "a mask of 60 x 40 pixels: expected 40 x 60, the size of its image",
        ),
    ],
)
def test_invalid_annotations_are_rejected_by_id(tmp_path, changes, message):
    make(tmp_path, [annotate(1), annotate(31) | changes])
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "train")
    text = str(caught.value)
    assert text.startswith(f"Annotation 31 of {tmp_path}")
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox", "area"])
def test_missing_keys_of_annotations_are_named(tmp_path, key):
    path = make(tmp_path, [annotate(1), {k: v for k, v in annotate(31).items() if k != key}])
    with pytest.raises(UserError, match=rf"^Annotation 31 of {path} has no '{key}'\.$"):
        load(tmp_path, "train")


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "have no list 'images': expected a file of COCO instances"),
        (lambda c: c.pop("annotations"), "have no list 'annotations'"),
        (lambda c: c.pop("categories"), "have no list 'categories'"),
        (lambda c: c.update(annotations={}), "have no list 'annotations'"),
        (lambda c: c.update(categories=[]), "list no categories"),
        (lambda c: c.update(images=[]), "list no images"),
        (lambda c: c.update(annotations=[]), "have no image to train on"),
        (lambda c: c["images"].append(c["images"][0]), "has the image 1 more than once"),
        (lambda c: c["categories"].append(c["categories"][0]), "has the category 9 more than once"),
        (lambda c: c["images"][1].pop("height"), "Image 2 of .* has no 'height'"),
        (lambda c: c["images"][1].pop("id"), "Image at index 1 of .* has no 'id'"),
        (lambda c: c["images"][1].update(id="2"), "Image '2' of .* 'id': expected an integer, got '2'"),
        (lambda c: c["images"][1].update(height="40"), "Image 2 of .* 'height': expected an integer, got '40'"),
        (lambda c: c["images"][1].update(file_name=2), "Image 2 of .* 'file_name': expected text, got 2"),
        (lambda c: c["categories"][1].update(id="2"), "Category '2' of .* 'id': expected an integer, got '2'"),
        (lambda c: c["categories"][1].update(name=2), "Category 2 of .* 'name': expected text, got 2"),
        (lambda c: c["annotations"][0].update(id="5"), "Annotation '5' of .* 'id': expected an integer, got '5'"),
        (lambda c: c["images"][1].update(width=0), "Image 2 of .* has 40 x 0 pixels"),
        (lambda c: c["images"][1].update(width=60.0), "Image 2 of .* 'width': expected an integer, got 60.0"),
        (lambda c: c["images"].append(3), "Image at index 3 of .* is not a JSON object"),
        (lambda c: c["annotations"].append(None), "Annotation at index 1 of .* is not a JSON object"),
        (lambda c: c["images"][0].update(file_name="absent.jpg"), "are not in .*train: absent.jpg"),
        (lambda c: c["images"][0].update(file_name="sub/img_1.png"), "are not in .*train: sub/img_1.png"),
    ],
)
def test_invalid_files_are_rejected(tmp_path, change, message):
    path = make(tmp_path, [annotate(5)])
    change_json(path, change)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, "train")
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "nonsense",
        "{'images': 1}",
        '{"images": [}',
        '{"a": 1} x',
        '{"a": NaN}',
        "[" * 99999,
    ],
    ids=str.__len__,
)
def test_invalid_json_is_rejected(tmp_path, content):
    path = make(tmp_path, [annotate(5)])
    path.write_text(content)
    with pytest.raises(UserError, match=rf"^The annotations {path} (are not valid JSON: .*|have no list .*)\.$"):
        load(tmp_path, "train")


def test_infinite_numbers_are_rejected(tmp_path):
    path = make(tmp_path, [annotate(5)])
    path.write_text(path.read_text().replace('"area": ', '"area": 1e999, "was": '))
    with pytest.raises(UserError, match=rf"^Annotation 5 of {path} .*'area': expected a finite number, got inf\.$"):
        load(tmp_path, "train")


def test_numbers_in_unused_keys_are_not_checked(tmp_path):
    make(tmp_path, [annotate(5, score=float("nan"), iscrowd=False, ignore=None)])
    assert load(tmp_path, "train").count_objects().tolist() == [1, 0]


@pytest.mark.parametrize("value", [True, 1, 1.0])
def test_flags_may_be_booleans_or_numbers(tmp_path, value):
    make(tmp_path, [annotate(5), annotate(6, iscrowd=value), annotate(7, ignore=value), annotate(8, iscrowd=None)])
    source = load(tmp_path, "train")
    assert source.crowd.tolist() == [False, True, False, False]
    assert source.skipped == {'annotations marked "ignore"': 1, "crowd objects": 1, "images without an annotation": 2}


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = make(tmp_path, [annotate(5)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    source = load(tmp_path, "train")
    np.testing.assert_array_equal(decode_mask(source[0]["masks"][0]), disc())


def test_truncated_files_are_rejected(tmp_path):
    path = make(tmp_path, [annotate(5), annotate(6)])
    text = path.read_text()
    for length in range(1, len(text), 7):
        path.write_text(text[:length])
        with pytest.raises(UserError, match="are not valid JSON"):
            read_table(str(path))


def test_masks_are_found_in_files_with_non_ascii_text(tmp_path):
    categories = [{"id": 2, "name": "äé中😀"}, {"id": 9, "name": "x"}]
    path = make(tmp_path, [annotate(5, note="😀"), annotate(6, image_id=2)], categories=categories)
    for ascii_only in (False, True):
        path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=ascii_only, indent=3))
        source = load(tmp_path, "train")
        assert source.class_names[0] == "äé中😀"
        for index in range(2):
            np.testing.assert_array_equal(decode_mask(source[index]["masks"][0]), disc())
    entries = []
    _scan('{"b" : [ {"x":[1,2]} , 3, [ ] ], "c": {"b": [9]}, "d": [1]}', {"b": lambda *entry: entries.append(entry)})
    assert [entry for entry, _, _ in entries] == [{"x": [1, 2]}, 3, []]


def test_a_file_that_changes_during_a_run_is_an_error(tmp_path):
    path = make(tmp_path, [annotate(5)])
    source = load(tmp_path, "train")
    path.write_text(" " * 9 + path.read_text())
    with pytest.raises(UserError, match=rf"^The masks in {path} cannot be read again .*: the file must not change"):
        source[0]
    path.unlink()
    with pytest.raises(UserError, match="cannot be read again"):
        source[0]
    with pytest.raises(UserError, match=r"val\.json"):
        load(tmp_path)


def test_an_image_of_another_size_is_rejected(tmp_path):
    make(tmp_path, [annotate(5)])
    Image.new("RGB", (61, 40)).save(tmp_path / "train/img_1.png")
    with pytest.raises(UserError, match=r"img_1\.png has 40 x 61 pixels: expected 40 x 60 as in .*train\.json\.$"):
        load(tmp_path, "train")[0]


def test_a_damaged_image_is_skipped_in_training_and_an_error_in_evaluation(tmp_path):
    for split in ("train", "val"):
        make(tmp_path, [annotate(k, image_id=k, category_id=(2, 9, 2)[k - 1]) for k in (1, 2, 3)], split=split)
        (tmp_path / split / "img_1.png").write_bytes(b"x")
    source = load(tmp_path, "train")
    record = source[0]
    assert "img_1.png cannot be decoded" in describe_damage(source, 0)
    assert describe_damage(source, 1) is None
    assert record["damaged"] == 1
    assert record["labels"].tolist() == [1]
    with pytest.raises(UserError, match=r"img_1\.png cannot be decoded"):
        load(tmp_path)[0]


@pytest.mark.parametrize(
    ("file", "folder"),
    [("instances_train2017.json", "train2017"), ("instances_train.json", "train"), ("train.json", "train")],
)
def test_all_names_of_files_and_folders_are_recognized(tmp_path, file, folder):
    make(tmp_path, [annotate(1)])
    (tmp_path / "annotations/train.json").rename(tmp_path / "annotations" / file)
    (tmp_path / "train").rename(tmp_path / folder)
    assert len(load(tmp_path, "train")) == 1
    (tmp_path / "annotations/other.json").write_text("{}")
    assert len(load(tmp_path, "train")) == 1
    both = tmp_path / "annotations" / ("train.json" if file != "train.json" else "instances_train.json")
    both.write_text("{}")
    with pytest.raises(UserError, match=r"annotations has the files .* and .*: expected only one of them"):
        load(tmp_path, "train")


def test_images_may_be_in_subfolders(tmp_path):
    path = make(tmp_path, [annotate(1)])
    (tmp_path / "train/sub").mkdir()
    (tmp_path / "train/img_1.png").rename(tmp_path / "train/sub/a.png")
    change_json(path, lambda c: c["images"][0].update(file_name="sub/a.png"))
    assert load(tmp_path, "train")[0]["image"].shape == (*SIZE, 3)


def test_missing_files_and_unknown_names_are_rejected(tmp_path):
    with pytest.raises(UserError, match="There is no directory .*absent"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match=r"annotations has no file named instances_val2017\.json or .* or val\.json\."):
        load(tmp_path)
    make(tmp_path, [annotate(1)])
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no folder named train2017 or train"):
        load(tmp_path, "train")
    with pytest.raises(UserError, match="Unknown split 'test'; choose one of train, validation"):
        load(tmp_path, "test")
    with pytest.raises(UserError, match="Unknown data set 'x' for detection; choose digits_on_photographs"):
        load_detection_source("x", split="train")


def test_digits_of_synthetic_examples_are_objects():
    source = load_detection_source("digits_on_photographs", split="validation")
    assert source.class_names == tuple("0123456789")
    assert (len(source), source.size(3), source.image_id(3)) == (200, (64, 64), 4)
    hidden = 0
    for index in range(len(source)):
        image, _, digits = compose("validation", index)
        visible = [(digit, mask) for digit, mask in digits if mask.sum() >= 20]
        hidden += len(digits) - len(visible)
        record = source[index]
        np.testing.assert_array_equal(record["image"], image)
        assert record["labels"].tolist() == [digit for digit, _ in visible]
        assert len(visible) >= 1
        for mask, box, (_, true) in zip(record["masks"], record["boxes"], visible, strict=True):
            np.testing.assert_array_equal(decode_mask(mask), true)
            assert box.tolist() == bounds(true)
    ground_truth = to_coco_ground_truth(source)
    assert len(ground_truth["images"]) == 200
    assert [entry["name"] for entry in ground_truth["categories"]] == list("0123456789")
    assert len(ground_truth["annotations"]) == sum(len(compose("validation", k)[2]) for k in range(200)) - hidden
    assert pickle.loads(pickle.dumps(source)) == source == DigitsSource("validation")
    with pytest.raises(IndexError):
        source[200]
