"""Reader of pickles that imports nothing and calls nothing.

Python's unpickler calls whatever functions a pickle names. This reader only moves values on a stack. Numbers, text,
tuples, lists and dictionaries become themselves. Everything else becomes an ``Object``, which records what would have
been called and with which arguments. Every opcode takes a fixed amount of work, so a file cannot cost more time or
memory than ``MAX_BYTES`` and ``MAX_STEPS`` allow.
"""

import dataclasses
import io
import pickletools
import re
from collections.abc import Callable
from typing import Any

MAX_BYTES = 256 << 20  # per pickle; those of MMEngine contain the loss of every iteration, up to about 100 MiB
MAX_STEPS = 2_000_000  # opcodes per pickle; those of training checkpoints have about a hundred per tensor
_MAX_NAME = 1000  # characters in the name of a global

# Modules whose functions run programs or load code. A file that names one of them attacks whoever opens it with
# PyTorch. Refusing such a file is a courtesy: safety does not depend on this list, as no function is ever called.
_CODE_MODULES = re.compile(
    r"asyncio|code|codeop|ctypes|ftplib|imp|importlib|marshal|nt|os|pdb|pip|posix|pty|runpy|shutil|socket|subprocess|sys|"
    r"timeit|urllib|webbrowser"
)
# Parts of a dotted name that lead to such functions through another module, as in torch.serialization.os.system.
_CODE_NAMES = re.compile(
    r"(.*\.)?(__import__|builtins|eval|exec|hub|importlib|os|popen|posix|subprocess|sys|system)(\..*)?"
)
_CODE_BUILTINS = re.compile(r"__import__|breakpoint|compile|eval|exec|execfile|file|input|open")
_MAPPINGS = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("__builtin__", "dict"),
}


class PickleError(ValueError):
    """A pickle that is malformed or too large."""


class CodeError(ValueError):
    """A pickle that names a function which runs code."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function that a pickle names. It is never imported."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class Object:
    """An object that is not built.

    Attributes:
      maker: class or function that would make it.
      arguments: its arguments.
      state: the state that would be set on it.
      entries: the items that would be set on it.
    """

    __slots__ = ("arguments", "entries", "maker", "state")

    def __init__(self, maker: Global, arguments: Any):
        self.maker, self.arguments = maker, arguments
        self.state: Any = None
        self.entries: dict[str, Any] = {}


def read_pickle(
    stream: io.BytesIO, *, construct: Callable[[Global, Any], Any], load_persistent: Callable[[Any], Any]
) -> Any:
    """Read one pickle from a stream, and leave the stream at its end.

    Args:
      stream: in memory, because a length in a pickle may be any number.
      construct: (global, arguments) -> value that represents the result of the call, such as an ``Object``.
      load_persistent: persistent id -> value.

    Returns:
      The value of the pickle.

    Raises:
      PickleError: the pickle is malformed, or larger than the limits.
      CodeError: the pickle names a function that runs code.
    """
    machine = _Machine(construct, load_persistent)
    position = stream.tell()
    try:
        for opcode, argument, position in pickletools.genops(stream):  # noqa: B007
            machine.spend(1)
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.run(opcode.name, argument)
    except (CodeError, PickleError):
        raise
    except Exception as error:  # an opcode whose operands have unexpected types
        raise PickleError(f"its pickle is malformed at byte {position}") from error
    raise PickleError("its pickle has no end")


def check_global(module: str, name: str) -> Global:
    """Create the global of a pickle.

    Raises:
      CodeError: the global is known to run code.
    """
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("the name of a global is not text")
    if len(module) + len(name) > _MAX_NAME:
        raise ValueError("the name of a global is too long")
    package, *parts = f"{module}.{name}".split(".")
    if package in ("builtins", "__builtin__"):
        runs_code = _CODE_BUILTINS.fullmatch(name)
    else:
        runs_code = _CODE_MODULES.fullmatch(package) or any(map(_CODE_NAMES.fullmatch, parts))
    if runs_code:
        raise CodeError(f"{module}.{name}")
    return Global(module, name)


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, construct, load_persistent):
        self._construct, self._load_persistent = construct, load_persistent
        self._steps = 0
        self.stack: list = []
        self._marked: list[list] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise PickleError(f"its pickle has more than {MAX_STEPS:,} steps; save only the weights")

    def run(self, name: str, argument: Any) -> None:
        _ACTIONS[name](self, argument)  # a KeyError for opcodes that no weights file has

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take_marked(self) -> list:
        """The values above the last mark."""
        values, self.stack = self.stack, self._marked.pop()
        return values

    def take(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise IndexError
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def mark(self, _):
        self._marked.append(self.stack)
        self.stack = []

    def pop(self, _):
        if self.stack:
            self.stack.pop()
        else:
            self.take_marked()

    def extend(self, values):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Object):  # items of an Object are dropped
            raise TypeError

    def set_entries(self, values):
        if len(values) % 2:
            raise ValueError
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Object) else target
        if not isinstance(entries, dict):
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            if isinstance(key, str):  # other keys never name weights, and may be expensive to hash
                entries[key] = value

    def make_dict(self, _):
        values = self.take_marked()
        self.push({})
        self.set_entries(values)

    def name_global(self, module, name):
        self.push(check_global(module, name))

    def call(self, maker, arguments):
        if not isinstance(arguments, tuple | list):
            raise TypeError
        if isinstance(maker, Object):  # such as a method from getattr
            self.push(Object(maker.maker, arguments))
        elif not isinstance(maker, Global):
            raise TypeError
        elif (maker.module, maker.name) in _MAPPINGS:
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []  # Python 2 wrote them so
            self.spend(3 * len(pairs))
            self.push({key: value for key, value in pairs if isinstance(key, str)})
        else:
            self.push(self._construct(maker, arguments))

    def build(self, _):
        state = self.stack.pop()
        if isinstance(self.stack[-1], Object):
            self.stack[-1].state = state

    def memoize(self):
        self.put(len(self._memo))

    def put(self, index):
        self._memo[index] = self.stack[-1]

    def get(self, index):
        self.push(self._memo[index])

    def persist(self, pid):
        self.push(self._load_persistent(pid))


_ACTIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _Machine.push
    ),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    # A set is a list here: nothing needs one, and its values might be expensive to hash.
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, _: machine.push([])),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.take_marked(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.take_marked())),
    "TUPLE1": lambda machine, _: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.take(3)),
    "LIST": lambda machine, _: machine.push(machine.take_marked()),
    "FROZENSET": lambda machine, _: machine.push(machine.take_marked()),
    "DICT": _Machine.make_dict,
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.take_marked()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.take_marked()),
    "SETITEM": lambda machine, _: machine.set_entries(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_entries(machine.take_marked()),
    "GLOBAL": lambda machine, names: machine.name_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name_global(*machine.take(2)),
    "INST": lambda machine, names: machine.call(check_global(*names.split(" ", 1)), machine.take_marked()),
    "OBJ": lambda machine, _: _make_instance(machine, machine.take_marked()),
    "REDUCE": lambda machine, _: machine.call(*machine.take(2)),
    "NEWOBJ": lambda machine, _: machine.call(*machine.take(2)),
    "NEWOBJ_EX": lambda machine, _: machine.call(*machine.take(3)[:2]),
    "BUILD": _Machine.build,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda machine, _: machine.memoize(),
    "PERSID": _Machine.persist,
    "BINPERSID": lambda machine, _: machine.persist(machine.stack.pop()),
}


def _make_instance(machine: _Machine, values: list) -> None:
    machine.call(values[0], values[1:])
