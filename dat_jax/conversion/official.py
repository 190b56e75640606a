"""Conversion of classifiers: a published DAT configuration and its weights to a model and its parameters, and weights back.

The published arrays and ours hold the same numbers. Their names and axis orders differ, and are listed in the tables below.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dat_jax.conversion.backbone_settings import read_backbone
from dat_jax.conversion.settings import Settings
from dat_jax.models.dat import DAT, LATER_STAGE_TYPES
from dat_jax.models.registry import create_model

# Defaults of the published constructor, for keys that are missing in a configuration.
_DEFAULTS = dict(
    img_size=224,
    patch_size=4,
    num_classes=1000,
    expansion=4,
    dim_stem=96,
    dims=[96, 192, 384, 768],
    depths=[2, 2, 6, 2],
    heads=[3, 6, 12, 24],
    window_sizes=[7, 7, 7, 7],
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    strides=[-1, -1, -1, -1],
    offset_range_factor=[1, 2, 3, 4],
    stage_spec=[["L", "D"], ["L", "D"], ["L", "D", "L", "D", "L", "D"], ["L", "D"]],
    groups=[-1, -1, 3, 6],
    use_pes=[False, False, False, False],
    dwc_pes=[False, False, False, False],
    sr_ratios=[8, 4, 2, 1],
    fixed_pes=[False, False, False, False],
    no_offs=[False, False, False, False],
    use_dwc_mlps=[False, False, False, False],
    use_conv_patches=False,
    ksizes=[9, 7, 5, 3],
    nat_ksizes=[3, 3, 3, 3],
    layer_scale_values=[-1, -1, -1, -1],
    use_lpus=[False, False, False, False],
    log_cpb=[False, False, False, False],
)
# Keys introduced with DAT++. The configurations of DAT v1 as it was released have none of them.
_LATER_KEYS = {"ksizes", "nat_ksizes", "use_lpus", "log_cpb"}


def model_from_official(config: Mapping[str, Any] | Settings, **overrides) -> DAT:
    """Create the model of a published configuration.

    The keys "ksizes", "nat_ksizes", "use_lpus" and "log_cpb" and the N, E and X blocks were introduced with DAT++. A
    configuration with none of them is one of DAT v1 as it was released: its model has ``deformable_form="cvpr2022"``. All
    others have "dat_pp".

    Args:
      config: the MODEL.DAT mapping of a published YAML file, or a section of a larger configuration that is being read.
      **overrides: attributes of ``DAT`` that replace the configured ones, such as dtype.

    Returns:
      The model, a linen module.

    Raises:
      ValueError: a key is unknown or its value is not supported; the key is named.
    """
    settings = config if isinstance(config, Settings) else Settings(config)
    values = read_backbone(settings, defaults=_DEFAULTS)
    settings.finish()
    stages = tuple("".join(blocks) for blocks in values["stage_spec"])
    is_later = any(key in settings for key in _LATER_KEYS) or not LATER_STAGE_TYPES.isdisjoint("".join(stages))
    form = "dat_pp" if is_later else "cvpr2022"
    bias = [_position_bias(values, i) for i in range(len(stages))]
    if form == "cvpr2022" and values["use_conv_patches"]:
        reason = f"A configuration without {', '.join(sorted(_LATER_KEYS))} is one of DAT v1 as it was released."
        raise settings.error("use_conv_patches", "expected False for DAT v1 as it was released, got True", reason)
    attributes = dict(
        num_classes=values["num_classes"],
        image_size=values["img_size"],
        dim_stem=values["dim_stem"],
        dims=tuple(values["dims"]),
        stages=stages,
        num_heads=tuple(values["heads"]),
        # Published configurations have -1 for stages without D blocks.
        num_groups=tuple(max(groups, 1) for groups in values["groups"]),
        key_strides=tuple(max(stride, 1) for stride in values["strides"]),
        offset_kernels=tuple(values["ksizes"]),
        offset_range_factors=tuple(values["offset_range_factor"]),
        position_bias=tuple(bias),
        use_offsets=tuple(not off for off in values["no_offs"]),
        deformable_form=form,
        window_sizes=tuple(values["window_sizes"]),
        neighborhood_sizes=tuple(values["nat_ksizes"]),
        reduction_ratios=tuple(values["sr_ratios"]),
        lpu=tuple(values["use_lpus"]),
        conv_mlp=tuple(values["use_dwc_mlps"]),
        layer_scale_init=tuple(values["layer_scale_values"]),
        conv_patches=values["use_conv_patches"],
        expansion=values["expansion"],
        drop_path_rate=values["drop_path_rate"],
    )
    return create_model("dat_pp_tiny", **{**attributes, **overrides})


def _position_bias(config: Mapping[str, Any], stage: int) -> str:
    """Kind of position bias of a stage, as ``DAT.position_bias`` has it."""
    if not config["use_pes"][stage]:
        return "none"
    for key, kind in (("dwc_pes", "dwc"), ("fixed_pes", "fixed"), ("log_cpb", "log_cpb")):
        if config[key][stage]:
            return kind
    return "table"


def from_official(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray], **overrides
) -> tuple[DAT, dict[str, Any]]:
    """Create the model of a published configuration and convert its weights.

    Args:
      config: the MODEL.DAT mapping of a published YAML file.
      state_dict: parameter name -> array, in PyTorch's layouts. Buffers may be missing.
      **overrides: attributes of ``DAT`` that replace the configured ones, such as dtype.

    Returns:
      The model, and its variables {"params": ...} in float32. float64 arrays stay float64 if jax_enable_x64 is on.

    Raises:
      ValueError: a key of the configuration is not supported, or weights do not fit the model. One message names all
        unknown, missing and mis-shaped weights.
    """
    model = model_from_official(config, **overrides)
    return model, {"params": params_from_official(model, state_dict)}


def params_from_official(model: DAT, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Convert published weights to the parameters of a model.

    Args:
      model: model that the weights belong to.
      state_dict: parameter name -> array, in PyTorch's layouts. Buffers may be missing.

    Returns:
      Parameters as nested dictionaries, with the dtypes of ``from_official``.

    Raises:
      ValueError: weights do not fit the model. One message names all unknown, missing and mis-shaped weights.
    """
    return assemble(state_dict, _entries(model), is_ignored=lambda name: is_ignored(name, model))


def assemble(
    state_dict: Mapping[str, np.ndarray], entries: "Entries", *, is_ignored: Callable[[str], bool]
) -> dict[str, Any]:
    """Convert published arrays to nested dictionaries of ours.

    Args:
      state_dict: published name -> array.
      entries: entry of every array of the model.
      is_ignored: published name -> whether the model needs no array for it.

    Returns:
      Arrays by path, float32 or float64.

    Raises:
      ValueError: weights do not fit the model. One message names all unknown, missing and mis-shaped weights.
    """
    expected = {entry.name: entry.official_shape() for entry in entries}
    shapes = {name: tuple(np.shape(state_dict[name])) for name in expected if name in state_dict}
    names_by_problem = {
        "unknown": [name for name in state_dict if name not in expected and not is_ignored(name)],
        "missing": [name for name in expected if name not in state_dict],
        "mis-shaped": [
            f"{name} expected {expected[name]}, got {shape}"
            for name, shape in shapes.items()
            if shape != expected[name]
        ],
        "fixed kernels that differ from their fixed values": [
            name for name, array in state_dict.items() if re.search(_FIXED_KERNELS, name) and not _is_one_hot(array)
        ],
    }
    problems = [f"{len(names)} {problem}: {', '.join(names)}" for problem, names in names_by_problem.items() if names]
    if problems:
        # The counts come first because callers may shorten the message.
        counts = ", ".join(problem.partition(":")[0] for problem in problems)
        raise ValueError(f"The weights do not fit this model ({counts}). {'; '.join(problems)}.")
    flat = {}
    for entry in entries:
        array = np.asarray(state_dict[entry.name])
        array = array if array.dtype == np.float64 else array.astype(np.float32)
        flat[entry.path] = jnp.asarray(entry.transform.to_ours(array))
    return unflatten_dict(flat)


def to_official(model: DAT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert parameters to a state dict with published names and PyTorch's layouts.

    Args:
      model: model that the parameters belong to.
      params: parameters as nested dictionaries, or values of the same structure and shapes, such as gradients.

    Returns:
      Published name -> array, with the dtypes of ``params``. Buffers are not included.
    """
    flat = flatten_dict(params)
    return {entry.name: entry.transform.to_official(np.asarray(flat[entry.path])) for entry in _entries(model)}


def official_shapes(model: DAT) -> dict[str, tuple[int, ...]]:
    """Published name -> published shape, for every parameter of a model."""
    return {entry.name: entry.official_shape() for entry in _entries(model)}


class Transform:
    """A pair of functions that reorder the axes of an array between the published layout and ours."""

    def __init__(self, to_official: Callable, to_ours: Callable):
        self.to_official, self.to_ours = to_official, to_ours


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a model.

    Attributes:
      path: path in our nested dictionaries.
      shape: our shape.
      name: published name.
      transform: conversion between the two layouts.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    name: str
    transform: Transform

    def official_shape(self) -> tuple[int, ...]:
        """Published shape, computed without allocating an array."""
        return self.transform.to_official(np.broadcast_to(np.float32(0), self.shape)).shape


Entries = list[Entry]
IDENTITY = Transform(lambda a: a, lambda a: a)
LINEAR = Transform(lambda a: a.T, lambda a: a.T)  # (in, out) <-> (out, in)
POINTWISE = Transform(lambda a: a.T[:, :, None, None], lambda a: a[:, :, 0, 0].T)  # (in, out) <-> (out, in, 1, 1)
CONV = Transform(
    lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0)
)  # (kh, kw, in, out) <-> (out, in, kh, kw)

# Pattern of our module, published module, and transform of its kernel. i is the stage and j the block; even and odd are 2 j
# and 2 j + 1. None stands for the projections of attentions, which are 1 x 1 convolutions in D and P blocks and linear layers
# in the others.
_MODULES = (
    (r"patch_proj/conv1", "patch_proj.0", CONV),
    (r"patch_proj/norm1", "patch_proj.1.norm", IDENTITY),
    (r"patch_proj/conv2", "patch_proj.3", CONV),
    (r"patch_proj/norm2", "patch_proj.4.norm", IDENTITY),
    (r"down_projs_(?P<i>\d+)/conv", "down_projs.{i}.0", CONV),
    (r"down_projs_(?P<i>\d+)/norm", "down_projs.{i}.1.norm", IDENTITY),
    (r"cls_norm", "cls_norm.norm", IDENTITY),
    (r"cls_head", "cls_head", LINEAR),
    (r"stages_(?P<i>\d+)/proj", "stages.{i}.proj", POINTWISE),
    (r"{block}/lpu", "stages.{i}.local_perception_units.{j}", CONV),
    (r"{block}/norm1", "stages.{i}.layer_norms.{even}.norm", IDENTITY),
    (r"{block}/norm2", "stages.{i}.layer_norms.{odd}.norm", IDENTITY),
    (r"{block}/layer_scale1", "stages.{i}.layer_scales.{even}", IDENTITY),
    (r"{block}/layer_scale2", "stages.{i}.layer_scales.{odd}", IDENTITY),
    (r"{block}/conv", "stages.{i}.attns.{j}", CONV),
    (r"{block}/norm", "stages.{i}.ln_cnvnxt.{j}.norm", IDENTITY),
    (r"{block}/mlp/dwc", "stages.{i}.mlps.{j}.dwc", CONV),
    (r"{block}/attn/(?P<m>q|kv|qkv|proj|proj_q|proj_k|proj_v|proj_qkv|proj_out)", "stages.{i}.attns.{j}.{m}", None),
    (r"{block}/attn/conv_offset_0", "stages.{i}.attns.{j}.conv_offset.0", CONV),
    (r"{block}/attn/conv_offset_1", "stages.{i}.attns.{j}.conv_offset.1.norm", IDENTITY),
    (r"{block}/attn/conv_offset_3", "stages.{i}.attns.{j}.conv_offset.3", POINTWISE),
    (r"{block}/attn/rpe_table", "stages.{i}.attns.{j}.rpe_table", CONV),
    (r"{block}/attn/rpe_table_(?P<m>0|2)", "stages.{i}.attns.{j}.rpe_table.{m}", LINEAR),
    (r"{block}/attn/proj_ds_0", "stages.{i}.attns.{j}.proj_ds.0", CONV),
    (r"{block}/attn/proj_ds_1", "stages.{i}.attns.{j}.proj_ds.1.norm", IDENTITY),
)
_BLOCK = r"stages_(?P<i>\d+)/blocks_(?P<j>\d+)"
# Our parameters that are not the kernel, scale or bias of a module -> published name in the attention, and transform.
_TABLES = {
    "rpe_table": ("rpe_table", IDENTITY),
    "rpb": ("rpb", IDENTITY),
    "relative_position_bias_table": ("relative_position_bias_table", IDENTITY),
    "dep_conv_bias": ("dep_conv.bias", IDENTITY),
    "dep_conv1_bias": ("dep_conv1.bias", IDENTITY),
    "dep_conv1_kernel": ("dep_conv1.weight", CONV),
}
_BUFFERS = r".*\.(relative_position_index|attn_mask|q_grid|reference)"
_FIXED_KERNELS = r"^(backbone\.)?stages\.\d+\.attns\.\d+\.dep_conv\.weight$"


def _entries(model: DAT) -> Entries:
    """Entries of all parameters of a model, in a fixed order."""
    return [Entry(path, shape, *name_parameter(path, model)) for path, shape in _param_shapes(model).items()]  # pyright: ignore[reportArgumentType] (Flax makes modules hashable)


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds
def _param_shapes(model: DAT) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every parameter."""
    images = jax.ShapeDtypeStruct((1, 64, 64, model.in_channels), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return {path: leaf.shape for path, leaf in sorted(flatten_dict(params).items())}


def name_parameter(path: tuple[str, ...], model: DAT) -> tuple[str, Transform]:
    """Published name and transform of a parameter.

    Args:
      path: path of the parameter in the nested dictionaries of ``DAT``.
      model: the model, whose attributes decide between layouts.

    Raises:
      KeyError: the module is not in ``_MODULES``.
    """
    *module, leaf = path
    module = "/".join(module)
    if leaf in _TABLES and (match := re.fullmatch(f"{_BLOCK}/attn", module)):
        name, transform = _TABLES[leaf]
        return f"stages.{match['i']}.attns.{match['j']}.{name}", transform
    if match := re.fullmatch(f"{_BLOCK}/mlp/(?P<m>linear[12])", module):
        i, j, m = match.group("i", "j", "m")
        if model.conv_mlp[int(i)]:
            name, transform = f"stages.{i}.mlps.{j}.{m}.0", POINTWISE
        else:
            name, transform = f"stages.{i}.mlps.{j}.chunk.{m}", LINEAR
    else:
        name, transform = _name_module(module, model)
    suffix = "bias" if leaf == "bias" else "weight"
    return f"{name}.{suffix}", transform if leaf == "kernel" else IDENTITY


def _name_module(module: str, model: DAT) -> tuple[str, Transform]:
    """Published name of a module other than the layers of an MLP, and the transform of its kernel."""
    for pattern, template, transform in _MODULES:
        if match := re.fullmatch(pattern.replace("{block}", _BLOCK), module):
            groups = match.groupdict()
            block = int(groups.get("j") or 0)
            name = template.format(**{"even": 2 * block, "odd": 2 * block + 1, **groups})
            if transform is None:
                transform = POINTWISE if model.stages[int(groups["i"])][block] in "DP" else LINEAR
            return name, transform
    raise KeyError(f"No published name for the module {module}.")  # the tests check that the table is complete


def is_ignored(name: str, model: DAT) -> bool:
    """Whether a model needs no array for a published name: a buffer, a fixed kernel, or a parameter that is never used."""
    if re.fullmatch(_BUFFERS, name) or re.search(_FIXED_KERNELS, name):
        return True
    if match := re.fullmatch(r"stages\.(\d+)\.attns\.(\d+)\.conv_offset\..*", name):
        # D blocks without offsets do not use it.
        i, j = map(int, match.groups())
        return i < len(model.stages) and model.stages[i][j : j + 1] == "D" and not model.use_offsets[i]
    if match := re.fullmatch(r"stages\.(\d+)\.layer_scales\.(\d+)\.weight", name):
        # X blocks do not use it.
        i, j = int(match[1]), int(match[2]) // 2
        return i < len(model.stages) and model.stages[i][j : j + 1] == "X"
    return False


def _is_one_hot(kernel: np.ndarray) -> bool:
    """Whether the fixed kernel of slide attention, (9 D, 1, 3, 3), selects tap j in channel c * 9 + j."""
    kernel = np.asarray(kernel, np.float32)
    fixed = np.tile(np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3), (kernel.shape[0] // 9, 1, 1, 1))
    return np.array_equal(kernel, fixed)
