"""Selection of the weights in a training checkpoint, and removal of the prefixes that wrappers put before their names.

A checkpoint may hold the weights that were trained ("raw") and an average of them over training ("ema"). Both are searched
under the usual keys. "auto" takes the weights in the usual place, which the program that wrote the file loads as well:
the entries of ``RAW_KEYS`` in their order, then those of ``EMA_KEYS``, then the top level.

MMEngine and Lightning swap the two when they save, so that the usual place has the averages. Their files are
recognized: "ema" and "raw" take the averages and the raw weights, and "auto" still takes the usual place.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dat_jax.conversion.pickles import Object
from dat_jax.conversion.torch_files import Storage, Tensor, show
from dat_jax.errors import UserError

CHOICES = ("auto", "ema", "raw")
RAW_KEYS = ("model", "state_dict", "model_state", "model_state_dict", "net", "module", "student")
EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "ema_model", "teacher")
_MAX_DEPTH = 5
_MAX_NAME = 1000  # characters of the name of a tensor whose prefixes are removed
_MAX_CANDIDATES = 100
# Prefixes that wrappers put before every name. "backbone." is also part of some names of segmentors and detectors, which keep
# it because their other names lack it.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "student.")
_EMA_PREFIXES = ("model_ema.", "ema_model.", "ema.", "teacher.")
# Parts that torch.compile, FSDP and activation checkpointing insert anywhere in names.
_WRAPPER_PARTS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Counters that classes of averaged models store beside "module.*".
_COUNTERS = ("n_averaged", "steps")
_ADVICE = (
    "if you trust it, load it with PyTorch and save only the weights: torch.save(model.state_dict(), 'weights.pth')"
)


class Selection(NamedTuple):
    """Weights by name, and a phrase for where in the file they were."""

    tensors: dict[str, Any]
    source: str


class _Candidate(NamedTuple):
    """Weights that could be selected.

    Attributes:
      place: where in the file they are, for messages.
      averaged: whether they are averaged; None if the file does not show it.
      entries: their entries by name.
    """

    place: str
    averaged: bool | None
    entries: Mapping[str, Any]


def select_weights(content: Any, *, weights: str, path: Any) -> Selection:
    """Select the weights of a file.

    Args:
      content: content of the file; tensors are ``Tensor`` objects or arrays.
      weights: "auto", "ema" or "raw", see above.
      path: name of the file in errors.

    Returns:
      Tensors by name without the prefixes of wrappers, and where in the file they were.

    Raises:
      UserError: there are no such weights, or they need a class that is not supported.
    """
    mapping = _as_mapping(content)
    if mapping is None:
        raise UserError(_describe_other(content, path))
    candidates = _make_candidates(mapping)
    if not candidates and isinstance(content, Object):
        raise UserError(_describe_other(content, path))
    if not candidates:
        _refuse_unknown_tensors(mapping, path)
        raise UserError(_describe_missing(mapping, path))
    selected = next((c for c in candidates if weights == "auto" or c.averaged == (weights == "ema")), None)
    if selected is None and any(candidate.averaged is None for candidate in candidates):
        raise UserError(
            f"{path} has weights under their own names and under ema_*, as MMCV saves them, and does not show which are "
            "averaged: with EpochBasedRunner those under their own names, with IterBasedRunner those under ema_*. Save the "
            "ones to convert alone with PyTorch, or use auto to take those under their own names."
        )
    if selected is None:
        places = ", ".join(sorted({candidate.place for candidate in candidates}))
        kinds = ("averaged (EMA)", "raw") if weights == "ema" else ("raw", "averaged (EMA)")
        raise UserError(
            f"{path} has no {kinds[0]} weights, only {kinds[1]} ones ({places}); its keys are {_list_keys(mapping)}."
        )
    _refuse_unknown_values(selected.entries, path)
    tensors = {name: value for name, value in selected.entries.items() if _is_tensor(value)}
    return Selection(strip_prefixes(tensors), _describe_source(selected, candidates))


def strip_prefixes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the prefixes that wrappers put before all names, in any order and nesting.

    A prefix that some names lack is kept, so that no two names can become one.
    """
    tensors = _drop_counters(tensors)
    _, names = _split_prefixes(tensors)
    return dict(zip(names, tensors.values(), strict=True))


def _split_prefixes(names) -> tuple[list[str], list[str]]:
    """The prefixes that all names share, and the names without them and without the parts that wrappers insert."""
    original = list(names)
    if any(len(name) > _MAX_NAME for name in original):
        return [], original
    rest, removed = [_WRAPPER_PARTS.sub("", name) for name in original], []
    prefixes = (*PREFIXES, *_EMA_PREFIXES)
    while rest and (prefix := next((p for p in prefixes if all(name.startswith(p) for name in rest)), None)):
        rest = [name.removeprefix(prefix) for name in rest]
        removed.append(prefix)
    if len(set(rest)) < len(rest) or not all(rest):
        return [], original
    return removed, rest


def describe_partial_prefix(names) -> str:
    """A phrase if most names, but not all, have the prefix of a wrapper; else an empty string."""
    names = list(names)
    for prefix in (*PREFIXES, *_EMA_PREFIXES):
        others = [name for name in names if not name.startswith(prefix)]
        if 0 < len(others) < len(names) / 2:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            return f"names start with {prefix!r} except {show(others[0])}{more}"
    return ""


def _make_candidates(mapping: Mapping) -> list[_Candidate]:
    """All weights of a checkpoint, those in the usual place first."""
    raw_place, averaged_place = _find_swapped(mapping)
    candidates = []
    for keys, entries in _find_state_dicts(mapping, {}, 0):
        averaged = any(key in EMA_KEYS for key in keys)
        averaged = (averaged or keys[:1] == averaged_place) and keys[:1] != raw_place
        candidates += _split(_Candidate(".".join(keys) or "top level", averaged, entries))
    return candidates


def _find_swapped(mapping: Mapping) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Places of the raw and averaged weights in files of programs that swap them."""
    if "message_hub" in mapping and _as_mapping(mapping.get("ema_state_dict")):  # MMEngine's EMAHook
        return ("ema_state_dict",), ("state_dict",)
    if _as_mapping(mapping.get("current_model_state")):  # Lightning's WeightAveraging
        return ("current_model_state",), ("state_dict",)
    return None, None


def _find_state_dicts(mapping: Mapping, known: dict, depth: int) -> list[tuple[tuple[str, ...], Mapping]]:
    """Keys and entries of every mapping with tensors, below the usual keys or, if there are none, of ``mapping``."""
    if id(mapping) in known or depth > _MAX_DEPTH:
        return known.get(id(mapping), [])
    known[id(mapping)] = results = []  # a mapping that contains itself is not searched again
    for key in (*RAW_KEYS, "current_model_state", *EMA_KEYS):
        child = _as_mapping(mapping.get(key))
        if child is not None:
            results += [((key, *keys), entries) for keys, entries in _find_state_dicts(child, known, depth + 1)]
    del results[_MAX_CANDIDATES:]
    if not results and any(_is_tensor(value) for value in mapping.values()):
        results.append(((), mapping))
    return results


def _split(candidate: _Candidate) -> list[_Candidate]:
    """Raw and averaged weights that are in one mapping under different names."""
    place, averaged, entries = candidate
    entries = {name: value for name, value in entries.items() if _is_tensor(value) or _is_unknown_tensor(value)}
    averaged = averaged or "n_averaged" in entries  # counter of torch.optim.swa_utils.AveragedModel
    # Names of the buffers of MMCV's EMAHook, which swaps the two sets with one of its runners only.
    buffers = {f"ema_{name.replace('.', '_')}" for name in entries}
    if not buffers.isdisjoint(entries):
        others = {name: value for name, value in entries.items() if name not in buffers}
        return [_Candidate(f"{place}, names without ema_", None, others)]
    removed, names = _split_prefixes(entries)
    averaged = averaged or not set(removed).isdisjoint(_EMA_PREFIXES)
    full_names = dict(zip(names, entries, strict=True))
    group = {full: entries[full] for name, full in full_names.items() if name.startswith(_EMA_PREFIXES)}
    if not any(_is_tensor(value) for value in group.values()):
        return [_Candidate(place, averaged, entries)]
    prefix = next(name for name, full in full_names.items() if full in group).split(".")[0]
    rest = {name: value for name, value in entries.items() if name not in group}
    candidates = [_Candidate(place, averaged, rest), _Candidate(f"{place}, {prefix}.*", True, group)]
    return [candidate for candidate in candidates if any(_is_tensor(value) for value in candidate.entries.values())]


def _drop_counters(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without the counters of averaged models."""
    rest = {name: value for name, value in entries.items() if name not in _COUNTERS}
    return rest if rest and all(name.startswith("module.") for name in rest) else dict(entries)


def _as_mapping(value: Any) -> Mapping | None:
    """The entries of a dictionary, or the items or attributes of an object; None for other values."""
    if isinstance(value, Object):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        return value.entries or (state if isinstance(state, dict) else None)
    return value if isinstance(value, Mapping) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _refuse_unknown_values(entries: Mapping[str, Any], path: Any) -> None:
    """Refuse weights that need an unsupported function or class, such as quantized and sparse tensors."""
    for name, value in entries.items():
        if _is_unknown_tensor(value):
            raise UserError(
                f"{path} has weights that are not supported: {show(name)} needs {show(value.maker)}; if you trust the file, "
                "load it with PyTorch and save plain dense tensors."
            )


def _refuse_unknown_tensors(mapping: Mapping[str, Any], path: Any) -> None:
    """Refuse a file in which all weights need an unsupported function or class."""
    for entries in (mapping, *(_as_mapping(mapping.get(key)) or {} for key in (*RAW_KEYS, *EMA_KEYS))):
        _refuse_unknown_values({name: value for name, value in entries.items() if _is_unknown_tensor(value)}, path)


def _is_unknown_tensor(value: Any) -> bool:
    return isinstance(value, Object) and (value.maker.name.startswith("_rebuild_") or _has_tensor(value))


def _has_tensor(value: Object) -> bool:
    """Whether the first arguments of an object, or their first items, are tensors."""
    nested = (item[:10] if isinstance(item, tuple) else (item,) for item in value.arguments[:10])
    return any(isinstance(item, Tensor | Storage) for items in nested for item in items)


def _describe_source(selected: _Candidate, candidates: list[_Candidate]) -> str:
    if selected.averaged is None:
        return f"{selected.place} (averaged if MMCV's EpochBasedRunner saved them)"
    other = next((candidate for candidate in candidates if candidate.averaged != selected.averaged), None)
    if other is None:
        return f"{selected.place} (averaged)" if selected.averaged else selected.place
    kind, choice = ("averaged", "raw") if selected.averaged else ("raw", "ema")
    return f"{selected.place} ({kind}); weights={choice} takes {other.place}"


def _describe_other(content: Any, path: Any) -> str:
    if isinstance(content, Object):
        return f"{path} holds an object of {show(content.maker)}, not a state dict; {_ADVICE}."
    kind = "tensor without a name" if isinstance(content, Tensor) else f"value of the type {type(content).__name__}"
    return f"{path} holds no weights by name: expected a mapping, got a {kind}."


def _describe_missing(mapping: Mapping, path: Any) -> str:
    for key in (*RAW_KEYS, *EMA_KEYS):
        value = mapping.get(key)
        if isinstance(value, Object):
            return f"{path} holds an object of {show(value.maker)} under {key}, not a state dict; {_ADVICE}."
    return (
        f"{path} holds no weights: expected tensors by name at the top level or under one of "
        f"{', '.join((*RAW_KEYS, *EMA_KEYS))}; its keys are {_list_keys(mapping)}."
    )


def _list_keys(mapping: Mapping) -> str:
    keys = [
        f"{show(key, 40)} ({show(value.maker)})" if isinstance(value, Object) else show(key, 40)
        for (key, value), _ in zip(mapping.items(), range(10), strict=False)
    ]
    more = f" and {len(mapping) - len(keys)} more" if len(mapping) > len(keys) else ""
    return (", ".join(keys) + more) if keys else "none"
