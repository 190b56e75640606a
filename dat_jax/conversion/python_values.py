"""Evaluation of Python expressions from their syntax tree, without running them."""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_MAX_BITS = 64  # of an integer
_MAX_CHARACTERS = 1 << 16  # of a string
_MAX_VALUES = 1 << 16  # in a nested value
_MAX_TOTAL_VALUES = 1 << 20  # in all files of a configuration together
_CHARACTERS_PER_VALUE = 8  # of strings that are concatenated
_MAX_EXPONENT = 64
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
# Calls that cannot change the value of a name.
_HARMLESS_CALLS = (
    *(
        "abs",
        "bool",
        "dict",
        "float",
        "int",
        "len",
        "list",
        "max",
        "min",
        "range",
        "round",
        "sorted",
        "str",
        "sum",
        "tuple",
    ),
    *("os.environ.get", "os.getenv", "os.path.abspath", "os.path.basename", "os.path.dirname", "os.path.join"),
)
HARMLESS_NAMES = frozenset(call.split(".")[0] for call in _HARMLESS_CALLS)
_CONSUMERS = ("dict", "list", "max", "min", "sorted", "sum", "tuple")  # they exhaust a generator before they return
_DESCRIPTIONS = {
    ast.AsyncFor: "a loop",
    ast.Assign: "an assignment to a target other than one name",
    ast.AugAssign: "an augmented assignment",
    ast.Call: "a call",
    ast.ClassDef: "a class",
    ast.Delete: "a del statement",
    ast.DictComp: "a comprehension",
    ast.Expr: "an expression",
    ast.For: "a loop",
    ast.FormattedValue: "an f-string with an expression",
    ast.FunctionDef: "a function",
    ast.GeneratorExp: "a comprehension",
    ast.If: "an if statement",
    ast.IfExp: "a conditional expression",
    ast.JoinedStr: "an f-string with an expression",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.Try: "a try statement",
    ast.While: "a loop",
    ast.With: "a with statement",
}


class Refused(Exception):
    """An expression or statement that is not supported.

    Attributes:
      line: its line in the file.
      origin: "FILE:LINE" of the cause if it is in another statement, else None.
    """

    def __init__(self, node: ast.AST | None, message: str, *, origin: str | None = None):
        super().__init__(message)
        self.line = getattr(node, "lineno", 0)
        self.origin = origin


class BudgetSpent(Refused):
    """The configuration builds too many values; no statement after this one is read."""


class Budget:
    """Number of values that the files of one configuration may still build, all together."""

    def __init__(self, values: int = _MAX_TOTAL_VALUES):
        self._left = values

    def spend(self, node: ast.AST | None, values: int) -> None:
        """Subtract values from the budget, before they are built.

        Raises:
          BudgetSpent: the budget is exceeded.
        """
        self._left -= values
        if self._left < 0:
            raise BudgetSpent(node, f"the configuration has more than {_MAX_TOTAL_VALUES:,} values")


def describe(node: ast.AST) -> str:
    """Description of a syntax node for error messages."""
    return _DESCRIPTIONS.get(type(node), f"Python's {type(node).__name__}")


def evaluate(
    node: ast.expr,
    *,
    look_up: Callable[[str, ast.AST], Any],
    look_up_base: Callable[[tuple[str, ...], ast.AST], Any],
    budget: Budget,
) -> Any:
    """Evaluate an expression of literals, names, ``dict(...)``, arithmetic and concatenation.

    Args:
      node: the expression.
      look_up: (name, node) -> value of a name.
      look_up_base: (keys, node) -> value of ``_base_.a.b``, whose keys are ("a", "b").
      budget: budget for the values that are built. A plain name builds none.

    Raises:
      BudgetSpent: the budget is exceeded.
      Refused: the expression contains anything else, or its value is very large.
    """

    def visit(node: ast.expr) -> Any:
        budget.spend(node, 1)
        if isinstance(node, ast.Constant):
            return _check_constant(node)
        if isinstance(node, ast.Name):
            return look_up(node.id, node)
        if isinstance(node, ast.List | ast.Tuple):
            values = [visit(item) for item in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.Dict):
            return _make_dict(node, visit, budget)
        if isinstance(node, ast.Call):
            return _call_dict(node, visit, budget)
        if isinstance(node, ast.UnaryOp):
            return _negate(node, visit(node.operand))
        if isinstance(node, ast.BinOp):
            return _combine(node, visit(node.left), visit(node.right), budget)
        if isinstance(node, ast.JoinedStr):
            parts = [visit(part) for part in node.values]
            return "".join(parts)
        keys = _base_keys(node)
        if keys is None:
            raise Refused(node, f"expected a literal, got {describe(node)}")
        return look_up_base(keys, node)

    value = visit(node)
    if not isinstance(node, ast.Name):  # the value of a name was checked when it was assigned
        _check_size(node, value, budget)
    return value


def _check_constant(node: ast.Constant) -> Any:
    value = node.value
    if value is not None and not isinstance(value, bool | int | float | str):
        raise Refused(node, f"expected a number, a string, True, False or None, got {type(value).__name__}")
    if isinstance(value, str) and "{{" in value:
        raise Refused(node, "strings with {{ }} are not supported, except {{_base_.NAME}} without quotes")
    return _check_scalar(node, value)


def _check_scalar(node: ast.AST, value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise Refused(node, f"an integer has more than {_MAX_BITS} bits")
    if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
        raise Refused(node, f"a string has more than {_MAX_CHARACTERS:,} characters")
    if isinstance(value, complex):
        raise Refused(node, "expected a real number, got a complex one")
    return value


def _make_dict(node: ast.Dict, visit: Callable, budget: Budget) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:  # **value
            items = _expect_dict(value, visit(value))
            budget.spend(value, len(items))
            result |= items
            continue
        name = visit(key)
        if not isinstance(name, str | int | float | bool | None):
            raise Refused(key, f"expected a string or a number as a key, got {type(name).__name__}")
        result[name] = visit(value)
    return result


def _call_dict(node: ast.Call, visit: Callable, budget: Budget) -> dict[str, Any]:
    """The value of ``dict(mapping, key=value, **mapping)``. Other calls are refused."""
    if not isinstance(node.func, ast.Name) or node.func.id != "dict":
        raise Refused(node, f"expected a literal, got a call of {ast.unparse(node.func)[:80]}")
    if len(node.args) > 1:
        raise Refused(node, "expected dict(...) with at most one positional argument")
    result: dict[str, Any] = {}
    if node.args:
        items = _expect_dict(node.args[0], visit(node.args[0]))
        budget.spend(node, len(items))
        result = dict(items)
    named: set[str] = set()
    for keyword in node.keywords:
        value = visit(keyword.value)
        items = _expect_dict(keyword.value, value) if keyword.arg is None else {keyword.arg: value}
        budget.spend(keyword.value, len(items))
        if twice := named & set(items):
            raise Refused(keyword.value, f"dict(...) has {min(map(str, twice))} twice")
        named |= set(items)
        result |= items
    return result


def _expect_dict(node: ast.expr, value: Any) -> dict:
    if not isinstance(value, dict):
        raise Refused(node, f"expected a dict, got {type(value).__name__}")
    return value


def _negate(node: ast.UnaryOp, value: Any) -> Any:
    if not _is_number(value) or not isinstance(node.op, ast.USub | ast.UAdd):
        raise Refused(node, "expected the sign of a number")
    return -value if isinstance(node.op, ast.USub) else value


def _combine(node: ast.BinOp, left: Any, right: Any, budget: Budget) -> Any:
    """Arithmetic of numbers; + of two strings, lists or tuples; a list or tuple times a number."""
    apply = _OPERATORS.get(type(node.op))
    if apply is None:
        raise Refused(node, "expected one of the operators + - * / // % **")
    if _is_number(left) and _is_number(right):
        if isinstance(node.op, ast.Pow) and not abs(right) <= _MAX_EXPONENT:
            raise Refused(node, f"an exponent is above {_MAX_EXPONENT}")
        try:
            return _check_scalar(node, apply(left, right))
        except ArithmeticError as error:
            raise Refused(node, f"{' '.join(str(error).split())}") from error
    if isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, str | list | tuple):
        if len(left) + len(right) > _MAX_CHARACTERS:
            raise Refused(node, "the value is too large")
        size = len(left) + len(right)
        budget.spend(node, size // _CHARACTERS_PER_VALUE if isinstance(left, str) else size)
        return left + right
    if isinstance(node.op, ast.Mult):
        items, count = (left, right) if isinstance(left, list | tuple) else (right, left)
        if isinstance(items, list | tuple) and isinstance(count, int) and not isinstance(count, bool):
            if len(items) * max(count, 0) > _MAX_VALUES:
                raise Refused(node, "the value is too large")
            budget.spend(node, len(items) * max(count, 0))
            return items * count
    raise Refused(node, f"{type(left).__name__} and {type(right).__name__} cannot be combined")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _base_keys(node: ast.AST) -> tuple[str, ...] | None:
    """("a", "b") of ``_base_.a.b`` and of ``{{_base_.a.b}}``, which Python reads as a set in a set."""
    for _ in range(2):
        if isinstance(node, ast.Set) and len(node.elts) == 1:
            node = node.elts[0]
    keys: list[str] = []
    while isinstance(node, ast.Attribute):
        keys.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name) and node.id == "_base_" and keys:
        return tuple(reversed(keys))
    return None


def _check_size(node: ast.AST, value: Any, budget: Budget) -> None:
    """Refuse values with very many parts. Repeated use of names can make their number exponential."""
    left, waiting = _MAX_VALUES, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list | tuple):
            left -= len(item)
            if left < 0:
                raise Refused(node, f"a value has more than {_MAX_VALUES:,} parts")
            budget.spend(node, len(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)


def is_harmless(node: ast.expr, values: Mapping[str, Any]) -> bool:
    """Whether running an expression cannot change any value that was read before, neither now nor later.

    Args:
      node: an expression that ``evaluate`` refuses.
      values: name -> value that was assigned before.
    """
    parts = list(ast.walk(node))
    # Lambdas and generators run later, when their names may have other values.
    delayed = {id(part) for part in parts if isinstance(part, ast.Lambda | ast.GeneratorExp) and _has_call(part)}
    for part in parts:
        if isinstance(part, ast.Call):
            if not _is_harmless_call(part):
                return False
            if isinstance(part.func, ast.Name) and part.func.id in _CONSUMERS:
                delayed -= {id(argument) for argument in part.args if isinstance(argument, ast.GeneratorExp)}
        elif isinstance(part, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            return False
        elif isinstance(part, ast.Attribute | ast.Subscript) and not isinstance(part.ctx, ast.Load):
            return False  # the target of a comprehension
        elif _bound_name(part) in HARMLESS_NAMES:
            return False
    if delayed:
        return False
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return not (_has_call(node) and any(isinstance(values.get(name), dict | list) for name in names))


def _bound_name(node: ast.AST) -> str | None:
    """The name that a comprehension's target or a lambda's parameter binds."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def _has_call(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Call) for part in ast.walk(node))


def _is_harmless_call(node: ast.Call) -> bool:
    """Whether a call is one of the harmless ones, and does not call a function from its arguments, such as a sort key."""
    if ast.unparse(node.func) not in _HARMLESS_CALLS:
        return False
    if isinstance(node.func, ast.Name) and node.func.id == "dict":
        return True
    return all(
        keyword.arg is not None and (keyword.arg != "key" or isinstance(keyword.value, ast.Lambda | ast.Constant))
        for keyword in node.keywords
    )
