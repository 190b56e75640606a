"""Options of inference that are stored with weights."""

import json

import pytest

from dat_jax import inference
from dat_jax.checkpoints.inference_options import _CONFIG_KEYS, read_options


def test_options_of_a_run_are_those_of_its_evaluation(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"image_size": 64, "eval_resize": 72}, "eval": {}}))
    assert read_options(tmp_path, kind="classifier") == {"image_size": 64, "resize": 72}
    assert read_options(tmp_path, kind="detector") == {}


def test_options_of_a_folder_of_weights_are_returned_as_they_are(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"options": {"top": 3}}))
    assert read_options(tmp_path, kind="classifier") == {"top": 3}


@pytest.mark.parametrize("kind", ["classifier", "segmentor", "detector"])
def test_every_stored_option_is_known(kind):
    names = {"classifier": "classification", "segmentor": "segmentation", "detector": "detection"}
    assert _CONFIG_KEYS[kind].keys() <= getattr(inference, names[kind]).OPTIONS.keys()
