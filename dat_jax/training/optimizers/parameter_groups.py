"""Which parameters learn, and how fast: frozen parameters, and factors of the learning rate.

Names of parameters are such as "stages_2/blocks_3/mlp/linear1/kernel". In a segmentor or detector, those of the backbone begin
with "backbone/".
"""

import dataclasses
import fnmatch
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from dat_jax.errors import UserError
from dat_jax.models.lora import GROUP
from dat_jax.training.optimizers.weight_decay import DECAY_RULES

_ADAPTERS = f"{GROUP}/"
_BACKBONE = "backbone/"
_HEAD_OF_CLASSIFIER = ("cls_norm", "cls_head")
_OFFSETS = "/conv_offset_"  # part of the names of the networks that compute the offsets of keys
_STAGES = re.compile(r"stages\.(\d+)(?:-(\d+))?")


@dataclasses.dataclass(frozen=True)
class ParameterGroups:
    """Trees with the structure of the parameters.

    Attributes:
      frozen: True for the parameters that do not learn.
      factors: factor of the learning rate of each parameter that learns; None for the others.
      decays: True for the parameters with weight decay; None for those that do not learn.
    """

    frozen: Any
    factors: Any
    decays: Any


def find_groups(params: Any, config: ConfigDict) -> ParameterGroups:
    """Find the groups that a configuration describes.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      config: the group ``optimizer`` of a configuration.

    Raises:
      UserError: see ``find_frozen``.
    """
    frozen = find_frozen(params, (*config.freeze, "all_but_head") if GROUP in params else config.freeze)
    factors = find_factors(
        params,
        layer_decay=config.layer_decay,
        backbone_factor=config.backbone_factor,
        offset_factor=config.offset_factor,
    )
    decays = DECAY_RULES[config.decay_rule](params)
    if not config.decay_offsets:
        decays = jax.tree.map(lambda name, decays: decays and _OFFSETS not in name, name_parameters(params), decays)
    return ParameterGroups(frozen, select(factors, frozen), select(decays, frozen))


def name_parameters(params: Any) -> Any:
    """The name of each parameter, in a tree of their structure."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), params)


def find_frozen(params: Any, patterns: Sequence[str]) -> Any:
    """True for the parameters that do not learn.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      patterns: any of "backbone" (all but the head and adapters), "all_but_head" (the same), "stages.I" and "stages.I-J" (the
        stages I to J, from 0, with the stem or down-projection before each), and patterns of names, in which * stands for any
        characters: "stages_0/*", "*/conv_offset_*".

    Raises:
      UserError: a pattern matches no parameter, or no parameter is left.
    """
    names = name_parameters(params)
    every = jax.tree.leaves(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in every if _matches(name, pattern, every)}
        if not matched:
            starts = ", ".join(sorted({name.split("/")[0] for name in every}))
            raise UserError(
                f"config.optimizer.freeze: {pattern!r} matches no parameter. Expected backbone, all_but_head, stages.0-1, or a "
                f"pattern of names such as */conv_offset_*. The names begin with {starts}."
            )
        frozen |= matched
    if len(frozen) == len(every):
        raise UserError(f"config.optimizer.freeze {tuple(patterns)!r} leaves no parameter that could learn.")
    return jax.tree.map(lambda name: name in frozen, names)


def find_layers(params: Any) -> tuple[Any, int]:
    """The layer of each parameter, for layer-wise decay of the learning rate, and the number of the last layer.

    The stem is layer 0, the blocks are 1 to N in their order, and the head and the norms of outputs are N + 1. A down-projection
    belongs to the layer of the block after it. Source: BEiT (2106.08254) and timm, where a layer is a block too.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
    """
    names = name_parameters(params)
    every = jax.tree.leaves(names)
    blocks = {match[0] for name in every if (match := re.search(r"stages_(\d+)/blocks_\d+/", name))}
    depths = Counter(int(re.findall(r"\d+", block)[0]) for block in blocks)
    last = sum(depths.values()) + 1

    def find(name):
        stage = _find_stage(name, every)
        if stage is None:
            return last
        if "patch_proj/" in name:
            return 0
        block = re.search(r"/blocks_(\d+)/", name)
        return 1 + sum(depths[before] for before in range(stage)) + (int(block[1]) if block else 0)

    return jax.tree.map(find, names), last


def find_factors(params: Any, *, layer_decay: float, backbone_factor: float, offset_factor: float) -> Any:
    """The factor of the learning rate of each parameter.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      layer_decay: a parameter of layer i has the factor layer_decay ** (last - i), see ``find_layers``.
      backbone_factor: further factor of all parameters but those of the head.
      offset_factor: further factor of the networks that compute the offsets of keys.
    """
    names = name_parameters(params)
    every = jax.tree.leaves(names)
    layers, last = find_layers(params)

    def find(name, layer):
        factor = layer_decay ** (last - layer)
        factor *= 1.0 if _is_head(name, every) else backbone_factor
        return factor * (offset_factor if _OFFSETS in name else 1.0)

    return jax.tree.map(find, names, layers)


def scale_updates(optimizer: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """The optimizer, with the update of each parameter multiplied by its factor. Its state has the same structure."""

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(optimizer.init, update)


def select(params: Any, frozen: Any) -> Any:
    """The parameters that learn; None, which is no leaf of a tree, replaces the frozen ones."""
    return jax.tree.map(lambda leaf, is_frozen: None if is_frozen else leaf, params, frozen)


def without_frozen(params: Any, frozen: Any) -> Any:
    """The nested dictionaries of parameters with only those that learn."""
    learned = {path: leaf for path, leaf in flatten_dict(select(params, frozen)).items() if leaf is not None}
    return unflatten_dict(learned)


def merge(learned: Any, params: Any) -> Any:
    """``params`` with the values of ``learned`` where it has any, see ``select``."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, learned, params, is_leaf=lambda leaf: leaf is None
    )


def describe_groups(params: Any, groups: ParameterGroups, *, peak_rate: float) -> dict[str, str]:
    """Rows of a table of the groups: which parameters, how many, whether they decay, and their peak learning rate.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      groups: see ``find_groups``.
      peak_rate: largest learning rate of the schedule.

    Returns:
      A row for all frozen parameters, and one for each learning rate, the lowest first.
    """
    members: dict[float, list[tuple[str, int, bool]]] = {}
    trees = (name_parameters(params), params, groups.factors, groups.decays)
    for name, leaf, factor, decays in zip(
        *(jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in trees), strict=True
    ):
        members.setdefault(factor or 0.0, []).append((name, math.prod(leaf.shape), bool(decays)))
    rows = {}
    for factor, group in sorted(members.items()):
        text = f"{sum(size for _, size, _ in group):,} parameters"
        if factor == 0:
            text += ", frozen"
        else:
            text += f", {sum(size for _, size, decays in group if decays):,} with weight decay"
            text += f", peak learning rate {peak_rate * factor:.3g}"
        rows[_list_modules(name for name, _, _ in group)] = text
    return rows


def _matches(name: str, pattern: str, every: Sequence[str]) -> bool:
    if pattern in ("backbone", "all_but_head"):
        return not name.startswith(_ADAPTERS) and not _is_head(name, every)
    stages = _STAGES.fullmatch(pattern)
    if stages is None:
        return fnmatch.fnmatchcase(name, pattern)
    first, last = int(stages[1]), int(stages[2] or stages[1])
    stage = _find_stage(name, every)
    return stage is not None and first <= stage <= last


def _is_head(name: str, every: Sequence[str]) -> bool:
    if any(other.startswith(_BACKBONE) for other in every):
        return not name.removeprefix(_ADAPTERS).startswith(_BACKBONE)
    return name.split("/")[0] in _HEAD_OF_CLASSIFIER


def _find_stage(name: str, every: Sequence[str]) -> int | None:
    """The stage that a parameter belongs to, from 0; None for the head and the norms of the backbone's outputs."""
    if _is_head(name, every):
        return None
    match = re.match(r"(?:lora/)?(?:backbone/)?(?:dat/)?(patch_proj|(stages|down_projs)_(\d+))/", name)
    if match is None:
        return None
    return {"stages": 0, "down_projs": 1}[match[2]] + int(match[3]) if match[2] else 0


def _list_modules(names: Iterable[str]) -> str:
    """The modules of parameters, such as "stages_2/blocks_0-5, down_projs_1"; whole stages without their blocks."""
    modules: dict[str, set[int]] = {}
    for name in names:
        adapters = _ADAPTERS if name.startswith(_ADAPTERS) else ""
        name = name.removeprefix(adapters).removeprefix(_BACKBONE).removeprefix("dat/")
        module = adapters + "/".join(name.split("/")[: 2 if name.startswith("stages_") else 1])
        stem, _, index = module.rpartition("_")
        stem, index = (stem, int(index)) if index.isdigit() else (module, -1)
        modules.setdefault(stem, set()).add(index)
    return ", ".join(_format_indices(stem, sorted(indices)) for stem, indices in modules.items())


def _format_indices(stem: str, indices: Sequence[int]) -> str:
    if indices == [-1]:
        return stem
    first, last = indices[0], indices[-1]
    if len(indices) == last - first + 1:
        return f"{stem}_{first}" if first == last else f"{stem}_{first}-{last}"
    return f"{stem}_" + "+".join(map(str, indices))
