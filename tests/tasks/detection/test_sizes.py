"""Detections of images of several sizes in one array are those of each image by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.tasks.detection.objective import default_settings, detect
from tests.helpers import tiny_detection
from tests.helpers.padded_images import crop, padded_images
from tests.helpers.tiers import slow

BUCKET = (96, 160)
VALID = [(96, 160), (64, 75), (50, 128), (33, 32)]  # the content of each image; it is padded to a multiple of 32
LIMITS = dict(train_candidates=50, train_proposals=30, test_candidates=60, test_proposals=25, max_detections=12)


def make_detect(head):
    """The detector, jitted, and its variables in float64."""
    model, variables = tiny_detection.random_detector(head, dtype=jnp.float64)
    settings = default_settings(model)
    names = {name: value for name, value in LIMITS.items() if hasattr(settings, name)}
    settings = settings.__class__(**{**vars(settings), **names, "score_threshold": 0.001})
    run = jax.jit(functools.partial(detect, model, settings=settings))
    return run, jax.tree.map(lambda x: np.asarray(x, np.float64), variables)


@pytest.mark.parametrize(
    ("head", "contents"),
    [("retinanet", VALID[1:2]), *(slow(head, VALID) for head in ("retinanet", "mask_rcnn", "cascade_mask_rcnn"))],
)
def test_detections_are_those_of_the_image_alone(x64, head, contents):
    run, variables = make_detect(head)
    padded = [tuple(-(-side // 32) * 32 for side in valid) for valid in contents]
    images, sizes = padded_images(padded, BUCKET)
    batch = {"valid": jnp.asarray(contents, jnp.int32), "scale": jnp.full((len(contents), 4), 1.5), "sizes": sizes}
    found = run(variables, images, batch)
    counts = []
    for index, shape in enumerate(padded):
        alone_batch = {name: batch[name][index : index + 1] for name in ("valid", "scale")}
        alone = run(variables, crop(images, index, shape), alone_batch)
        count = int(alone["valid"][0].sum())
        counts.append(count)
        assert int(found["valid"][index].sum()) == count
        np.testing.assert_array_equal(found["labels"][index, :count], alone["labels"][0, :count])
        for name in sorted({"boxes", "scores", "masks"} & set(alone)):
            actual, expected = found[name][index, :count], alone[name][0, :count]
            np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9, err_msg=name)
    assert min(counts) > 0
