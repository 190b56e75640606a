"""Pyramids and dense outputs of the detectors reproduce recorded arrays of the published models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dat_jax.conversion.detectors import detector_from_official, detector_variables
from tests.helpers.golden_files import channels_last, load, relative_error
from tests.helpers.tiers import slow

KINDS = ["retinanet", "maskrcnn", "cascade"]
# Quick tests of tasks/detection check the detections of the other two, which depend on these outputs.
QUICK_KINDS = [slow("retinanet"), slow("maskrcnn"), "cascade"]


def check_dense_outputs(kind, dtype, tolerance):
    arrays, config, _, state_dict = load(kind)
    model = detector_from_official(config, dtype=jnp.dtype(dtype))
    variables = detector_variables(model, state_dict)
    images = channels_last(arrays["images"].astype(dtype))

    def apply(variables, images):
        is_neck = lambda module, _: module.name == "neck"  # noqa: E731
        outputs, state = model.apply(variables, images, capture_intermediates=is_neck, mutable=["intermediates"])
        return state["intermediates"]["neck"]["__call__"][0], outputs["scores"], outputs["deltas"]

    names = ("fpn", "cls", "reg") if kind == "retinanet" else ("fpn", "rpn_cls", "rpn_reg")
    for name, levels in zip(names, jax.jit(apply)(variables, images), strict=True):
        assert len(levels) == 5
        for level, x in enumerate(levels):
            assert x.dtype == dtype
            x, key = np.moveaxis(x, -1, 1), f"{name}{level}"
            if level < 2:  # every fourth row and column is recorded
                x, key = x[:, :, ::4, ::4], f"{key}_4"
            expected = arrays[key]
            assert x.shape == expected.shape
            assert relative_error(x, expected) < tolerance, (name, level)


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_float32(kind):
    check_dense_outputs(kind, "float32", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind, x64):
    check_dense_outputs(kind, "float64", 1e-6)
