"""Reader of published configurations: every key is honored, checked, ignored for a stated reason, or refused by name."""

import difflib
import os
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = object()  # stands for the default of a key that has no default

_MAX_NAMED_KEYS = 20  # unknown keys in one error message
_MAX_PATH = 200  # characters
_MAX_LIST = 1000  # values
_MAX_PRINTED_BITS = 1024  # of an integer in an error message; Python refuses to print much larger ones
_MAX_NUMBER = 2**31 - 1  # absolute value


class _Repr(reprlib.Repr):
    """Abbreviated text of values, without the digits of very large integers."""

    def repr_int(self, value, level):
        bits = value.bit_length()
        return f"an integer of {bits:,} bits" if bits > _MAX_PRINTED_BITS else super().repr_int(value, level)


_SHORT = _Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxdict = 6


class Kind(NamedTuple):
    """A kind of values: a description for error messages, and a function that tells whether a value is of this kind."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER  # not NaN


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


COUNT = Kind("a positive integer", lambda value: _is_integer(value) and value >= 1)
COUNT_OR_ZERO = Kind("an integer of at least 0", lambda value: _is_integer(value) and value >= 0)
COUNT_OR_NONE = Kind("-1 or a positive integer", lambda value: _is_integer(value) and (value == -1 or value >= 1))
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
RATE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
RATE_BELOW_ONE = Kind("a number from 0 up to, but not including, 1", lambda value: _is_number(value) and 0 <= value < 1)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))


def choice(*values: str) -> Kind:
    """Kind of the given strings."""
    return Kind(f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values)


def list_of(kind: Kind, *, length: int | None = None, longest: int = _MAX_LIST) -> Kind:
    """Kind of nonempty lists of at most ``longest`` values of a kind, or of exactly ``length`` values."""

    def fits(value):
        if not isinstance(value, list | tuple) or not 0 < len(value) <= longest:
            return False
        return (length is None or len(value) == length) and all(map(kind.fits, value))

    return Kind(f"a list of {length or f'at most {longest:,}'} values, each {kind.words}", fits)


class Settings:
    """A mapping of a published configuration while it is read.

    Every key is read by one of the methods below; ``finish`` raises an error that names the keys that no method has read.

    Attributes:
      path: dotted path of this mapping in the whole configuration; empty for the outermost one.
      uses: dotted path -> "honored", "checked" or "ignored: REASON" for every key that was read. Sections share it with the
        mapping that they belong to.
    """

    def __init__(self, mapping: Mapping[str, Any], path: str = "", uses: dict[str, str] | None = None):
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{path or 'The configuration'}: expected a mapping, got {short(mapping)}.")
        self._mapping, self.path = mapping, path
        self.uses = {} if uses is None else uses
        self._known: list[str] = []
        self._sections: list[Settings] = []

    def __contains__(self, key: str) -> bool:
        return key in self._mapping

    def path_of(self, key: str) -> str:
        """Dotted path of a key."""
        return f"{self.path}.{key}" if self.path else key

    def take(self, key: str, kind: Kind, *, default: Any = REQUIRED) -> Any:
        """Value of a key that the result depends on; lists become tuples.

        Args:
          key: name.
          kind: required kind of the value.
          default: value of the published code if the key is missing.

        Raises:
          ValueError: the value is of another kind, or a required key is missing.
        """
        value = self._read(key, default, "honored")
        if not kind.fits(value):
            raise self.error(key, f"expected {kind.words}, got {short(value)}")
        return _freeze(value)

    def check(self, key: str, *supported: Any, default: Any = REQUIRED, reason: str = "") -> Any:
        """Value of a key that must be one of the supported values.

        Args:
          key: name.
          *supported: values; lists and tuples are equal.
          default: value of the published code if the key is missing. It is checked as well.
          reason: sentence appended to the error message.

        Raises:
          ValueError: the value is not supported, or a required key is missing.
        """
        value = self._read(key, default, "checked")
        if not any(_equal(value, candidate) for candidate in supported):
            expected = " or ".join(map(short, supported))
            missing = "" if key in self else " (the default, as the key is missing)"
            raise self.error(key, f"expected {expected}, got {short(value)}{missing}", reason)
        return _freeze(value)

    def match(self, key: str, value: Any, source: str, *, default: Any = REQUIRED) -> None:
        """Check that a value agrees with the value of another key, whose dotted path is ``source``."""
        self.check(key, value, default=default, reason=f"It must agree with {source}.")

    def ignore(self, reason: str, *keys: str) -> None:
        """Mark keys as having no effect on the result, for a reason."""
        for key in keys:
            self._known.append(key)
            if key in self._mapping:
                self.uses[self.path_of(key)] = f"ignored: {reason}"

    def ignore_all(self, reasons: Mapping[str, str]) -> None:
        """Mark the keys of a table as having no effect on the result, each for its reason."""
        for key, reason in reasons.items():
            self.ignore(reason, key)

    def refuse(self, key: str, reason: str) -> None:
        """Refuse a key with a specific reason instead of as an unknown key."""
        if key in self._mapping:
            raise self.error(key, f"not supported, got {short(self._mapping[key])}", reason)

    def section(self, key: str) -> "Settings":
        """Settings of the mapping under a key."""
        return self._add_section(self._read(key, REQUIRED, None), key)

    def optional_section(self, key: str) -> "Settings | None":
        """Settings of the mapping under a key, or None if the key is missing or its value is None."""
        value = self._read(key, None, None)
        if value is None:
            self.uses |= {self.path_of(key): "checked"} if key in self._mapping else {}
            return None
        return self._add_section(value, key)

    def sections(self, key: str, count: int) -> list["Settings"]:
        """Settings of the mappings in the list under a key, which must have ``count`` items."""
        values = self._read(key, REQUIRED, None)
        if not isinstance(values, list | tuple) or len(values) != count:
            raise self.error(key, f"expected a list of {count} mappings, got {short(values)}")
        return [self._add_section(value, f"{key}.{index}") for index, value in enumerate(values)]

    def finish(self) -> None:
        """Check that every key was read, here and in all sections.

        Raises:
          ValueError: keys were not read; all are named, with similar known keys.
        """
        unknown = self._unknown()
        if unknown:
            paths = [path[:_MAX_PATH] for path, _ in unknown]
            nearest = [
                f"{path!r}: did you mean {match[0]!r}?"
                for path, known in unknown[:_MAX_NAMED_KEYS]
                if (match := difflib.get_close_matches(path[-_MAX_PATH:].rsplit(".", 1)[-1], known, n=1))
            ]
            more = f" and {len(paths) - _MAX_NAMED_KEYS} more" if len(paths) > _MAX_NAMED_KEYS else ""
            message = f"Unknown keys in the published configuration: {paths[:_MAX_NAMED_KEYS]}{more}."
            raise ValueError(" ".join([message, *nearest[:3]]))

    def error(self, key: str, message: str, reason: str = "") -> ValueError:
        """Error that names a key by its whole path."""
        return ValueError(f"{self.path_of(key)}: {message}.{f' {reason}' if reason else ''}")

    def _read(self, key: str, default: Any, use: str | None) -> Any:
        self._known.append(key)
        if key not in self._mapping:
            if default is REQUIRED:
                raise ValueError(f"{self.path_of(key)}: this key is missing.")
            return default
        if use:
            self.uses[self.path_of(key)] = use
        return self._mapping[key]

    def _add_section(self, mapping: Any, key: str) -> "Settings":
        section = Settings(mapping, self.path_of(key), self.uses)
        if not mapping:
            self.uses[section.path] = "checked"  # an empty mapping
        self._sections.append(section)
        return section

    def _unknown(self) -> list[tuple[str, list[str]]]:
        """Path of every key that was not read, with the known keys of the same mapping."""
        unknown = [
            (self.path_of(key if isinstance(key, str) else short(key)), self._known)
            for key in self._mapping
            if key not in self._known
        ]
        return unknown + [pair for section in self._sections for pair in section._unknown()]


def printable(path: str | os.PathLike) -> str:
    """Text of a path for an error message: quoted if it has unprintable characters, and shortened if it is long."""
    text = str(path)
    text = text if len(text) <= 1000 else f"{text[:_MAX_PATH]}...{text[-_MAX_PATH:]}"
    return text if text.isprintable() else repr(text)


def short(value: Any) -> str:
    """Text of a value as Python writes it, abbreviated if it is long."""
    return _SHORT.repr(value)


def _freeze(value: Any) -> Any:
    """The value with all lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    return value


def _equal(a, b) -> bool:
    """Equality that distinguishes True from 1, but not lists from tuples."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b
