"""The form of deformable attention that a conversion chooses, prints and records."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import dat_jax
from dat_jax import conversion, inference
from dat_jax.conversion.command import convert_from_official, convert_to_official
from dat_jax.conversion.files import read_checkpoint, write_safetensors
from dat_jax.conversion.official import official_shapes
from dat_jax.errors import UserError
from dat_jax.models import registry
from tests.helpers import pth_writer
from tests.helpers.golden_files import Golden, relative_error

LATER_KEYS = ("ksizes", "nat_ksizes", "use_lpus", "log_cpb")


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A .pth file of the recorded DAT v1, and the registry with dat_tiny of its size."""
    golden = Golden("v1_cvpr2022_mini", np.float32)
    small = dict(
        dim_stem=16,
        dims=(16, 32, 64, 128),
        stages=("LS", "LS", "LD" * 2, "LD"),
        num_heads=(2, 4, 8, 16),
        num_groups=(1, 1, 2, 4),
    )
    monkeypatch.setitem(registry.VARIANTS, "dat_tiny", {**registry.VARIANTS["dat_tiny"], **small})
    pth_writer.write_pth(tmp_path / "dat_tiny_in1k_224.pth", golden.state_dict)
    return golden, tmp_path / "dat_tiny_in1k_224.pth"


def write_yaml(path, settings, **sections):
    path.write_text(json.dumps({"MODEL": {"TYPE": "dat", "DAT": settings}, **sections}))
    return str(path)


def logits_of(export, images):
    model, variables = dat_jax.load(export)
    return jax.jit(model.apply)(variables, images)


def test_weights_with_the_shapes_of_v1_have_the_released_form(released, tmp_path):
    golden, file = released
    rows = convert_from_official(str(file), str(tmp_path / "export"))
    assert rows["model"] == "dat_tiny"
    assert rows["deformable form"].startswith("cvpr2022, DAT v1 as it was released; ")
    assert "--form=dat_pp" in rows["deformable form"]
    assert relative_error(logits_of(tmp_path / "export", golden.images), golden.arrays["logits"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shapes", *(pytest.param(how, marks=pytest.mark.slow) for how in ("model", "yaml"))])
def test_flag_sets_the_other_form(released, tmp_path, how):
    golden, file = released
    options = {
        "shapes": {},
        "model": dict(model="dat_tiny"),
        "yaml": dict(yaml_file=write_yaml(tmp_path / "m.yaml", golden.config)),
    }[how]
    rows = convert_from_official(str(file), str(tmp_path / "export"), form="dat_pp", **options)
    assert rows["deformable form"] == "dat_pp, as published with DAT++"
    assert relative_error(logits_of(tmp_path / "export", golden.images), golden.arrays["logits"]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flag", "recorded"])
@pytest.mark.parametrize(
    ("sections", "resize"),
    [
        ({"DATA": {"IMG_SIZE": 384}, "TEST": {"CROP": True}}, 438),
        ({"DATA": {"IMG_SIZE": 384}, "TEST": {"CROP": False}}, 384),
        ({"DATA": {"IMG_SIZE": 384}}, 438),
        ({}, 438),
    ],
)
def test_form_does_not_change_the_resize_of_a_yaml_file(released, tmp_path, how, sections, resize):
    golden, _ = released
    for keys, form in (({}, "dat_pp"), ({"ksizes": [9, 7, 5, 3]}, "cvpr2022")):
        file, export = tmp_path / f"{form}.safetensors", tmp_path / form
        config = {**golden.config, "img_size": 384, **keys}
        shapes = official_shapes(conversion.model_from_official(config))
        weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        write_safetensors(file, weights, metadata={"deformable_form": form} if how == "recorded" else {})
        yaml_file = write_yaml(tmp_path / "m.yaml", config, **sections)
        convert_from_official(str(file), str(export), yaml_file=yaml_file, form=form if how == "flag" else None)
        classifier = inference.load(export)
        assert dat_jax.load(export)[0].deformable_form == form
        assert (classifier.options["image_size"], classifier.options["resize"]) == (384, resize)


def test_configuration_without_later_keys_has_the_released_form(released):
    golden, _ = released
    assert not golden.config.keys() & set(LATER_KEYS)
    assert conversion.model_from_official(golden.config).deformable_form == "cvpr2022"
    for key, value in zip(LATER_KEYS, ([9, 7, 5, 3], [7] * 4, [False] * 4, [False] * 4), strict=True):
        assert conversion.model_from_official({**golden.config, key: value}).deformable_form == "dat_pp", key
    with pytest.raises(ValueError, match="use_conv_patches: expected False for DAT v1 as it was released, got True"):
        conversion.model_from_official({**golden.config, "use_conv_patches": True})


@pytest.mark.parametrize("kind", "NEX")
def test_later_block_types_imply_the_later_form(released, kind):
    golden, _ = released
    stages = [[kind, *blocks[1:]] for blocks in golden.config["stage_spec"]]
    config = {**golden.config, "stage_spec": stages}
    assert conversion.model_from_official(config).deformable_form == "dat_pp"
    assert conversion.model_from_official({**config, "use_conv_patches": True}).conv_patches


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cvpr2022", "dat_pp"])
def test_form_round_trip_through_safetensors(released, tmp_path, form):
    golden, file = released
    convert_from_official(str(file), str(tmp_path / "export"), form=form)
    out = tmp_path / "out.safetensors"
    convert_to_official(str(tmp_path / "export"), str(out))
    assert read_checkpoint(out).metadata == {"deformable_form": form}
    for name, array in load_file(out).items():
        np.testing.assert_array_equal(array, golden.state_dict[name])
    convert_from_official(str(out), str(tmp_path / "again"))
    assert dat_jax.load(tmp_path / "again")[0].deformable_form == form
    other = {"cvpr2022": "dat_pp", "dat_pp": "cvpr2022"}[form]
    with pytest.raises(UserError, match=f"records the form {form} of deformable attention, got --form={other}"):
        convert_from_official(str(out), str(tmp_path / "never"), form=other)
    assert not (tmp_path / "never").exists()


def test_unknown_recorded_form_is_refused(released, tmp_path):
    golden, _ = released
    write_safetensors(tmp_path / "w.safetensors", golden.state_dict, metadata={"deformable_form": "dat_3"})
    with pytest.raises(
        UserError, match="records the unknown form 'dat_3' of deformable attention; known: dat_pp, cvpr2022"
    ):
        convert_from_official(str(tmp_path / "w.safetensors"), str(tmp_path / "export"))
