"""Adaptation of trained weights to another model.

It has another image or window size, other classes, images with another number of channels, or it is a network around the
trained one.
"""

import collections
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from dat_jax.errors import UserError

_HEAD = "cls_head"
_BACKBONE = "backbone/dat/"  # prefix of the DAT in the parameters of a segmentor or detector
_FIRST_KERNEL = "patch_proj/conv1/kernel"  # of the DAT, (height, width, channels of the images, features)
# Parameters whose last axis depends on the number of classes.
_CLASS_LAYERS = r"(.*/)?(cls_head|conv_seg|retina_cls|fc_cls|fc_reg|conv_logits)/(kernel|bias)"


def adapt_params(
    params: Mapping[str, Any],
    *,
    abstract_params: Mapping[str, Any],
    head_rows: np.ndarray | None = None,
    fixed_stages: Collection[int] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Adapt the parameters of a classifier to another image size, window size, number of classes or of channels.

    Position tables (``rpe_table`` of the kind "table", and ``relative_position_bias_table`` of windows) are resized
    bicubically, separately for each head. If the number of classes differs, the head is that of ``abstract_params``, or
    selected rows of the trained one. The first convolution is adapted from RGB to other channels by ``adapt_input_kernel``.
    Other parameters only change their dtype.

    Args:
      params: trained parameters, nested dictionaries of arrays.
      abstract_params: parameters of the new model: initialized arrays, or ShapeDtypeStructs.
      head_rows: integers (K,), or None: class i of the new head is class ``head_rows[i]`` of the trained one. It selects, for
        example, the ImageNet-1k classes of a head for ImageNet-22k.
      fixed_stages: indices of the stages whose ``rpe_table`` is of the kind "fixed", a number for each query and key, which
        is not resized.

    Returns:
      Nested dictionaries with the structure and dtypes of ``abstract_params``: numpy arrays, except for a head that is taken
      from ``abstract_params``. And sentences that describe what was adapted.

    Raises:
      UserError: parameters differ in any other way, and the first ones are named; or ``head_rows`` does not fit the heads.

    Source: the published code for fine-tuning.
    """
    trained, expected = _flatten(params), _flatten(abstract_params)
    trained_classes, classes = count_classes(params), count_classes(abstract_params)
    notes = []
    if head_rows is not None:
        trained |= _select_head_rows(params[_HEAD], np.asarray(head_rows), classes)
        notes.append(f"The head has {classes} of the {trained_classes} classes of the trained one.")
    elif classes != trained_classes:
        notes.append(f"The head for {classes} classes is initialized: the trained one is for {trained_classes}.")
    adapted, more_notes = _adapt(trained, expected, fixed_stages)
    return _unflatten(adapted), notes + more_notes


def adapt_dense(
    variables: Mapping[str, Any], *, abstract_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Adapt the variables of a segmentor or detector as ``adapt_params`` does, including "batch_stats" if it has BatchNorm."""
    trained_classes, classes = (count_classes(tree["params"]) for tree in (variables, abstract_variables))
    adapted, notes = {}, []
    if classes != trained_classes:
        notes.append(f"The layers for {classes} classes are initialized: the trained ones are for {trained_classes}.")
    for collection, expected in abstract_variables.items():
        arrays, more_notes = _adapt(_flatten(variables.get(collection, {})), _flatten(expected), fixed_stages)
        adapted[collection] = _unflatten(arrays)
        notes += more_notes
    return adapted, notes


def adapt_backbone(
    params: Mapping[str, Any], *, fresh_variables: Mapping[str, Any], fixed_stages: Collection[int] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Use a classifier as the backbone of a segmentor or detector.

    Args:
      params: trained parameters of the classifier; its head is not used.
      fresh_variables: initialized variables of the segmentor or detector.
      fixed_stages: see ``adapt_params``.

    Returns:
      ``fresh_variables`` with the parameters of the backbone adapted as ``adapt_params`` does. And sentences that describe
      what was adapted.

    Raises:
      UserError: see ``adapt_params``.
    """
    trained = {f"{_BACKBONE}{name}": array for name, array in _flatten(params).items() if not name.startswith("cls_")}
    fresh = _flatten(fresh_variables["params"])
    expected = {name: leaf for name, leaf in fresh.items() if name.startswith(_BACKBONE)}
    adapted, notes = _adapt(trained, expected, fixed_stages)
    notes = ["The backbone is that of a classifier; norms of its maps, and heads, are initialized.", *notes]
    return {**fresh_variables, "params": _unflatten({**fresh, **adapted})}, notes


def reorder_classes(params: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Reorder the classes of a classifier, segmentor or detector.

    Args:
      params: parameters of the model, nested dictionaries of arrays.
      order: class i of the result is class ``order[i]`` of ``params``; a permutation of all classes.

    Returns:
      Parameters with the same structure and shapes. Layers that do not depend on the class are unchanged.
    """
    classes, indices = len(order), list(order)
    arrays = _flatten(params)
    for name, array in arrays.items():
        match = re.fullmatch(_CLASS_LAYERS, name)
        layer, width = match and match[2], array.shape[-1:]
        grouped = np.asarray(array)
        if layer == "fc_cls":  # K classes and the background
            arrays[name] = grouped[..., [*indices, classes]]
        elif layer == "fc_reg" and width == (4 * classes,):  # 4 numbers per class
            grouped = grouped.reshape(*array.shape[:-1], classes, 4)
            arrays[name] = grouped[..., indices, :].reshape(array.shape)
        elif layer == "retina_cls":  # K scores per anchor
            arrays[name] = grouped.reshape(*array.shape[:-1], -1, classes)[..., indices].reshape(array.shape)
        elif layer and width == (classes,):
            arrays[name] = grouped[..., indices]
    return _unflatten(arrays)


def replace_class_layers(params: Mapping[str, Any], fresh_params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the layers that depend on the classes, such as the head of a classifier, from ``fresh_params``.

    Args:
      params: parameters of a classifier, segmentor or detector, nested dictionaries of arrays.
      fresh_params: initialized parameters of the same model.
    """
    fresh = {name: leaf for name, leaf in _flatten(fresh_params).items() if re.fullmatch(_CLASS_LAYERS, name)}
    return _unflatten({**_flatten(params), **fresh})


def count_classes(params: Mapping[str, Any]) -> int:
    """Number of classes of a classifier, segmentor or detector (without background), from the shapes of its parameters.

    Raises:
      UserError: the parameters are of no known model.
    """
    widths = {name.removesuffix("/kernel"): leaf.shape[-1] for name, leaf in _flatten(params).items() if leaf.ndim > 1}
    match widths:
        case {"cls_head": count} | {"decode_head/classifier/conv_seg": count}:
            return count
        case {"bbox_head/retina_cls": count, "bbox_head/retina_reg": deltas}:  # K and 4 numbers per anchor
            return 4 * count // deltas
        case {"bbox_heads_0/fc_cls": count}:
            return count - 1
    raise UserError("These weights have no cls_head, conv_seg, retina_cls or fc_cls: they are of no known model.")


def count_channels(params: Mapping[str, Any]) -> int:
    """Number of channels of the images of a classifier, segmentor or detector, from the shapes of its parameters.

    Raises:
      UserError: the parameters are of no known model.
    """
    arrays = _flatten(params)
    kernel = arrays.get(_FIRST_KERNEL, arrays.get(_BACKBONE + _FIRST_KERNEL))
    if kernel is None:
        raise UserError(f"These weights have no {_FIRST_KERNEL}: they are of no known model.")
    return kernel.shape[2]


def depends_on_classes(name: str) -> bool:
    """Whether the last axis of a parameter depends on the number of classes, by its name, such as "cls_head/kernel"."""
    return re.fullmatch(_CLASS_LAYERS, name) is not None


def kind_of(params: Mapping[str, Any]) -> str:
    """Kind of the model that parameters belong to, by their names: "classifier", "segmentor" or "detector"."""
    if "backbone" not in params:
        return "classifier"
    return "segmentor" if "decode_head" in params else "detector"


def _adapt(
    trained: Mapping[str, Any], expected: Mapping[str, Any], fixed_stages: Collection[int]
) -> tuple[dict[str, Any], list[str]]:
    """Adapt arrays by name. Layers for another number of classes are taken from ``expected``."""
    adapted, notes, missing, other_shapes, resized = {}, [], [], [], collections.Counter()
    for name, leaf in expected.items():
        if name not in trained:
            missing.append(f"{name} is missing, expected {tuple(leaf.shape)}")
            continue
        array = np.asarray(trained[name])
        old_table, new_table = (_get_table_shape(name, shape, fixed_stages) for shape in (array.shape, leaf.shape))
        if array.shape == leaf.shape:
            adapted[name] = array.astype(leaf.dtype, copy=False)
        elif re.fullmatch(_CLASS_LAYERS, name) and array.shape[:-1] == leaf.shape[:-1]:
            adapted[name] = leaf
        elif name.removeprefix(_BACKBONE) == _FIRST_KERNEL and _differ_in_channels(array.shape, leaf.shape):
            channels = leaf.shape[2]
            adapted[name] = adapt_input_kernel(array, channels).astype(leaf.dtype)
            change = "summed over RGB" if channels == 1 else f"those of RGB, repeated and scaled by 3/{channels}"
            images = "images with one channel" if channels == 1 else f"images with {channels} channels"
            notes.append(f"The kernels of the first convolution, for {images}, are {change}.")
        elif old_table and new_table and old_table[0] == new_table[0]:
            adapted[name] = _resize_table(array, old_table, new_table).astype(leaf.dtype)
            resized["{1} x {2} to {4} x {5}".format(*old_table, *new_table)] += 1
        else:
            other_shapes.append(f"{name}: expected {tuple(leaf.shape)}, got {array.shape}")
    unknown = [f"{name} is unknown" for name in trained if name not in expected]
    if problems := [_list_some(lines) for lines in (other_shapes, missing, unknown) if lines]:
        raise UserError(f"These weights are of another model: {'; '.join(problems)}.")
    notes += [f"Position tables resized from {change}: {count}." for change, count in resized.items()]
    return adapted, notes


def _differ_in_channels(trained: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether only the channels of the images can differ between two shapes of the first kernel."""
    return (trained[:2], trained[3:]) == (expected[:2], expected[3:])


def adapt_input_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapt the kernel of a convolution of RGB images to images with another number of channels.

    For one channel it is the sum over the RGB channels. For any other number, the RGB channels are repeated and scaled by
    3 / channels, so that an image whose channels are equal gives about the same result.

    Args:
      kernel: (height, width, 3, features).
      channels: number of channels C.

    Returns:
      (height, width, C, features).

    Raises:
      UserError: the kernel is not for three channels.

    Source: ``adapt_input_conv`` of timm.
    """
    if kernel.shape[2] != 3:
        raise UserError(
            f"These weights are for images with {kernel.shape[2]} channels: expected weights for {channels}, or for RGB, whose "
            "kernels are adapted."
        )
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % 3] * (3 / channels)


def _list_some(problems: list[str]) -> str:
    """The first three of problems of one kind, and how many more there are."""
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def resize_bicubic(tables: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resize tables as PyTorch's ``interpolate`` does (bicubic, corners not aligned, no antialiasing).

    It is a cubic convolution with a = -0.75 and repeated border pixels. ``jax.image.resize`` has a = -0.5 and other borders.

    Args:
      tables: (..., H, W).
      shape: (H', W').

    Returns:
      float64 (..., H', W').
    """
    rows, columns = (_cubic_weights(old, new) for old, new in zip(tables.shape[-2:], shape, strict=True))
    return rows @ tables.astype(np.float64) @ columns.T


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Weight of each old pixel for each new one, (new, old)."""
    a = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(center)[:, None] + np.arange(-1, 3)
    t = np.abs(center[:, None] - taps)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.zeros((new, old))
    np.add.at(weights, (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)), np.where(t <= 1, near, far))
    return weights


def _get_table_shape(name: str, shape: tuple[int, ...], fixed_stages: Collection[int]) -> tuple[int, int, int] | None:
    """(heads, height, width) of a position table that can be resized; None for other parameters."""
    name, leaf = name.removeprefix(_BACKBONE), name.rsplit("/", 1)[-1]
    if leaf == "rpe_table" and len(shape) == 3 and int(name.split("/")[0].removeprefix("stages_")) not in fixed_stages:
        return shape[0], shape[1], shape[2]
    if leaf == "relative_position_bias_table" and len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return shape[1], math.isqrt(shape[0]), math.isqrt(shape[0])
    return None


def _resize_table(table: np.ndarray, old: tuple[int, int, int], new: tuple[int, int, int]) -> np.ndarray:
    if table.ndim == 3:
        return resize_bicubic(table, new[1:])
    return resize_bicubic(table.T.reshape(old), new[1:]).reshape(new[0], -1).T  # windows: (height * width, heads)


def _select_head_rows(head: Mapping[str, Any], rows: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    trained_classes = head["kernel"].shape[-1]
    if rows.shape != (classes,) or rows.dtype.kind not in "iu":
        raise UserError(
            f"Rows of the head: expected one integer for each of {classes} classes, got {rows.dtype.name} {rows.shape}."
        )
    if rows.min() < 0 or rows.max() >= trained_classes:
        raise UserError(
            f"Rows of the head: expected numbers from 0 to {trained_classes - 1}, got {rows.min()} to {rows.max()}."
        )
    return {f"{_HEAD}/{name}": np.asarray(array)[..., rows] for name, array in head.items()}


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def _unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(arrays, sep="/")
