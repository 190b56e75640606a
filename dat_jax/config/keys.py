"""Declarations of configuration keys: type, default, explanation and allowed values, each in one place.

The keys of a task are nested dicts of ``Key``; see ``common.py``, ``classification.py``, ``segmentation.py`` and
``detection.py``. Default configurations and the checks of ``validation.py`` are derived from them.
"""

import builtins
import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

DERIVED = -1  # value of a key that a run derives from its data, its model or its weights

_ABSTRACT_TYPES = {int: numbers.Integral, float: numbers.Real}
_NOUNS = {int: "an integer", float: "a number", str: "a string"}
_ITEM_NOUNS = {int: "integers", float: "numbers", str: "strings"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A configuration key.

    Attributes:
      type: bool, int, float, str or tuple. float also accepts integers.
      default: value in the default configuration.
      help: explanation, one or more sentences.
      items: type of the items of a tuple: int, float or str. None for other types.
      choices: allowed values, of a tuple the allowed items; empty for any.
      minimum, maximum: bounds of a number, or of every item of a tuple, inclusive. None: unbounded.
      above, below: exclusive bounds.
      or_value: a value outside the bounds that is allowed too.
      can_be_empty: whether a tuple may have no items.
    """

    type: type
    default: Any
    help: str
    _: dataclasses.KW_ONLY
    items: builtins.type | None = None  # `type` is the attribute above
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    or_value: Any = None
    can_be_empty: bool = True

    def describe(self) -> str:
        """Allowed values as a phrase, such as "an integer of at least 1"."""
        if self.type is bool:
            return "True or False"
        if self.type is tuple:
            if self.choices:
                return f"a tuple with some of {', '.join(self.choices)}, such as {self.choices[:1]!r}"
            noun = "a tuple" if self.can_be_empty else "a non-empty tuple"
            return f"{noun} of {_ITEM_NOUNS[self.items]}{self._describe_bounds()}, such as {self.default!r}"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        alternative = "" if self.or_value is None else f", or {self.or_value}"
        return _NOUNS[self.type] + self._describe_bounds() + alternative

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` has the type and is within the allowed values."""
        if self.type is tuple:
            if not isinstance(value, list | tuple) or not (value or self.can_be_empty):
                return False
            assert self.items is not None
            return all(self._accepts_one(item, self.items) for item in value)
        return self._accepts_one(value, self.type)

    def _describe_bounds(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f" from {self.minimum} to {self.maximum}"
        bounds = []
        if self.minimum is not None:
            bounds.append(f"of at least {self.minimum}")
        if self.above is not None:
            bounds.append(f"above {self.above}")
        if self.below is not None:
            bounds.append(f"below {self.below}")
        if self.maximum is not None:
            bounds.append(f"of at most {self.maximum}")
        return " " + " and ".join(bounds) if bounds else ""

    def _accepts_one(self, value: Any, kind: builtins.type) -> bool:
        if kind is bool:
            return isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, _ABSTRACT_TYPES.get(kind, kind)):
            return False
        if self.choices and value not in self.choices:
            return False
        if self.or_value is not None and value == self.or_value:
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


@dataclasses.dataclass(frozen=True)
class OpenGroup:
    """A group whose keys are checked where they are used: ``name`` and any attribute of the class of that name.

    Attributes:
      keys: those with a default, and how they are checked if they are present.
      required: names of keys that must be present.
      help: explanation.
    """

    keys: Mapping[str, Key]
    required: tuple[str, ...]
    help: str


Keys = Mapping[str, "Key | OpenGroup | Keys"]


def merge_keys(keys: Keys, others: Keys) -> dict[str, Any]:
    """``keys`` with those of ``others`` added; groups of the same name are merged, other keys replaced."""
    merged = dict(keys)
    for name, value in others.items():
        known = merged.get(name)
        merged[name] = merge_keys(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def replace_defaults(keys: Keys, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``keys`` with other defaults.

    Args:
      keys: nested keys.
      defaults: path of a key, with dots, to its default.
    """
    replaced = dict(keys)
    for path, default in defaults.items():
        name, _, rest = path.partition(".")
        key = replaced[name]
        if rest:
            assert isinstance(key, Mapping)
            replaced[name] = replace_defaults(key, {rest: default})
        else:
            assert isinstance(key, Key)
            replaced[name] = dataclasses.replace(key, default=default)
    return replaced


def make_config(keys: Keys) -> ConfigDict:
    """The configuration of all defaults, unlocked."""
    config = ConfigDict()
    for name, key in keys.items():
        if isinstance(key, Key):
            config[name] = key.default
        else:
            config[name] = make_config(key.keys if isinstance(key, OpenGroup) else key)
    return config
