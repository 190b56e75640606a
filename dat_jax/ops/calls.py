"""Calls of ops with ``implementation="auto"``: which ones a model makes, and the implementation that was chosen for each.

``dispatch`` knows the fastest implementation of an op only where it was measured. ``dat_jax.tuning`` measures the others on the
device that is there: it records the calls of a model, compares their implementations, and traces the model with its choices.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp

from dat_jax.ops import dispatch

_P = ParamSpec("_P")


@dataclasses.dataclass(frozen=True)
class OpCall:
    """A call of an op, as one device executes it.

    Attributes:
      op: a key of ``dispatch.IMPLEMENTATIONS``.
      function: the op, a function of arrays and options.
      arrays: name, shape and dtype of each array.
      batched: names of the arrays whose first axis is the batch.
      options: name and value of each other argument that is not the default.
      differentiated: whether the gradient is computed, too.
    """

    op: str
    function: Callable[..., jax.Array] = dataclasses.field(compare=False)
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    batched: frozenset[str]
    options: tuple[tuple[str, Any], ...]
    differentiated: bool

    @property
    def key(self) -> str:
        """The call in words. Calls with the same key have the same choice."""
        arrays = [f"{name}={dtype}{list(shape)}".replace(" ", "") for name, shape, dtype in self.arrays]
        options = [f"{name}={value!r}" for name, value in self.options]
        return f"{'gradient of ' * self.differentiated}{self.op}({', '.join(arrays + options)})"

    @property
    def main_array(self) -> tuple[tuple[int, ...], str]:
        """Shape (B, H, W, C) and dtype of the first array, the queries or features."""
        return self.arrays[0][1:]


def get_op(key: str) -> str:
    """Name of the op in the key of a call."""
    return key.partition("(")[0].removeprefix("gradient of ")


@dataclasses.dataclass(frozen=True)
class _Tracing:
    """How calls of ops with "auto" are traced: whether they are recorded, and which implementations they use.

    Attributes:
      differentiated: whether gradients of the calls are computed.
      choices: key of a call -> its implementation.
      recorded: where calls are recorded, or None.
    """

    differentiated: bool = False
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    recorded: dict[str, OpCall] | None = None


_TRACING: contextvars.ContextVar[_Tracing | None] = contextvars.ContextVar("tracing", default=None)


@contextlib.contextmanager
def _tracing(tracing: _Tracing) -> Iterator[None]:
    token = _TRACING.set(tracing)
    try:
        yield
    finally:
        _TRACING.reset(token)


@contextlib.contextmanager
def recorded_calls(*, differentiated: bool) -> Iterator[dict[str, OpCall]]:
    """Records the calls with "auto" that are traced within this context, and yields them by their keys.

    Args:
      differentiated: whether gradients of the calls will be computed.
    """
    recorded: dict[str, OpCall] = {}
    with _tracing(_Tracing(differentiated, recorded=recorded)):
        yield recorded


@contextlib.contextmanager
def chosen_implementations(choices: Mapping[str, str], *, differentiated: bool) -> Iterator[None]:
    """Uses the chosen implementations in calls with "auto" that are traced within this context.

    Args:
      choices: key of a call -> its implementation. Calls without a choice use that of ``dispatch``.
      differentiated: as for ``recorded_calls``.
    """
    with _tracing(_Tracing(differentiated, choices)):
        yield


def choose_call(
    op: str, function: Callable[..., jax.Array], batched: frozenset[str], arguments: Mapping[str, Any]
) -> str:
    """Records a call with "auto" if calls are recorded.

    Args:
      op: a key of ``dispatch.IMPLEMENTATIONS``.
      function: the op.
      batched: names of the arrays whose first axis is the batch.
      arguments: the arguments of the call by name, with arrays or ShapeDtypeStructs.

    Returns:
      The implementation that was chosen for the call, or "auto".
    """
    tracing = _TRACING.get()
    if tracing is None:
        return "auto"
    call = _describe_call(op, function, batched, arguments, differentiated=tracing.differentiated)
    if tracing.recorded is not None:
        tracing.recorded[call.key] = call
    return tracing.choices.get(call.key, "auto")


def _describe_call(op, function, batched, arguments, *, differentiated):
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    mesh, axes = dispatch.batch_split()
    parts = math.prod(mesh.shape[axis] for axis in axes) if mesh is not None else 1
    arrays, options = [], []
    for name, value in arguments.items():
        if hasattr(value, "shape"):
            shape = tuple(value.shape)
            if name in batched and shape[0] % parts == 0:
                shape = (shape[0] // parts, *shape[1:])
            arrays.append((name, shape, str(jnp.dtype(value.dtype))))
        elif name != "implementation" and value is not defaults[name] and value != defaults[name]:
            options.append((name, value))
    return OpCall(op, function, tuple(arrays), batched, tuple(options), differentiated)


def tunable(op: str, *, batched: tuple[str, ...]) -> Callable[[Callable[_P, jax.Array]], Callable[_P, jax.Array]]:
    """Decorator of an op: "auto" is the implementation that ``chosen_implementations`` has for the call, if any.

    Args:
      op: a key of ``dispatch.IMPLEMENTATIONS``.
      batched: names of the arrays whose first axis is the batch.
    """

    def decorate(function: Callable[_P, jax.Array]) -> Callable[_P, jax.Array]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> jax.Array:
            if kwargs.get("implementation", "auto") == "auto" and _TRACING.get() is not None:
                bound = signature.bind(*args, **kwargs)
                kwargs["implementation"] = choose_call(op, call, frozenset(batched), bound.arguments)
            return function(*args, **kwargs)

        return call

    return decorate
