"""Averages of the weights in a checkpoint."""

from collections.abc import Collection, Mapping
from typing import Any

from dat_jax.errors import UserError


def name_average(decay: float) -> str:
    """Name of one of ``config.ema_decays`` in checkpoints and metrics, such as "0.999"."""
    return str(float(decay))


def find_weights(names: Collection[str], metadata: Mapping[str, Any], ema_decay: float | None) -> str:
    """Return the place of weights in the state of a checkpoint, with "/" between the levels.

    Args:
      names: names of all arrays of the state.
      metadata: metadata of the checkpoint, see ``compatibility.describe``.
      ema_decay: decay of the average, or None for the weights that are evaluated.

    Raises:
      UserError: there is no average with this decay; the decays are listed.
    """
    evaluated = "ema_params" if any(name.startswith("ema_params/") for name in names) else "params"
    if ema_decay is None:
        return evaluated
    try:
        average = name_average(ema_decay)
    except (TypeError, ValueError) as error:
        raise UserError(f"ema_decay must be a number, got {ema_decay!r}.") from error
    decay = metadata.get("config", {}).get("ema_decay") or 0
    if decay and name_average(decay) == average:
        return evaluated
    averages = {name.split("/")[1] for name in names if name.startswith("further_averages/")}
    if average in averages:
        return f"further_averages/{average}"
    choices = sorted(averages | ({name_average(decay)} if decay else set()))
    described = f"choose one of {', '.join(choices)}" if choices else "its run has no averages (config.ema_decays)"
    raise UserError(f"There is no average of the weights with the decay {average}: {described}.")
