"""The form of deformable attention that weights were trained with is recorded, compared, and never guessed."""

import json

import jax
import numpy as np
import pytest

import dat_jax
from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.exports import export_model
from dat_jax.checkpoints.integrity import DamagedError
from dat_jax.checkpoints.loading import load_for_finetuning, load_trained
from dat_jax.checkpoints.model_description import describe_model
from dat_jax.config import list_configs, load_config
from dat_jax.conversion.command import convert_to_official
from dat_jax.conversion.files import read_checkpoint
from dat_jax.errors import UserError
from dat_jax.training.loop import evaluate, train
from dat_jax.training.model_defaults import resolve_model
from dat_jax.training.trainer import Trainer
from tests.helpers import tiny_config
from tests.helpers.random_variables import random_variables

V1 = dict(
    image_size=64,
    dim_stem=8,
    dims=(8, 8, 8, 8),
    stages=("L", "L", "D", "D"),
    num_heads=(2, 2, 2, 2),
    num_groups=(1, 1, 2, 2),
    window_sizes=(4, 4, 4, 4),
    num_classes=2,
)


def make_export(directory, *, recorded=True, **settings):
    """A small DAT v1; if not ``recorded``, as it was written before the attribute existed."""
    model = dat_jax.create_model("dat_tiny", **{**V1, **settings})
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    export_model(directory, model=model, variables=variables)
    if not recorded:
        description = json.loads((directory / "model.json").read_text())
        del description["model"]["deformable_form"]
        (directory / "model.json").write_text(json.dumps(description))
    return model, variables


@pytest.mark.parametrize("form", ["cvpr2022", "dat_pp"])
def test_an_export_records_its_form(tmp_path, form):
    wanted, _ = make_export(tmp_path / "export", deformable_form=form)
    model, _ = dat_jax.load(tmp_path / "export")
    assert model.deformable_form == form
    assert describe_model(model) == describe_model(wanted)


def test_a_dat_v1_without_a_recorded_form_needs_the_form_to_load(tmp_path):
    make_export(tmp_path / "export", recorded=False)
    with pytest.raises(
        UserError, match=r"deformable_form=FORM.*--form=FORM. FORM is cvpr2022 for weights that the authors"
    ):
        dat_jax.load(tmp_path / "export")
    for form in ("cvpr2022", "dat_pp"):
        model, _ = dat_jax.load(tmp_path / "export", deformable_form=form)
        assert model.deformable_form == form


def test_the_conversion_command_writes_a_file_that_records_the_given_form(tmp_path):
    make_export(tmp_path / "export", recorded=False)
    convert_to_official(str(tmp_path / "export"), str(tmp_path / "w.safetensors"), form="cvpr2022")
    assert read_checkpoint(tmp_path / "w.safetensors").metadata == {"deformable_form": "cvpr2022"}
    make_export(tmp_path / "recorded")
    with pytest.raises(UserError, match="records the form cvpr2022 of deformable attention, got --form=dat_pp"):
        convert_to_official(str(tmp_path / "recorded"), str(tmp_path / "other.safetensors"), form="dat_pp")


@pytest.mark.parametrize("settings", [dict(lpu=(True,) * 4), dict(stages=("L", "N", "D", "D"))])
def test_a_dat_pp_without_a_recorded_form_loads(tmp_path, settings):
    make_export(tmp_path / "export", recorded=False, deformable_form="dat_pp", **settings)
    model, _ = load_trained(tmp_path / "export")
    assert model.deformable_form == "dat_pp"


def test_a_model_without_deformable_blocks_needs_no_form(tmp_path):
    make_export(tmp_path / "export", recorded=False, stages=("L", "L", "S", "L"))
    assert load_trained(tmp_path / "export")[0].stages == ("L", "L", "S", "L")


def test_weights_of_the_other_form_are_an_error_in_finetuning(tmp_path):
    _, variables = make_export(tmp_path / "export")
    fresh = jax.tree.map(np.asarray, variables)
    loaded, _ = load_for_finetuning(tmp_path / "export", fresh_variables=fresh, deformable_form="cvpr2022")
    jax.tree.map(np.testing.assert_array_equal, loaded, fresh)
    with pytest.raises(
        UserError, match="'cvpr2022', got a model with 'dat_pp': set --config.model.deformable_form=cvpr2022"
    ):
        load_for_finetuning(tmp_path / "export", fresh_variables=fresh, deformable_form="dat_pp")


@pytest.mark.slow
def test_a_run_records_the_form_of_its_model(tmp_path):
    config = tiny_config.get_config()
    train(config, str(tmp_path), quiet=True)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model"]["deformable_form"] == "dat_pp"
    assert config.model.deformable_form == "auto"  # the configuration of the caller stays as it is
    other = tiny_config.get_config(deformable_form="cvpr2022")
    with pytest.raises(UserError, match="model.deformable_form dat_pp, now cvpr2022"):
        train(other, str(tmp_path), quiet=True)
    with pytest.raises((UserError, DamagedError), match="deformable_form"):
        evaluate(other, str(tmp_path), quiet=True)


@pytest.mark.parametrize(("name", "form"), [("dat_tiny", "cvpr2022"), ("dat_pp_tiny", "dat_pp")])
def test_auto_is_the_form_of_the_named_model(name, form):
    config = tiny_config.get_config().unlock()
    config.model = dict(name=name, deformable_form="auto", dtype="float32")
    assert resolve_model(config).model.deformable_form == form


def test_every_configuration_has_the_key():
    """Flags of the command line can only change keys that a configuration has."""
    for name in list_configs():
        assert load_config(name).model.deformable_form == "auto", name


def test_a_checkpoint_without_a_recorded_form_has_the_form_dat_pp():
    metadata = {"config": tiny_config.get_config().to_dict(), "classes": 2}
    del metadata["config"]["model"]["deformable_form"]
    compatibility.check_model(metadata, Trainer(tiny_config.get_config()).config, class_names=("left", "right"))
    with pytest.raises(UserError, match="model.deformable_form dat_pp, now cvpr2022"):
        compatibility.check_model(
            metadata, tiny_config.get_config(deformable_form="cvpr2022"), class_names=("left", "right")
        )
