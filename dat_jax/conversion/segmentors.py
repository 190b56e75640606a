"""Conversion of segmentors: whole published configurations and checkpoints of MMSegmentation, and weights back."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dat_jax.conversion import dense
from dat_jax.conversion.settings import COUNT, RATE_BELOW_ONE, Settings, choice, list_of
from dat_jax.models.dat import DAT
from dat_jax.models.registry import create_segmentor
from dat_jax.models.segmentation import Segmentor

_HEADS = {"FPNHead": "sem_fpn", "UPerHead": "upernet"}
_TABLE: dense.Table = (
    (r"neck/(?P<m>lateral_convs|fpn_convs)_(?P<i>\d+)", "neck.{m}.{i}.conv"),
    (r"(?P<part>\w+_head)/classifier/conv_seg", "{part}.conv_seg"),
    (r"(?P<part>\w+_head)/scale_heads_(?P<i>\d+)_(?P<j>\d+)/(?P<k>conv|bn)", "{part}.scale_heads.{i}.{j}.{k}"),
    (r"(?P<part>\w+_head)/psp_modules_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.psp_modules.{i}.1.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.{m}.{i}.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)/(?P<k>conv|bn)", "{part}.{m}.{k}"),
)


def is_segmentor(names: Iterable[str]) -> bool:
    """Whether published names belong to a segmentor."""
    return any(name.startswith("decode_head.") for name in names)


def segmentor_from_official(config: Mapping[str, Any], **overrides) -> Segmentor:
    """Create the model of a published configuration.

    Args:
      config: MMSegmentation's ``model`` mapping: backbone, neck, decode_head, auxiliary_head. Its test_cfg is only checked;
        ``segmentor_options_from_official`` returns its options.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Returns:
      The model, a linen module.

    Raises:
      ValueError: a key is unknown or missing, or its value is not supported; the key is named.
    """
    return read_segmentor(config, **overrides)[0]


def segmentor_options_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the test_cfg of a published configuration.

    Args:
      config: MMSegmentation's ``model`` mapping.

    Returns:
      Options of ``inference.load``: "window" and "stride" in pixels for sliding windows, none for whole images.

    Raises:
      ValueError: a key is unknown or missing, or its value is not supported; the key is named.
    """
    return read_segmentor(config)[1]


def read_segmentor(config: Mapping[str, Any], **overrides) -> tuple[Segmentor, dict[str, Any]]:
    """The model and the options of ``inference.load`` of a published configuration.

    Arguments and errors are those of ``segmentor_from_official``.
    """
    model, options, _ = trace_segmentor(config, **overrides)
    return model, options


def trace_segmentor(config: Mapping[str, Any], **overrides) -> tuple[Segmentor, dict[str, Any], dict[str, str]]:
    """Read a published segmentor configuration like ``read_segmentor``, and record the use of each key (``Settings.uses``)."""
    settings = dense.open_config(config)
    settings.check("type", "EncoderDecoder")
    dat = dense.read_backbone(settings, out_indices=(0, 1, 2, 3), **overrides)
    head = settings.section("decode_head")
    kind = _HEADS[head.take("type", choice(*_HEADS))]
    attributes = (_read_sem_fpn if kind == "sem_fpn" else _read_upernet)(settings, head, dat)
    model = Segmentor(dat, head=kind, dtype=dat.dtype, **attributes)
    settings.optional_section("train_cfg")  # must be empty
    options = _read_test_options(settings)
    settings.finish()
    return model, options, settings.uses


def _read_sem_fpn(settings: Settings, head: Settings, dat: DAT) -> dict[str, Any]:
    """Attributes of a ``Segmentor`` with the head of Semantic FPN."""
    settings.check("auxiliary_head", None, default=None, reason="Only UPerHead is supported with an auxiliary head.")
    width = dense.read_neck(settings, dat, levels=4)
    head.check("feature_strides", (4, 8, 16, 32))
    attributes = _read_head(head, in_channels=(width,) * 4, source="neck.out_channels, four times")
    return {**attributes, "neck_channels": width, "auxiliary_channels": 0}


def _read_upernet(settings: Settings, head: Settings, dat: DAT) -> dict[str, Any]:
    """Attributes of a ``Segmentor`` with the head of UperNet."""
    settings.check("neck", None, default=None, reason="UPerHead uses the feature maps of the backbone.")
    attributes = _read_head(head, in_channels=dat.dims, source="backbone.dims")
    attributes["pool_sides"] = head.take("pool_scales", list_of(COUNT), default=(1, 2, 3, 6))
    auxiliary = settings.optional_section("auxiliary_head")
    if auxiliary is None:
        return {**attributes, "auxiliary_channels": 0}
    auxiliary.check("type", "FCNHead")
    auxiliary.check("concat_input", False, default=True)
    auxiliary.check("kernel_size", 3, default=3)
    auxiliary.check("dilation", 1, default=1)
    source = "backbone.dims, the third value"
    auxiliary_attributes = _read_head(auxiliary, in_index=2, in_channels=dat.dims[2], source=source, weight=0.4)
    for key, name in (("num_classes", "num_classes"), ("dropout_ratio", "dropout")):
        auxiliary.match(key, attributes[name], f"decode_head.{key}", default=auxiliary_attributes[name])
    return {
        **attributes,
        "auxiliary_channels": auxiliary_attributes["channels"],
        "auxiliary_convs": auxiliary.take("num_convs", COUNT, default=2),
    }


def _read_head(
    head: Settings, *, in_channels: Any, source: str, in_index: Any = (0, 1, 2, 3), weight: float = 1.0
) -> dict[str, Any]:
    """Read the keys that all heads share.

    Args:
      head: settings of the head, whose type was read before.
      in_channels: expected number of channels of the input maps.
      source: description of the keys that determine ``in_channels``, for error messages.
      in_index: expected indices of the input maps.
      weight: expected weight of the loss, as the training task adds them.

    Returns:
      {"num_classes", "channels", "dropout"}.
    """
    head.match("in_channels", in_channels, source)
    head.check("in_index", in_index, default=-1)
    head.check("align_corners", False, default=False)
    dense.check_batch_norm(head)
    dense.check_loss(head, "loss_decode", kind="CrossEntropyLoss", weight=weight, use_sigmoid=False)
    head.check("act_cfg", {"type": "ReLU"}, default={"type": "ReLU"})
    head.check("ignore_index", 255, default=255)
    dense.check_plain(head, "conv_cfg", "sampler", value=None)
    head.ignore(dense.INITIAL_WEIGHTS, "init_cfg")
    return {
        "num_classes": head.take("num_classes", COUNT),
        "channels": head.take("channels", COUNT),
        "dropout": head.take("dropout_ratio", RATE_BELOW_ONE, default=0.1),
    }


def _read_test_options(settings: Settings) -> dict[str, Any]:
    """Options of ``inference.load``."""
    test = settings.optional_section("test_cfg")
    if test is None or test.take("mode", choice("whole", "slide"), default="whole") == "whole":
        return {}
    sides = {}
    for key, name in (("crop_size", "window"), ("stride", "stride")):
        height, width = test.take(key, list_of(COUNT, length=2))
        if height != width:
            raise test.error(key, f"expected a square, got {(height, width)}")
        sides[name] = height
    return sides


def segmentor_variables(model: Segmentor, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert the published weights of a segmentor to variables.

    Args:
      model: model that the weights belong to.
      state_dict: published name -> array, in PyTorch's layouts. Buffers and counters of BatchNorm may be missing.

    Returns:
      {"params": ..., "batch_stats": ...}, in float32. float64 arrays stay float64 if jax_enable_x64 is on.

    Raises:
      ValueError: weights do not fit the model. One message names all unknown, missing and mis-shaped weights.
    """
    return dense.to_variables(model, _TABLE, state_dict)


def segmentor_to_official(model: Segmentor, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert variables of a segmentor to a state dict with published names and PyTorch's layouts.

    Args:
      model: model that the variables belong to.
      variables: {"params": ..., "batch_stats": ...}.

    Returns:
      Published name -> array. Counters of BatchNorm, which our variables do not have, are 0.
    """
    return dense.to_official(model, _TABLE, variables)


def segmentor_shapes(model: Segmentor) -> dict[str, tuple[int, ...]]:
    """Published name -> published shape, for every parameter and statistic of a model."""
    return dense.official_shapes(model, _TABLE)


def guess_segmentor(state_dict: Mapping[str, np.ndarray], backbone: str) -> Segmentor:
    """The segmentor on a registered backbone whose head and widths agree with published weights."""
    head = "sem_fpn" if any(name.startswith("neck.") for name in state_dict) else "upernet"
    default = create_segmentor(head, backbone=backbone)
    width = functools.partial(dense.read_width, state_dict)
    return default.clone(
        num_classes=width("decode_head.conv_seg", axis=0, default=default.num_classes),
        channels=width("decode_head.conv_seg", axis=1, default=default.channels),
        neck_channels=width("neck.lateral_convs.0.conv", axis=0, default=default.neck_channels),
        auxiliary_channels=width("auxiliary_head.convs.0.conv", axis=0, default=0),
    )


def find_segmentor(
    state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, DAT]
) -> tuple[str, Segmentor] | None:
    """Name of a backbone, and the segmentor on it that has the names and shapes of published weights; see ``dense.find``."""
    return dense.find(state_dict, backbones=backbones, guess=guess_segmentor, shapes_of=segmentor_shapes)
