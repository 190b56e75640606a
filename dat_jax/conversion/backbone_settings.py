"""Settings of a published backbone: the values that each key may have, and the keys that have no effect."""

from collections.abc import Mapping
from typing import Any

from dat_jax.conversion import settings as kinds
from dat_jax.conversion.settings import Kind, Settings, list_of
from dat_jax.models.dat import STAGE_TYPES

_UNUSED_BLOCK = "it belongs to a kind of block that no published model contains"
_UNUSED = "the published code accepts it and does not use it"
# Key -> reason why it has no effect on the model.
IGNORED = {
    "heads_q": _UNUSED_BLOCK,
    "nqs": _UNUSED_BLOCK,
    "ns_per_pts": _UNUSED_BLOCK,
    "ksize_qnas": _UNUSED_BLOCK,
    "qna_activation": _UNUSED_BLOCK,
    "local_orf": _UNUSED_BLOCK,
    "local_kv_sizes": _UNUSED_BLOCK,
    "deform_groups": _UNUSED_BLOCK,
    "offset_pes": _UNUSED,
    "lower_lr_kvs": "it selects learning rates, which are set in the training configuration",
}
_NOT_PUBLISHED = "Every published model has patch_size 4, no dropout other than drop path, and no use_cmt_mlps."
# Key -> the one supported value, which is also the default.
FIXED = {"patch_size": 4, "drop_rate": 0, "attn_drop_rate": 0}
_FIXED_PER_STAGE = {"use_cmt_mlps": False}
CHECKED = (*FIXED, *_FIXED_PER_STAGE)
_VALUES: dict[str, Kind] = {
    "img_size": kinds.COUNT,
    "num_classes": kinds.COUNT,
    "expansion": kinds.COUNT,
    "dim_stem": kinds.COUNT,
    "drop_path_rate": kinds.RATE_BELOW_ONE,
    "use_conv_patches": kinds.FLAG,
}
_VALUES_PER_STAGE: dict[str, Kind] = {
    "dims": kinds.COUNT,
    "heads": kinds.COUNT,
    "window_sizes": kinds.COUNT,
    "strides": kinds.COUNT_OR_NONE,
    "offset_range_factor": kinds.NUMBER,
    "groups": kinds.COUNT_OR_NONE,
    "use_pes": kinds.FLAG,
    "dwc_pes": kinds.FLAG,
    "sr_ratios": kinds.COUNT_OR_NONE,
    "fixed_pes": kinds.FLAG,
    "no_offs": kinds.FLAG,
    "use_dwc_mlps": kinds.FLAG,
    "ksizes": kinds.COUNT,
    "nat_ksizes": kinds.COUNT,
    "layer_scale_values": kinds.NUMBER,
    "use_lpus": kinds.FLAG,
    "log_cpb": kinds.FLAG,
}
_MAX_STAGES, _MAX_BLOCKS = 64, 1000  # blocks per stage
_POSITIVE_WITH_D = ("groups", "strides")  # the published code cannot build D blocks with -1
_POSITION_TABLES = ("dwc_pes", "fixed_pes", "log_cpb")  # each replaces the plain table of use_pes


def read_backbone(settings: Settings, *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read the settings of a published backbone.

    Args:
      settings: settings of the backbone. Keys that only segmentors and detectors have are read before.
      defaults: defaults of the published constructor.

    Returns:
      Value of every key that the model depends on.

    Raises:
      ValueError: a value is of the wrong kind, is not in any published configuration, or contradicts another one.
    """
    settings.ignore_all(IGNORED)
    for key, value in FIXED.items():
        settings.check(key, value, default=value, reason=_NOT_PUBLISHED)
    block = Kind("the name of a kind of block", lambda value: isinstance(value, str))
    blocks = list_of(list_of(block, longest=_MAX_BLOCKS), longest=_MAX_STAGES)
    stages = settings.take("stage_spec", blocks, default=defaults["stage_spec"])
    for kind in (kind for stage in stages for kind in stage):
        if kind not in STAGE_TYPES:
            known = ", ".join(f"{name} ({description})" for name, description in STAGE_TYPES.items())
            raise ValueError(
                f"{settings.path_of('stage_spec')}: unknown block type {kinds.short(kind)}; expected some of {known}."
            )
    count = len(stages)
    for key, value in _FIXED_PER_STAGE.items():
        settings.check(key, (value,) * count, default=(value,) * count, reason=_NOT_PUBLISHED)
    config = {key: settings.take(key, kind, default=defaults[key]) for key, kind in _VALUES.items()}
    for key, kind in _VALUES_PER_STAGE.items():
        config[key] = settings.take(key, list_of(kind, length=count), default=defaults[key])
    depths = tuple(map(len, stages))
    reason = f"Other depths do not count the blocks of {settings.path_of('stage_spec')}."
    settings.check("depths", depths, default=defaults["depths"], reason=reason)
    _check_deformable_stages(settings, config, stages, defaults)
    _check_position_tables(settings, config)
    return {**config, "stage_spec": stages}


def _check_deformable_stages(
    settings: Settings, config: Mapping[str, Any], stages: tuple[tuple[str, ...], ...], defaults: Mapping[str, Any]
) -> None:
    """Refuse -1, which the published files have for stages without D blocks, in stages with D blocks."""
    for key in _POSITIVE_WITH_D:
        for stage, (value, blocks) in enumerate(zip(config[key], stages, strict=True)):
            if value < 1 and "D" in blocks:
                missing = "" if key in settings else f" (from the default {list(defaults[key])}, as the key is missing)"
                raise settings.error(
                    key, f"expected a positive integer for stage {stage}, which has D blocks, got {value}{missing}"
                )


def _check_position_tables(settings: Settings, config: Mapping[str, Any]) -> None:
    """Refuse position tables that the published code would silently ignore."""
    for stage, used in enumerate(config["use_pes"]):
        enabled = [key for key in _POSITION_TABLES if config[key][stage]]
        if enabled and not used:
            switch = settings.path_of("use_pes")
            raise settings.error(enabled[0], f"expected False for stage {stage}, where {switch} is False, got True")
        if len(enabled) > 1:
            others = " and ".join(map(settings.path_of, enabled[1:]))
            raise settings.error(enabled[0], f"expected False for stage {stage}, where {others} is True, got True")
