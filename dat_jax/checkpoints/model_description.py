"""Models as JSON: the attributes that determine the function of a model, and the model of given attributes.

A folder of weights stores the attributes in model.json, and a run in the groups "model" and "head" of config.json.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from dat_jax.errors import UserError
from dat_jax.models.dat import DAT, LATER_STAGE_TYPES
from dat_jax.models.registry import VARIANTS, Detector, create_detector, create_model, create_segmentor, name_detector
from dat_jax.models.segmentation import Segmentor

Model = DAT | Segmentor | Detector

# Attributes of flax, of the backbone, those that change how the function is computed but not which function, and those of
# training only.
_OMITTED = {"parent", "name", "dtype", "implementation", "remat", "scan_blocks", "dat", "frozen_batch_norm"}
_CREATE_DENSE = {"segmentor": create_segmentor, "detector": create_detector}


def describe_model(model: Model) -> dict[str, Any]:
    """Attributes that determine the function of a model, as JSON can store them.

    Attributes that only affect how it is computed, and those of the backbone of a segmentor or detector, are left out. The
    description of a detector includes its name.
    """
    names = [field.name for field in dataclasses.fields(model) if field.name not in _OMITTED]
    attributes = {name: getattr(model, name) for name in names}
    return {"name": name_detector(model), **attributes} if isinstance(model, Detector) else attributes


def get_backbone(model: Model) -> DAT:
    """The DAT of a segmentor or detector; a classifier itself."""
    return model if isinstance(model, DAT) else model.dat


def name_model(dat: DAT) -> str | None:
    """Registered name of the model with the layers of a DAT, whatever its number of classes; None if there is none."""
    layers = _describe_layers(dat)
    names = [name for name in VARIANTS if _describe_layers(create_model(name)) == layers]
    same_size = [name for name in names if create_model(name).image_size == dat.image_size]
    return next(iter([*same_size, *names]), None)


def _describe_layers(dat: DAT) -> tuple[Any, ...]:
    names = ("dim_stem", "dims", "stages", "num_heads", "num_groups", "lpu", "conv_mlp", "conv_patches")
    return tuple(getattr(dat, name) for name in names)


def create_described(
    kind: str, settings: Mapping[str, Any], head: Mapping[str, Any] | None, *, source: str | os.PathLike
) -> Model:
    """Create the model that JSON describes.

    Args:
      kind: "classifier", "segmentor" or "detector".
      settings: attributes of the DAT, with a registered name as "name" if it starts from one.
      head: name and attributes of the segmentor or detector around it; None for a classifier.
      source: what errors call the origin of the description.

    Raises:
      UserError: unknown names or attributes, or values that do not fit.
    """
    dat = create_dat(settings, source=source)
    if kind == "classifier":
        return dat
    try:
        attributes = _to_attributes(head or {})
        name = attributes.pop("name", attributes.get("head"))  # a segmentor has its name as an attribute
        return _CREATE_DENSE[kind](name, backbone=dat, **attributes)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} cannot be loaded: {error}") from error


def create_dat(settings: Mapping[str, Any], *, source: str | os.PathLike) -> DAT:
    """Create a classifier or backbone from JSON attributes. Without a "name" they must be complete.

    Raises:
      UserError: unknown names or attributes, or values that do not fit; it names ``source``.
    """
    attributes = _to_attributes(settings)
    try:
        return create_model(attributes.pop("name", "dat_pp_tiny"), **attributes)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} cannot be loaded: {error}") from error


def add_deformable_form(settings: Mapping[str, Any], form: str | None, *, source: str | os.PathLike) -> dict[str, Any]:
    """The settings with "deformable_form", which older files do not have.

    When those were written, only "dat_pp" could be computed. Their weights may nevertheless be the released ones of DAT v1,
    which need "cvpr2022", and nothing in the file shows it. DAT++ exists in one form only.

    Args:
      settings: attributes of a DAT.
      form: the form that the user specified, or None.
      source: what errors call the file.

    Raises:
      UserError: the weights fit both forms, and ``form`` is None.
    """
    if "deformable_form" in settings:
        return dict(settings)
    dat = create_dat(settings, source=source)
    stage_types = set("".join(dat.stages))
    fits_both = "D" in stage_types and not stage_types & LATER_STAGE_TYPES and not any(dat.lpu)
    if fits_both and form is None:
        raise UserError(
            f"{source} does not record which of the two published forms of deformable attention its weights need, and they "
            "fit both. Specify the form with dat_jax.load(..., deformable_form=FORM), or write a file that records it: python "
            f"-m dat_jax.conversion {source} NEW.safetensors --form=FORM. FORM is cvpr2022 for weights that the authors "
            "released for DAT v1, and dat_pp for a model trained with dat_jax."
        )
    return {**settings, "deformable_form": form or "dat_pp"}


def _to_attributes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with tuples instead of the lists of JSON."""

    def to_tuple(value):
        return tuple(map(to_tuple, value)) if isinstance(value, list | tuple) else value

    return {key: to_tuple(value) for key, value in settings.items()}
