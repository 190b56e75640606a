"""Transforms for classification: evaluation against Pillow, random crops against the distribution of the recipe."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from scipy import stats

from dat_jax.data.images import check_image, decode_image, read_size, resize_bicubic
from dat_jax.data.transforms import draw_crop, make_eval_transform, make_train_transform
from dat_jax.errors import UserError
from tests.helpers.photographs import photograph_files, photographs
from tests.reference.augmentation import draw_boxes

P_VALUE = 1e-3  # of each statistical test; the draws are seeded, so that results are reproducible
RECIPE = dict(
    image_size=96,
    min_crop_area=0.08,
    max_crop_aspect=4 / 3,
    flip_probability=0.5,
    rand_augment_count=2,
    rand_augment_magnitude=9.0,
    rand_augment_std=0.5,
)
PLAIN = {**RECIPE, "min_crop_area": 1.0, "max_crop_aspect": 1.0, "flip_probability": 0.0, "rand_augment_count": 0}


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(("resize", "image_size"), [(256, 224), (384, 384)])
def test_evaluation_equals_pillow_on_twenty_photographs(resize, image_size):
    transform = make_eval_transform(resize=resize, image_size=image_size)
    files = [path.read_bytes() for path in photograph_files()]
    # JPEG files of other sizes and aspect ratios, with the quality of ImageNet's.
    files += [encode(image, quality=90) for image in photographs(width=500, height=375)[:9]]
    files += [encode(image, quality=90) for image in photographs(width=230, height=410)[9:17]]
    assert len(files) == 20
    for data in files:
        expected = Image.open(io.BytesIO(data)).convert("RGB").resize((resize, resize), Image.Resampling.BICUBIC)
        border = (resize - image_size) // 2
        expected = np.asarray(expected)[border : border + image_size, border : border + image_size]
        record = {"image": decode_image(data, name="a"), "label": np.int32(3)}
        result = transform(record)
        np.testing.assert_array_equal(result["image"], expected)
        assert result["label"] == 3


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", dict(quality=80)),
        ("JPEG", "RGB", dict(quality=95, subsampling=0)),
        ("JPEG", "RGB", dict(progressive=True)),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "1", {}),
        ("BMP", "RGB", {}),
    ],
)
def test_files_of_all_formats_are_decoded_as_by_pillow(kind, mode, options):
    for image in photographs(width=61, height=45)[:3]:
        file = io.BytesIO()
        Image.fromarray(image).convert(mode).save(file, kind, **options)
        np.testing.assert_array_equal(decode_image(file.getvalue(), name="a"), pillow(file.getvalue()))
        assert check_image(file.getvalue()) is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags_are_applied_as_by_pillow(kind, orientation, tmp_path):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    data = encode(photographs(width=61, height=45)[0], kind, exif=tags)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data, name="a"), expected)
    (tmp_path / "a").write_bytes(data)
    assert read_size(str(tmp_path / "a")) == expected.shape[:2]
    stored = decode_image(data, name="a", apply_orientation=False)
    assert stored.shape == ((45, 61, 3) if kind != "TIFF" else expected.shape)  # Pillow always turns TIFF files
    assert read_size(str(tmp_path / "a"), apply_orientation=False) == stored.shape[:2]


def test_invalid_orientation_tags_are_ignored():
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 9
    image = photographs(width=61, height=45)[0]
    assert decode_image(encode(image, exif=tags), name="a").shape == (45, 61, 3)
    assert decode_image(encode(image, exif=b"Exif\0\0broken"), name="a").shape == (45, 61, 3)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_gray_images_with_more_than_8_bits_are_refused(mode):
    """Pillow's ``convert("RGB")`` would make them white."""
    file = io.BytesIO()
    Image.fromarray(np.full((40, 40), 1000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(
        file, "TIFF"
    )
    with pytest.raises(UserError, match="The image a has more than 8 bits per channel"):
        decode_image(file.getvalue(), name="a")
    assert "more than 8 bits" in check_image(file.getvalue())


def test_a_palette_with_transparency_gives_its_colors(recwarn):
    image = Image.fromarray(photographs(width=61, height=45)[0]).convert("P")
    image.info["transparency"] = bytes(range(256))
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_image(file.getvalue(), name="a"), np.asarray(image.convert("RGBA"))[..., :3])
    assert not recwarn.list


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(file.getvalue(), name="a")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_truncated_images_are_rejected_by_name(fraction):
    for data in (encode(photographs(width=300, height=200)[0], kind) for kind in ("JPEG", "PNG")):
        truncated = data[: int(fraction * len(data))]
        with pytest.raises(UserError, match="The image dog.JPEG cannot be decoded: "):
            decode_image(truncated, name="dog.JPEG")
        assert check_image(truncated)


@pytest.mark.parametrize(("width", "height", "limit"), [(448, 448, 1.8), (300, 250, 1.8), (150, 170, 1.0)])
def test_resizing_for_training_is_close_to_pillow(width, height, limit):
    """Mean difference in 1/255; without blurring it is up to four times as large for reductions."""
    for image in photographs(width=width, height=height)[:6]:
        expected = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(resize_bicubic(image, width=224, height=224) - expected).mean() < limit


def test_training_without_random_operations_only_resizes():
    for image in photographs(width=96, height=96)[:2]:
        result = make_train_transform(**PLAIN)({"image": image, "label": 1}, np.random.default_rng(0))
        np.testing.assert_array_equal(result["image"], image)
        assert result["label"] == 1


def test_half_of_the_images_are_flipped():
    image = photographs(width=24, height=24)[0]
    transform = make_train_transform(**{**PLAIN, "image_size": 24, "flip_probability": 0.5})
    flipped = 0
    for seed in range(2000):
        result = transform({"image": image}, np.random.default_rng(seed))["image"]
        is_flipped = np.array_equal(result, image[:, ::-1])
        assert is_flipped or np.array_equal(result, image)
        flipped += is_flipped
    assert stats.binomtest(flipped, 2000).pvalue > P_VALUE


def test_the_full_recipe_depends_only_on_the_generator():
    image = photographs(width=120, height=100)[0]
    transform = make_train_transform(**RECIPE)
    images = [transform({"image": image}, np.random.default_rng(seed))["image"] for seed in (1, 1, 2, 3, 4)]
    assert all(result.shape == (96, 96, 3) and result.dtype == np.uint8 for result in images)
    np.testing.assert_array_equal(images[0], images[1])
    assert len({result.tobytes() for result in images}) == 4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (1200, 300)])
def test_crops_have_the_areas_aspect_ratios_and_positions_of_the_recipe(width, height):
    """Compares 20,000 draws with a NumPy reference by two-sample Kolmogorov-Smirnov tests."""
    rng = np.random.default_rng(0)
    draws = [draw_crop(rng, width=width, height=height, min_area=0.08, max_aspect=4 / 3) for _ in range(20_000)]
    x, y, w, h = np.array(draws).T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + w <= width).all()
    assert (y + h <= height).all()
    bound = np.log(4 / 3)
    expected_h, expected_w = draw_boxes(
        np.random.default_rng(1),
        20_000,
        height=height,
        width=width,
        area=(0.08, 1),
        log_aspect=(-bound, bound),
        fits=lambda h, w: (h <= height) & (w <= width),
    )
    fallback = (w == min(width, round(height * 4 / 3))) & (h == height) & (x == (width - w) // 2)
    assert abs(fallback.mean() - (1 - len(expected_h) / 20_000)) < 0.01
    x, y, w, h = (values[~fallback] for values in (x, y, w, h))
    assert stats.ks_2samp(w * h, expected_w * expected_h).pvalue > P_VALUE
    assert stats.ks_2samp(w / h, expected_w / expected_h).pvalue > P_VALUE
    for position, margin in ((x, width - w), (y, height - h)):
        is_wide = margin >= 60  # enough positions for a continuous test, where each is an interval of 1 / (margin + 1)
        jitter = np.random.default_rng(2).uniform(size=is_wide.sum())
        assert stats.kstest((position[is_wide] + jitter) / (margin[is_wide] + 1), "uniform").pvalue > P_VALUE


def test_the_largest_central_crop_is_used_if_no_random_one_fits():
    rng = np.random.default_rng(0)
    assert draw_crop(rng, width=1000, height=10, min_area=0.9, max_aspect=4 / 3) == (493, 0, 13, 10)
    assert draw_crop(rng, width=9, height=1000, min_area=0.9, max_aspect=4 / 3) == (0, 494, 9, 12)
