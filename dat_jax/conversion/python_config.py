"""Reader of the Python configurations of MMDetection and MMSegmentation. Nothing in them is run or imported.

Supported are assignments of literals, ``dict(...)``, names that were assigned before, ``_base_`` files, their values as
``_base_.a.b`` or ``{{_base_.a.b}}``, ``_delete_``, arithmetic, and concatenation. Anything else that ``model`` depends on is
refused with its file and line. Values that cannot be read are skipped if ``model`` does not depend on them.
"""

import ast
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from dat_jax.conversion import python_values
from dat_jax.conversion.python_values import Budget, BudgetSpent, Refused, evaluate
from dat_jax.conversion.settings import printable
from dat_jax.errors import UserError
from dat_jax.storage import fetch

_MAX_BYTES = 1 << 20  # of a file
_MAX_FILES = 100  # in a chain of _base_ files, and in one _base_
_DELETE = "_delete_"


class _Unreadable(NamedTuple):
    """Value of a name that was skipped: its location, the reason, and whether the name is imported."""

    place: str
    reason: str
    is_import: bool = False


def read_python_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read the ``model`` mapping of a published Python configuration, with its ``_base_`` files merged as MMCV does.

    Args:
      path: a file such as configs/dat/upn_tiny_160k_dp03_lr6.py.

    Returns:
      The mapping, with nested dicts, lists, tuples, strings and numbers.

    Raises:
      UserError: the file or one of its bases cannot be read, or has an unsupported statement; the line is named.
    """
    path = fetch(path)
    try:
        names = _read_file(path, chain=(), done={}, budget=Budget())
    except (RecursionError, MemoryError) as error:
        raise UserError(f"{path}: the configuration is too deeply nested to be read.") from error
    model = names.get("model")
    if isinstance(model, _Unreadable):
        raise UserError(f"{model.place}: {model.reason}, and model depends on it.")
    if not isinstance(model, dict):
        got = "none" if model is None else type(model).__name__
        raise UserError(f"{path}: expected an assignment of a dict to model, got {got}.")
    return model


def _read_file(path: pathlib.Path, *, chain: tuple[pathlib.Path, ...], done: dict, budget: Budget) -> dict[str, Any]:
    """Name -> value of a file and its bases.

    Args:
      path: the file.
      chain: the files that led to this one.
      done: resolved path -> result of the files that were read before.
      budget: for the values of all files together.
    """
    real = _resolve(path)
    if real in chain:
        raise UserError(f"{path}: _base_ leads back to this file.")
    if len(chain) >= _MAX_FILES:
        raise UserError(f"{path}: more than {_MAX_FILES} files are chained by _base_.")
    if real in done:
        return done[real]
    statements = _parse(path)
    base = _read_bases(path, statements, chain=(*chain, real), done=done, budget=budget)
    names: dict[str, Any] = {}
    for statement in statements:
        try:
            _assign(statement, names, base, path, budget)
        except Refused as error:
            raise UserError(f"{error.origin or f'{path}:{error.line}'}: {error}.") from error
    public = {
        name: value
        for name, value in names.items()
        if not name.startswith("__") and not (isinstance(value, _Unreadable) and value.is_import)
    }
    try:
        done[real] = _merge(base, public, str(path), budget)
    except BudgetSpent as error:
        raise UserError(f"{path}: {error}.") from error
    return done[real]


def _resolve(path: pathlib.Path) -> pathlib.Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of symbolic links
        raise UserError(f"{printable(path)} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _parse(path: pathlib.Path) -> list[ast.stmt]:
    try:
        source = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the path has a null byte
        raise UserError(f"{printable(path)} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if len(source) > _MAX_BYTES:
        raise UserError(f"{path}: expected a configuration of at most {_MAX_BYTES:,} bytes, got {len(source):,}.")
    if b"\0" in source:
        raise UserError(f"{path}: expected Python source text, got a file with null bytes.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in strings
            return ast.parse(source, filename=str(path)).body
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        raise UserError(f"{path}{line}: not valid Python: {' '.join(str(error.msg).split())}.") from error
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: not valid Python: {' '.join(str(error).split())}.") from error


def _read_bases(path: pathlib.Path, statements: list[ast.stmt], *, chain, done, budget) -> dict[str, Any]:
    """Name -> value of all ``_base_`` files together."""
    names: dict[str, Any] = {}
    origins: dict[str, pathlib.Path] = {}
    assignments = [
        (s.lineno, value) for s in statements for name, value in [_split_assignment(s)] if value and name == "_base_"
    ]
    if len(assignments) > 1:
        raise UserError(f"{path}:{assignments[1][0]}: _base_ is assigned a second time.")
    for line, value in assignments:
        place = f"{path}:{line}"
        for text in _base_paths(value, place):
            file = path.parent / text
            try:
                exists = file.is_file()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"{place}: the base file {printable(file)} cannot be read: {reason}.") from error
            if not exists:
                raise UserError(
                    f"{place}: the base file {printable(file)} does not exist; put the configuration into a checkout of "
                    "MMDetection or MMSegmentation that has it."
                )
            for name, value in _read_file(file, chain=chain, done=done, budget=budget).items():
                if name in names:
                    raise UserError(f"{place}: both base files {origins[name]} and {file} assign {name}.")
                names[name], origins[name] = value, file
    return names


def _base_paths(node: ast.expr, place: str) -> list[str]:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        value = None
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(text, str) for text in paths):
        raise UserError(f"{place}: expected a path or a list of paths as _base_, written as literals.")
    if len(paths) > _MAX_FILES:
        raise UserError(f"{place}: expected at most {_MAX_FILES} paths as _base_, got {len(paths):,}.")
    for text in paths:
        if (
            not text.isprintable()
            or not text.endswith(".py")
            or pathlib.PurePath(text).is_absolute()
            or "://" in text
            or "::" in text
        ):
            raise UserError(f"{place}: expected a relative path to a .py file as _base_, got {text[:200]!r}.")
    return list(paths)


def _split_assignment(statement: ast.stmt) -> tuple[str, ast.expr] | tuple[None, None]:
    """The name to which a statement assigns a value, and the value; None for other statements."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None, None
    if statement.value is None or not isinstance(target, ast.Name):
        return None, None
    return target.id, statement.value


def _assign(
    statement: ast.stmt, names: dict[str, Any], base: Mapping[str, Any], path: pathlib.Path, budget: Budget
) -> None:
    """Add the assignments of a top-level statement to ``names``.

    Raises:
      Refused: the statement could change ``model`` in a way that is not followed.
    """
    place = f"{path}:{statement.lineno}"
    name, value = _split_assignment(statement)
    if name is not None and value is not None:
        if name == "dict":
            raise Refused(statement, "dict must keep its meaning")
        if name != "_base_":
            annotation = getattr(statement, "annotation", None)
            if annotation is not None and not python_values.is_harmless(annotation, names):
                raise Refused(annotation, "an annotation with a call or an assignment cannot be read")
            names[name] = _evaluate_or_skip(name, value, names, base, path, budget)
    elif isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            if alias.name == "*":
                raise Refused(statement, "an import of all names cannot be read")
            bound = alias.asname or alias.name.split(".")[0]
            names[bound] = _Unreadable(place, f"{bound} is imported", is_import=True)
    elif not (
        isinstance(statement, ast.Pass)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))  # a docstring
    ):
        raise Refused(
            statement, f"expected an assignment of a literal to a name, got {python_values.describe(statement)}"
        )


def _evaluate_or_skip(
    target: str, node: ast.expr, names: dict[str, Any], base: Mapping[str, Any], path: pathlib.Path, budget: Budget
) -> Any:
    """The value of an expression that is assigned to ``target``, or ``_Unreadable``.

    Raises:
      Refused: the expression is not supported, and skipping it could miss a change of ``model``.
    """

    def look_up(name: str, where: ast.AST) -> Any:
        if name not in names:
            raise Refused(where, f"the name {name} is not assigned before")
        if isinstance(names[name], _Unreadable):
            raise Refused(where, names[name].reason, origin=names[name].place)
        return names[name]

    def look_up_base(keys: tuple[str, ...], where: ast.AST) -> Any:
        value: Any = base
        for key in keys:
            if not isinstance(value, Mapping) or key not in value or isinstance(value[key], _Unreadable):
                raise Refused(where, f"the base files have no literal value _base_.{'.'.join(keys)}")
            value = value[key]
        return value

    try:
        return evaluate(node, look_up=look_up, look_up_base=look_up_base, budget=budget)
    except BudgetSpent:
        raise
    except Refused as error:
        if target in python_values.HARMLESS_NAMES or not python_values.is_harmless(node, names):
            raise
        return _Unreadable(error.origin or f"{path}:{error.line}", str(error))


def _merge(
    base: Mapping[str, Any], names: Mapping[str, Any], path: str, budget: Budget, prefix: str = ""
) -> dict[str, Any]:
    """``base`` updated with ``names``: dicts are merged recursively unless ``_delete_`` is true, other values are replaced."""
    budget.spend(None, len(base) + len(names))
    merged = dict(base)
    for name, value in names.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            replaces = bool(value.get(_DELETE, False))
            value = {inner: item for inner, item in value.items() if inner != _DELETE}
            old = merged.get(name)
            if name not in merged or replaces:
                value = _merge({}, value, path, budget, f"{key}.")
            elif isinstance(old, _Unreadable):
                value = old
            elif isinstance(old, dict):
                value = _merge(old, value, path, budget, f"{key}.")
            else:
                raise UserError(
                    f"{path}: {key} is a dict that cannot be merged with the {type(old).__name__} of the base file; "
                    "_delete_=True replaces it."
                )
        merged[name] = value
    return merged
