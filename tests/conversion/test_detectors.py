"""Published detectors come over whole: names, shapes, counts and numbers."""

import json

import jax
import numpy as np
import pytest

from dat_jax import create_model
from dat_jax.conversion import detectors
from dat_jax.models.rcnn import RCNN
from dat_jax.models.retinanet import RetinaNet
from tests.golden_files import DIRECTORY

PUBLISHED = {  # millions of parameters, as the paper's tables have them
    **{
        ("retinanet", "tiny"): 33.7,
        ("retinanet", "small"): 63.3,
        ("maskrcnn", "tiny"): 44.8,
        ("maskrcnn", "small"): 74.4,
    },
    **{("cascade", "tiny"): 81.4, ("cascade", "small"): 110.5, ("cascade", "base"): 150.9},
}


def make(kind, size):
    dat = create_model(f"dat_pp_{size}")
    return RetinaNet(dat) if kind == "retinanet" else RCNN(dat, cascade=kind == "cascade")


def read_keys(kind, size):
    recorded = json.loads((DIRECTORY / "keys" / f"{kind}_{size}.json").read_text())
    return recorded["params_total"], {name: tuple(shape) for name, shape in recorded["shapes"].items()}


@pytest.mark.parametrize(("kind", "size"), PUBLISHED)
def test_names_and_counts_are_the_published_ones(kind, size):
    total, recorded = read_keys(kind, size)
    ours = detectors.detector_shapes(make(kind, size))
    counters = {name for name in recorded if name.endswith("num_batches_tracked")}
    assert ours == {name: shape for name, shape in recorded.items() if name not in counters}
    assert total == sum(np.prod(shape) for name, shape in ours.items() if not name.endswith(("_mean", "_var")))
    assert abs(total / 1e6 - PUBLISHED[kind, size]) <= 0.06


@pytest.mark.parametrize("kind", ["retinanet", "maskrcnn", "cascade"])
def test_a_full_size_state_dict_converts_and_comes_back(kind):
    rng = np.random.default_rng(0)
    _, recorded = read_keys(kind, "tiny")
    state_dict = {
        name: np.zeros((), np.int64) if name.endswith("tracked") else rng.standard_normal(shape, np.float32)
        for name, shape in recorded.items()
    }
    model = make(kind, "tiny")
    variables = detectors.detector_variables(model, state_dict)
    back = detectors.detector_to_official(model, jax.device_get(variables))
    assert back.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
