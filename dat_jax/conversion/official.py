"""Published DAT configurations and weights to ours, and weights back.

A published weight and ours hold the same numbers; names and axis orders differ. Both are tables below.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from dat_jax.conversion.backbone_settings import read_backbone
from dat_jax.conversion.settings import Settings
from dat_jax.models.dat import DAT, LATER_STAGE_TYPES
from dat_jax.models.registry import create_model

# Defaults of the published constructor, for keys that a configuration leaves out.
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
# Keys that came with DAT++. The configurations of DAT v1 as it was released have none of them.
_LATER_KEYS = {"ksizes", "nat_ksizes", "use_lpus", "log_cpb"}


def model_from_official(config: Mapping[str, Any] | Settings, **overrides) -> DAT:
    """The model of a published configuration.

    The keys "ksizes", "nat_ksizes", "use_lpus" and "log_cpb" and the N, E and X blocks came with DAT++. A configuration with
    none of them is one of DAT v1 as it was released: its model has ``deformable_form="cvpr2022"``. Any other has "dat_pp".

    Args:
      config: the MODEL.DAT mapping of a published YAML file, or a section of a larger configuration that is being read.
      **overrides: attributes of ``DAT`` that replace the configured ones, such as dtype.

    Raises:
      ValueError: names the key that is unknown or whose value is not supported.
    """
    settings = config if isinstance(config, Settings) else Settings(config)
    c = read_backbone(settings, defaults=_DEFAULTS)
    settings.finish()
    stages = tuple("".join(kinds) for kinds in c["stage_spec"])
    is_later = any(key in settings for key in _LATER_KEYS) or not LATER_STAGE_TYPES.isdisjoint("".join(stages))
    form = "dat_pp" if is_later else "cvpr2022"
    bias = [_position_bias(c, i) for i in range(len(stages))]
    if form == "cvpr2022" and c["use_conv_patches"]:
        note = f"A configuration without {', '.join(sorted(_LATER_KEYS))} is one of DAT v1 as it was released."
        raise settings.error("use_conv_patches", "expected False for DAT v1 as it was released, got True", note)
    attributes = dict(
        num_classes=c["num_classes"],
        image_size=c["img_size"],
        dim_stem=c["dim_stem"],
        dims=tuple(c["dims"]),
        stages=stages,
        num_heads=tuple(c["heads"]),
        # Stages without D blocks have -1 here.
        num_groups=tuple(max(groups, 1) for groups in c["groups"]),
        key_strides=tuple(max(stride, 1) for stride in c["strides"]),
        offset_kernels=tuple(c["ksizes"]),
        offset_range_factors=tuple(c["offset_range_factor"]),
        position_bias=tuple(bias),
        use_offsets=tuple(not off for off in c["no_offs"]),
        deformable_form=form,
        window_sizes=tuple(c["window_sizes"]),
        neighborhood_sizes=tuple(c["nat_ksizes"]),
        reduction_ratios=tuple(c["sr_ratios"]),
        lpu=tuple(c["use_lpus"]),
        conv_mlp=tuple(c["use_dwc_mlps"]),
        layer_scale_init=tuple(c["layer_scale_values"]),
        conv_patches=c["use_conv_patches"],
        expansion=c["expansion"],
        drop_path_rate=c["drop_path_rate"],
    )
    return create_model("dat_pp_tiny", **{**attributes, **overrides})


def _position_bias(config, stage):
    if not config["use_pes"][stage]:
        return "none"
    for key, kind in (("dwc_pes", "dwc"), ("fixed_pes", "fixed"), ("log_cpb", "log_cpb")):
        if config[key][stage]:
            return kind
    return "table"


def from_official(
    config: Mapping[str, Any], state_dict: Mapping[str, np.ndarray], **overrides
) -> tuple[DAT, dict[str, Any]]:
    """A published model and its weights as ours.

    Args:
      config: the MODEL.DAT mapping of a published YAML file.
      state_dict: parameter name -> array, in PyTorch's layouts. Buffers may be left out.
      **overrides: attributes of ``DAT``, such as dtype.

    Returns:
      The model, and variables {"params": ...} of float32 (float64 where the state dict has it and jax_enable_x64 is on).

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """
    model = model_from_official(config, **overrides)
    return model, {"params": params_from_official(model, state_dict)}


def params_from_official(model: DAT, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published weights as the parameters of a model; see ``from_official``."""
    return assemble(state_dict, _entries(model), is_ignored=lambda name: is_ignored(name, model))


def assemble(
    state_dict: Mapping[str, np.ndarray], entries: "Entries", *, is_ignored: Callable[[str], bool]
) -> dict[str, Any]:
    """Published arrays as nested dictionaries of ours.

    Args:
      state_dict: name -> array.
      entries: of every array of ours.
      is_ignored: whether a published name has no part in the function.

    Raises:
      ValueError: names every unknown, missing and mis-shaped weight at once.
    """
    wanted = {entry.name: entry.official_shape() for entry in entries}
    unknown = [name for name in state_dict if name not in wanted and not is_ignored(name)]
    missing = [name for name in wanted if name not in state_dict]
    shapes = {name: tuple(np.shape(state_dict[name])) for name in wanted if name in state_dict}
    mis_shaped = [f"{name} {shapes[name]}, wanted {wanted[name]}" for name in shapes if shapes[name] != wanted[name]]
    frozen = [name for name in state_dict if re.search(_FROZEN, name) and not _is_one_hot(state_dict[name])]
    problems = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (
            ("unknown", unknown),
            ("missing", missing),
            ("mis-shaped", mis_shaped),
            ("fixed kernels with other than their fixed values", frozen),
        )
        if names
    ]
    if problems:
        # The counts come first, as callers may shorten the lists.
        counts = ", ".join(problem.partition(":")[0] for problem in problems)
        raise ValueError(f"These weights are not of this model ({counts}). {'; '.join(problems)}.")
    flat = {}
    for entry in entries:
        array = np.asarray(state_dict[entry.name])
        array = array if array.dtype == np.float64 else array.astype(np.float32)
        flat[entry.path] = jnp.asarray(entry.transform.to_ours(array))
    return flax.traverse_util.unflatten_dict(flat)


def to_official(model: DAT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters, or anything of their structure such as gradients, with published names and layouts."""
    flat = flax.traverse_util.flatten_dict(params)
    return {entry.name: entry.transform.to_official(np.asarray(flat[entry.path])) for entry in _entries(model)}


def official_shapes(model: DAT) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every parameter of the model."""
    return {entry.name: entry.official_shape() for entry in _entries(model)}


class Transform:
    """Between the published axis order of an array and ours."""

    def __init__(self, to_official: Callable, to_ours: Callable):
        self.to_official, self.to_ours = to_official, to_ours


@dataclasses.dataclass(frozen=True)
class Entry:
    """An array: where we have it, its shape there, its published name, and how axes are ordered."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    name: str
    transform: Transform

    def official_shape(self) -> tuple[int, ...]:
        """Without an array in memory."""
        return self.transform.to_official(np.broadcast_to(np.float32(0), self.shape)).shape


Entries = list[Entry]
SAME = Transform(lambda a: a, lambda a: a)
LINEAR = Transform(lambda a: a.T, lambda a: a.T)  # (in, out) <-> (out, in)
POINTWISE = Transform(lambda a: a.T[:, :, None, None], lambda a: a[:, :, 0, 0].T)  # <-> (out, in, 1, 1)
CONV = Transform(lambda a: a.transpose(3, 2, 0, 1), lambda a: a.transpose(2, 3, 1, 0))  # <-> (out, in, kh, kw)

# Our module -> the published one, i the stage, j the block. Without a transform: the projections of an attention, which
# are 1 x 1 convolutions in D and P blocks and linear elsewhere.
_MODULES = (
    (r"patch_proj/conv1", "patch_proj.0", CONV),
    (r"patch_proj/norm1", "patch_proj.1.norm", SAME),
    (r"patch_proj/conv2", "patch_proj.3", CONV),
    (r"patch_proj/norm2", "patch_proj.4.norm", SAME),
    (r"down_projs_(?P<i>\d+)/conv", "down_projs.{i}.0", CONV),
    (r"down_projs_(?P<i>\d+)/norm", "down_projs.{i}.1.norm", SAME),
    (r"cls_norm", "cls_norm.norm", SAME),
    (r"cls_head", "cls_head", LINEAR),
    (r"stages_(?P<i>\d+)/proj", "stages.{i}.proj", POINTWISE),
    (r"{block}/lpu", "stages.{i}.local_perception_units.{j}", CONV),
    (r"{block}/norm1", "stages.{i}.layer_norms.{even}.norm", SAME),
    (r"{block}/norm2", "stages.{i}.layer_norms.{odd}.norm", SAME),
    (r"{block}/layer_scale1", "stages.{i}.layer_scales.{even}", SAME),
    (r"{block}/layer_scale2", "stages.{i}.layer_scales.{odd}", SAME),
    (r"{block}/conv", "stages.{i}.attns.{j}", CONV),
    (r"{block}/norm", "stages.{i}.ln_cnvnxt.{j}.norm", SAME),
    (r"{block}/mlp/dwc", "stages.{i}.mlps.{j}.dwc", CONV),
    (r"{block}/attn/(?P<m>q|kv|qkv|proj|proj_q|proj_k|proj_v|proj_qkv|proj_out)", "stages.{i}.attns.{j}.{m}", None),
    (r"{block}/attn/conv_offset_0", "stages.{i}.attns.{j}.conv_offset.0", CONV),
    (r"{block}/attn/conv_offset_1", "stages.{i}.attns.{j}.conv_offset.1.norm", SAME),
    (r"{block}/attn/conv_offset_3", "stages.{i}.attns.{j}.conv_offset.3", POINTWISE),
    (r"{block}/attn/rpe_table", "stages.{i}.attns.{j}.rpe_table", CONV),
    (r"{block}/attn/rpe_table_(?P<m>0|2)", "stages.{i}.attns.{j}.rpe_table.{m}", LINEAR),
    (r"{block}/attn/proj_ds_0", "stages.{i}.attns.{j}.proj_ds.0", CONV),
    (r"{block}/attn/proj_ds_1", "stages.{i}.attns.{j}.proj_ds.1.norm", SAME),
)
_BLOCK = r"stages_(?P<i>\d+)/blocks_(?P<j>\d+)"
# Parameters that are no module's kernel, scale or bias.
_TABLES = {
    "rpe_table": ("rpe_table", SAME),
    "rpb": ("rpb", SAME),
    "relative_position_bias_table": ("relative_position_bias_table", SAME),
    "dep_conv_bias": ("dep_conv.bias", SAME),
    "dep_conv1_bias": ("dep_conv1.bias", SAME),
    "dep_conv1_kernel": ("dep_conv1.weight", CONV),
}
_BUFFERS = r".*\.(relative_position_index|attn_mask|q_grid|reference)"
_FROZEN = r"^(backbone\.)?stages\.\d+\.attns\.\d+\.dep_conv\.weight$"


def _entries(model: DAT) -> Entries:
    """Of every parameter, in one fixed order."""
    return [Entry(path, shape, *published(path, model)) for path, shape in _param_shapes(model).items()]


@functools.lru_cache(maxsize=8)  # tracing a large model takes seconds, and every table here is made from it
def _param_shapes(model: DAT) -> dict[tuple[str, ...], tuple[int, ...]]:
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return {path: leaf.shape for path, leaf in sorted(flax.traverse_util.flatten_dict(params).items())}


def published(path: tuple[str, ...], model: DAT) -> tuple[str, Transform]:
    """The published name of a parameter of DAT, and how its axes are ordered."""
    *module, leaf = path
    module = "/".join(module)
    if leaf in _TABLES:
        name, transform = _TABLES[leaf]
        i, j = re.fullmatch(f"{_BLOCK}/attn", module).group("i", "j")
        return f"stages.{i}.attns.{j}.{name}", transform
    if match := re.fullmatch(f"{_BLOCK}/mlp/(?P<m>linear[12])", module):
        i, j, m = match.group("i", "j", "m")
        if model.conv_mlp[int(i)]:
            name, transform = f"stages.{i}.mlps.{j}.{m}.0", POINTWISE
        else:
            name, transform = f"stages.{i}.mlps.{j}.chunk.{m}", LINEAR
    else:
        name, transform = _published_module(module, model)
    suffix = "bias" if leaf == "bias" else "weight"
    return f"{name}.{suffix}", transform if leaf == "kernel" else SAME


def _published_module(module: str, model: DAT) -> tuple[str, Transform]:
    for pattern, template, transform in _MODULES:
        if match := re.fullmatch(pattern.replace("{block}", _BLOCK), module):
            groups = match.groupdict()
            block = int(groups.get("j") or 0)
            name = template.format(**{"even": 2 * block, "odd": 2 * block + 1, **groups})
            if transform is None:
                transform = POINTWISE if model.stages[int(groups["i"])][block] in "DP" else LINEAR
            return name, transform
    raise KeyError(f"No published name for the module {module}.")  # a gap of the table, caught by the tests


def is_ignored(name: str, model: DAT) -> bool:
    """Whether a published entry has no part in the function: buffers, fixed kernels, parameters that are never used."""
    if re.fullmatch(_BUFFERS, name) or re.search(_FROZEN, name):
        return True
    if match := re.fullmatch(r"stages\.(\d+)\.attns\.(\d+)\.conv_offset\..*", name):  # of blocks without offsets
        i, j = map(int, match.groups())
        return i < len(model.stages) and model.stages[i][j : j + 1] == "D" and not model.use_offsets[i]
    if match := re.fullmatch(r"stages\.(\d+)\.layer_scales\.(\d+)\.weight", name):  # of X blocks
        i, j = int(match[1]), int(match[2]) // 2
        return i < len(model.stages) and model.stages[i][j : j + 1] == "X"
    return False


def _is_one_hot(kernel) -> bool:
    """Whether a slide attention's fixed kernel (9 D, 1, 3, 3) takes tap j in channel c * 9 + j."""
    kernel = np.asarray(kernel, np.float32)
    fixed = np.tile(np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3), (kernel.shape[0] // 9, 1, 1, 1))
    return np.array_equal(kernel, fixed)
