"""Choice of an implementation for every call of a model."""

import logging
from collections.abc import Callable, Mapping, Sequence

from dat_jax.ops.calls import OpCall, chosen_implementations
from dat_jax.profiling.topologies import first_line
from dat_jax.tuning.candidates import KERNELS, find_default, list_candidates
from dat_jax.tuning.choices import Choice, Choices, get_names
from dat_jax.tuning.measurement import Measurement, measure

logger = logging.getLogger(__name__)
_COMPOSED = ("neighborhood_branch", "deformable_branch", "conv_mlp", "local_perception")
_LEAST_GAIN = 0.03  # of the time of the default; less may be noise

Measure = Callable[[OpCall, Sequence[str]], dict[str, Measurement]]


def tune(calls: Mapping[str, OpCall], *, known: Choices | None = None, measure: Measure = measure) -> Choices:
    """Choose an implementation for each call by comparing all of them on the device.

    An implementation that cannot be compiled or disagrees with the plain one is not used, and one line says so. Of the others
    the fastest is used.

    Args:
      calls: calls of a model by their keys, see ``ops.calls.recorded_calls``.
      known: choices that are there already; their calls are not measured.
      measure: what compares the implementations of a call.

    Returns:
      The choices of the calls that were not known, without those that cannot be compared.
    """
    known = known or {}
    found: Choices = {}
    names = {key: list_candidates(call) for key, call in calls.items()}
    names = {key: those for key, those in names.items() if key not in known or known[key].chosen not in those}
    found |= {key: Choice(only[0], only[0], {only[0]: Measurement()}) for key, only in names.items() if len(only) == 1}
    pending = [calls[key] for key in names if key not in found]
    # These contain other ops, so they come after those.
    for number, call in enumerate(sorted(pending, key=lambda call: call.op in _COMPOSED), 1):
        logger.info("Comparing implementations, %d of %d: %s", number, len(pending), call.key)
        try:
            with chosen_implementations(get_names({**known, **found}), differentiated=call.differentiated):
                measured = measure(call, names[call.key])
        except Exception as error:  # such as a plain implementation that does not fit in memory
            problem = first_line(error)
            logger.warning("%s: its implementations cannot be compared, so the default is used: %s", call.key, problem)
            continue
        found[call.key] = choice = choose(measured, find_default(call))
        for sentence in explain(call, choice):
            logger.warning(sentence)
    return found


def choose(measured: Mapping[str, Measurement], default: str) -> Choice:
    """The fastest implementation without a problem, or the default if it is almost as fast or all have problems."""
    costs = {name: value.seconds or value.bytes for name, value in measured.items() if not value.problem}
    costs = {name: cost for name, cost in costs.items() if cost is not None}
    chosen = min(costs, key=lambda name: costs[name], default=default)
    if default in costs and costs[default] * (1 - _LEAST_GAIN) <= costs[chosen]:
        chosen = default
    return Choice(chosen, default, dict(measured))


def explain(call: OpCall, choice: Choice) -> list[str]:
    """Sentences about implementations that have problems, and about kernels that are slower than what is used."""
    sentences = []
    used = choice.measured[choice.chosen]
    for name, value in choice.measured.items():
        if value.problem:
            sentences.append(f"{call.key}: {name} is not used, because {value.problem}.")
        elif name in KERNELS and name != choice.chosen and value.seconds and used.seconds:
            ratio = value.seconds / used.seconds
            reason = f"it takes {ratio:.2f} times as long as {choice.chosen}"
            if ratio <= 1:
                reason = f"it is less than {100 * _LEAST_GAIN:g} % faster than {choice.chosen}"
            sentences.append(f"{call.key}: the kernel is not used, because {reason}.")
    if used.problem:
        sentences.append(
            f"{call.key}: every implementation has a problem; {choice.chosen} is used, as without a comparison."
        )
    return sentences
