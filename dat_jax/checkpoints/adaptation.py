"""Trained arrays made to fit another model: other sizes of images and windows, other classes, a network around the backbone."""

import collections
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import flax
import numpy as np

from dat_jax.errors import UserError

_HEAD = "cls_head"
_BACKBONE = "backbone/dat/"  # of a segmentor's or a detector's parameters: those of its DAT
# Layers whose width goes by the number of classes.
_OF_CLASSES = r"(.*/)?(cls_head|conv_seg|retina_cls|fc_cls|fc_reg|conv_logits)/(kernel|bias)"


def adapt_params(
    params: Mapping[str, Any],
    *,
    abstract_params: Mapping[str, Any],
    head_rows: np.ndarray | None = None,
    fixed_stages: Collection[int] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Parameters made to fit a model of another image size, window size or class count.

    Position tables (``rpe_table`` of the kind "table", and ``relative_position_bias_table`` of windows) are resized
    bicubically, each head by itself. A head of another class count is taken from ``abstract_params``, or picks rows of
    the given one. Dtypes become those of ``abstract_params``.

    Args:
      params: nested dictionaries of arrays.
      abstract_params: what is wanted: initialised arrays, or ShapeDtypeStructs.
      head_rows: int (K,): class i of the new head is class head_rows[i] of the given one, such as the ImageNet-1k
        classes among those of ImageNet-22k.
      fixed_stages: whose ``rpe_table`` is of the kind "fixed", a number for each query and key, which is not resized.

    Returns:
      Nested dictionaries with the structure of ``abstract_params``: numpy arrays, but the head is that of
      ``abstract_params`` where it is not taken over. And sentences that say what was adapted.

    Raises:
      UserError: names every parameter that differs in another way; or the rows do not fit the heads.

    Source: the published code for fine-tuning.
    """
    given, wanted = _flatten(params), _flatten(abstract_params)
    classes, wanted_classes = count_classes(params), count_classes(abstract_params)
    notes = []
    if head_rows is not None:
        given |= _pick_rows(params[_HEAD], np.asarray(head_rows), wanted_classes)
        notes.append(f"The head takes {wanted_classes} of the {classes} classes of the loaded one.")
    elif classes != wanted_classes:
        notes.append(f"The head of {wanted_classes} classes is new: the loaded one has {classes}.")
    adapted, more = _adapt(given, wanted, fixed_stages)
    return _unflatten(adapted), notes + more


def adapt_dense(
    variables: Mapping[str, Any], *, abstract_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """``adapt_params`` for the variables of a segmentor or a detector, "params" and, where it has BatchNorm, "batch_stats"."""
    classes, wanted_classes = (count_classes(tree["params"]) for tree in (variables, abstract_variables))
    adapted, notes = {}, []
    if classes != wanted_classes:
        notes.append(f"The layers of {wanted_classes} classes are new: the loaded ones have {classes}.")
    for name, wanted in abstract_variables.items():
        arrays, more = _adapt(_flatten(variables.get(name, {})), _flatten(wanted), fixed_stages)
        adapted[name] = _unflatten(arrays)
        notes += more
    return adapted, notes


def adapt_backbone(
    params: Mapping[str, Any], *, fresh_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Variables with a classifier's parameters in the backbone, as ``adapt_params`` fits them; the rest stays.

    Of a segmentor or a detector.
    """
    given = {f"{_BACKBONE}{name}": array for name, array in _flatten(params).items() if not name.startswith("cls_")}
    fresh = _flatten(fresh_variables["params"])
    wanted = {name: leaf for name, leaf in fresh.items() if name.startswith(_BACKBONE)}
    adapted, notes = _adapt(given, wanted, fixed_stages)
    notes = ["The backbone is that of a classifier; norms of its maps, and heads, are new.", *notes]
    return {**fresh_variables, "params": _unflatten({**fresh, **adapted})}, notes


def count_classes(params: Mapping[str, Any]) -> int:
    """Of a classifier, a segmentor or a detector (without background), as its arrays' shapes have it.

    Raises:
      UserError: the parameters are of nothing of the kind.
    """
    layers = {name.removesuffix("/kernel"): leaf.shape[-1] for name, leaf in _flatten(params).items() if leaf.ndim > 1}
    match layers:
        case {"cls_head": count} | {"decode_head/classifier/conv_seg": count}:
            return count
        case {"bbox_head/retina_cls": count, "bbox_head/retina_reg": deltas}:  # K and 4 for every anchor
            return 4 * count // deltas
        case {"bbox_heads_0/fc_cls": count}:
            return count - 1
    raise UserError("These weights have no cls_head, conv_seg, retina_cls or fc_cls: they are of no known model.")


def kind_of(params: Mapping[str, Any]) -> str:
    """What parameters, by their names, are those of: "classifier", "segmentor" or "detector"."""
    if "backbone" not in params:
        return "classifier"
    return "segmentor" if "decode_head" in params else "detector"


def _adapt(
    given: Mapping[str, Any], wanted: Mapping[str, Any], fixed_stages: Collection[int]
) -> tuple[dict[str, Any], list[str]]:
    """Arrays by name for ``wanted``, which itself is taken of layers of other classes."""
    adapted, problems, resized = {}, [], collections.Counter()
    for name, leaf in wanted.items():
        if name not in given:
            problems.append(f"{name} is missing, wanted {tuple(leaf.shape)}")
            continue
        array = np.asarray(given[name])
        sides = [_table_sides(name, shape, fixed_stages) for shape in (array.shape, leaf.shape)]
        if array.shape == leaf.shape:
            adapted[name] = array.astype(leaf.dtype, copy=False)
        elif re.fullmatch(_OF_CLASSES, name) and array.shape[:-1] == leaf.shape[:-1]:
            adapted[name] = leaf
        elif None not in sides and sides[0][0] == sides[1][0]:
            adapted[name] = _resize_table(array, sides[0], sides[1]).astype(leaf.dtype)
            resized["{1} x {2} to {4} x {5}".format(*sides[0], *sides[1])] += 1
        else:
            problems.append(f"{name} is {array.shape}, wanted {tuple(leaf.shape)}")
    problems += [f"{name} is unknown" for name in given if name not in wanted]
    if problems:
        raise UserError(f"These weights are of another model: {'; '.join(problems)}.")
    return adapted, [f"Position tables resized from {change}: {count}." for change, count in resized.items()]


def resize_bicubic(tables: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(..., H, W) -> (..., H', W') in float64, as PyTorch's ``interpolate`` (bicubic, corners not aligned, no antialias).

    Cubic convolution with a = -0.75, border pixels repeated. jax.image.resize has a = -0.5, and other borders.
    """
    rows, columns = (_cubic_weights(old, new) for old, new in zip(tables.shape[-2:], shape, strict=True))
    return rows @ tables.astype(np.float64) @ columns.T


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """(new, old): how much each old pixel adds to a new one."""
    a = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(center)[:, None] + np.arange(-1, 3)
    t = np.abs(center[:, None] - taps)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), np.where(t <= 1, near, far))
    return weights


def _table_sides(name: str, shape: tuple[int, ...], fixed_stages: Collection[int]) -> tuple[int, int, int] | None:
    """(heads, height, width) of a position table; None for other parameters."""
    name, leaf = name.removeprefix(_BACKBONE), name.rsplit("/", 1)[-1]
    if leaf == "rpe_table" and len(shape) == 3 and int(name.split("/")[0].removeprefix("stages_")) not in fixed_stages:
        return tuple(shape)
    if leaf == "relative_position_bias_table" and len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return shape[1], math.isqrt(shape[0]), math.isqrt(shape[0])
    return None


def _resize_table(table, old, new):
    if table.ndim == 3:
        return resize_bicubic(table, new[1:])
    return resize_bicubic(table.T.reshape(old), new[1:]).reshape(new[0], -1).T  # windows: (height * width, heads)


def _pick_rows(head, rows: np.ndarray, wanted: int) -> dict[str, np.ndarray]:
    classes = head["kernel"].shape[-1]
    if rows.shape != (wanted,) or rows.dtype.kind not in "iu":
        raise UserError(f"The rows of the head want one integer for each of {wanted} classes, got {rows.shape}.")
    if rows.min() < 0 or rows.max() >= classes:
        raise UserError(f"The rows of the head want numbers from 0 to {classes - 1}, got {rows.min()} to {rows.max()}.")
    return {f"{_HEAD}/{name}": np.asarray(array)[..., rows] for name, array in head.items()}


def _flatten(tree) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


def _unflatten(flat) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(flat, sep="/")
