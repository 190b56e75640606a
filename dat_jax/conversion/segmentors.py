"""Published segmentors, a whole checkpoint of MMSegmentation, to ours, and back."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.conversion.official import (
    CONV,
    SAME,
    Entries,
    Entry,
    Transform,
    assemble,
    is_ignored,
    model_from_official,
    published,
)
from dat_jax.models.registry import create_segmentor
from dat_jax.models.segmentation import Segmentor

_HEADS = {"FPNHead": "sem_fpn", "UPerHead": "upernet"}
_NOT_OF_THE_MODEL = {"type", "out_indices", "use_checkpoint", "init_cfg", "pretrained"}  # in a published backbone
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm, without effect where it has a momentum
# Our leaf -> the published one.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Our module, after the part's own name -> the published one.
_MODULES = (
    (r"neck/(?P<m>lateral_convs|fpn_convs)_(?P<i>\d+)", "neck.{m}.{i}.conv"),
    (r"(?P<part>\w+_head)/classifier/conv_seg", "{part}.conv_seg"),
    (r"(?P<part>\w+_head)/scale_heads_(?P<i>\d+)_(?P<j>\d+)/(?P<k>conv|bn)", "{part}.scale_heads.{i}.{j}.{k}"),
    (r"(?P<part>\w+_head)/psp_modules_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.psp_modules.{i}.1.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)_(?P<i>\d+)/(?P<k>conv|bn)", "{part}.{m}.{i}.{k}"),
    (r"(?P<part>\w+_head)/(?P<m>[a-z_]+)/(?P<k>conv|bn)", "{part}.{m}.{k}"),
)


def is_segmentor(names) -> bool:
    """Whether published names are those of a segmentor."""
    return any(name.startswith("decode_head.") for name in names)


def segmentor_from_official(config: Mapping[str, Any], **overrides) -> Segmentor:
    """The model of a published configuration.

    Args:
      config: MMSegmentation's ``model`` mapping: backbone, neck, decode_head, auxiliary_head.
      **overrides: attributes of the backbone, ``DAT``, that replace the configured ones, such as dtype.

    Raises:
      ValueError: another head, or settings that no published model has.
    """
    head = config["decode_head"]
    if head["type"] not in _HEADS:
        raise ValueError(f"The decode_head {head['type']!r} is unknown; choose from {', '.join(_HEADS)}.")
    backbone = {name: value for name, value in config["backbone"].items() if name not in _NOT_OF_THE_MODEL}
    dat = model_from_official(backbone, **overrides)
    auxiliary = config.get("auxiliary_head") or {"channels": 0}
    return Segmentor(
        dat,
        num_classes=head["num_classes"],
        head=_HEADS[head["type"]],
        channels=head["channels"],
        neck_channels=config.get("neck", {}).get("out_channels", 256),
        auxiliary_channels=auxiliary["channels"],
        dropout=head["dropout_ratio"],
        dtype=dat.dtype,
    )


def segmentor_variables(model: Segmentor, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights of a segmentor as {"params", "batch_stats"}.

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """

    def ignored(name):
        if name.endswith(f".bn.{_COUNTER}"):
            return True
        return name.startswith("backbone.") and is_ignored(name.removeprefix("backbone."), model.dat)

    return assemble(state_dict, _entries(model), is_ignored=ignored)


def segmentor_to_official(model: Segmentor, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our variables with published names and layouts; counters of BatchNorm, which we do not have, are 0."""
    flat = flax.traverse_util.flatten_dict(dict(variables))
    state_dict = {entry.name: entry.transform.to_official(np.asarray(flat[entry.path])) for entry in _entries(model)}
    counters = [name for name in state_dict if name.endswith(".running_var")]
    return state_dict | {name.replace("running_var", _COUNTER): np.zeros((), np.int64) for name in counters}


def segmentor_shapes(model: Segmentor) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter and statistic of the model."""
    return {entry.name: entry.official_shape() for entry in _entries(model)}


def find_segmentor(
    state_dict: Mapping[str, np.ndarray], *, backbones: Mapping[str, Any]
) -> tuple[str, Segmentor] | None:
    """The segmentor on one of the backbones, name -> DAT, that has just these names and shapes; None if none has."""
    shapes = {name: np.shape(array) for name, array in state_dict.items()}
    head = "sem_fpn" if any(name.startswith("neck.") for name in shapes) else "upernet"
    classes = shapes.get("decode_head.conv_seg.weight", (1,))[0]
    width = shapes.get("backbone.norms.3.norm.weight")
    options = {} if any(name.startswith("auxiliary_head.") for name in shapes) else {"auxiliary_channels": 0}
    for name, dat in backbones.items():
        if (dat.dims[-1],) == width:  # shapes of all take seconds
            model = create_segmentor(head, backbone=name, num_classes=classes, **options)
            if all(shapes.get(key) == shape for key, shape in segmentor_shapes(model).items()):
                return f"{head} on {name}", model
    return None


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds
def _entries(model: Segmentor) -> Entries:
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flat = flax.traverse_util.flatten_dict(variables)
    return [Entry(path, leaf.shape, *_published(path, model)) for path, leaf in sorted(flat.items())]


def _published(path: tuple[str, ...], model: Segmentor) -> tuple[str, Transform]:
    _, *module, leaf = path  # without the collection
    if module[:2] == ["backbone", "dat"]:
        name, transform = published((*module[2:], leaf), model.dat)
        return f"backbone.{name}", transform
    module = "/".join(module)
    if match := re.fullmatch(r"backbone/norms_(\d+)", module):
        return f"backbone.norms.{match[1]}.norm.{_LEAVES[leaf]}", SAME
    for pattern, template in _MODULES:
        if match := re.fullmatch(pattern, module):
            return f"{template.format(**match.groupdict())}.{_LEAVES[leaf]}", CONV if leaf == "kernel" else SAME
    raise KeyError(f"No published name for the module {module}.")  # a gap of the table, caught by the tests
