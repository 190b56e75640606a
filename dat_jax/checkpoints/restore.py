"""Weights and state that a run starts or continues from."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dat_jax.checkpoints import compatibility
from dat_jax.checkpoints.class_names import add_class_names
from dat_jax.checkpoints.inference_options import read_options
from dat_jax.checkpoints.loading import load_for_finetuning
from dat_jax.checkpoints.manager import Checkpoints
from dat_jax.errors import UserError
from dat_jax.models import lora
from dat_jax.storage import fetch

logger = logging.getLogger(__name__)


def restore_or_initialize(
    checkpoints: Checkpoints,
    config: ConfigDict,
    *,
    class_names: Sequence[str],
    abstract_state: Any,
    initialize: Callable[[], Any],
    initialize_from: Callable[[Any], Any],
) -> Any:
    """Return the state that training starts from.

    In this order:

    1. Resume: the newest intact checkpoint of the work directory. Damaged ones are set aside.
    2. Fine-tuning: a new state with the weights that ``config.init_from`` names, adapted to the model.
    3. From scratch: a new state.

    Args:
      checkpoints: checkpoints of the work directory.
      config: configuration of the run.
      class_names: names of the classes of the data, in the order of their labels.
      abstract_state: shapes, dtypes and shardings of the state.
      initialize: makes a new state with random weights.
      initialize_from: makes a new state from the variables of the model.

    Raises:
      UserError: the checkpoint is of another model or of other data, or the weights are missing, damaged or do not fit.
    """
    check = _make_check(compatibility.check, checkpoints, config, class_names)
    restored = checkpoints.restore_newest(abstract_state, check=check)
    if restored is None:
        return initialize_state(config, class_names=class_names, initialize=initialize, initialize_from=initialize_from)
    return restored[0]


def initialize_state(
    config: ConfigDict,
    *,
    class_names: Sequence[str],
    initialize: Callable[[], Any],
    initialize_from: Callable[[Any], Any],
    same_classes: bool = False,
) -> Any:
    """Return a new state, with the weights that ``config.init_from`` names if it is not "".

    Further args and errors are those of ``restore_or_initialize``.

    Args:
      same_classes: raise a UserError if the weights were trained on other classes, instead of initializing their head.
    """
    head_rows = _read_head_rows(config, len(class_names))
    state = initialize()
    if not config.init_from:
        if config.optimizer.freeze or config.lora.rank:
            logger.warning("config.init_from is empty, so the frozen parameters keep their random values.")
        return state
    fresh_params = dict(state.params)
    adapters = {name: fresh_params.pop(name) for name in (lora.GROUP,) if name in fresh_params}
    variables, adaptations = load_for_finetuning(
        config.init_from,
        fresh_variables={"params": fresh_params, **state.model_state},
        deformable_form=config.model.deformable_form,
        model_name=config.model.name,
        class_names=class_names,
        head_rows=head_rows,
        same_classes=same_classes,
    )
    for sentence in [f"Starting from the weights of {config.init_from}.", *adaptations]:
        logger.info(sentence)
    _warn_about_statistics(config)
    del state, fresh_params  # free their memory for the new state
    return initialize_from({**variables, "params": {**variables["params"], **adapters}})


def _warn_about_statistics(config: ConfigDict) -> None:
    """Log a warning if images are normalized differently from those that the initial weights were trained on."""
    recorded = read_options(config.init_from, kind="classifier")
    for name in ("mean", "std"):
        trained, current = recorded.get(name), list(config.data.get(name) or ())
        if isinstance(trained, list) and len(trained) == len(current) and trained != current:
            logger.warning(
                "The weights of %s were trained with config.data.%s=%s, and this run has %s.",
                *(config.init_from, name, ",".join(map(str, trained)), ",".join(map(str, current))),
            )


def restore_for_evaluation(
    checkpoints: Checkpoints, config: ConfigDict, *, class_names: Sequence[str], abstract_state: Any
) -> tuple[Any, int]:
    """Return the state of the checkpoint that ``config.eval.checkpoint`` selects ("best" or "latest"), and its step.

    Raises:
      UserError: there is no complete checkpoint, it is damaged, or it is of another model, of other classes or has other
        averages.
    """
    best = config.eval.checkpoint == "best"
    step = checkpoints.best_step() if best else checkpoints.latest_step()
    if step is None:
        raise UserError(f"There is no complete checkpoint in {checkpoints.directory}.")
    check = _make_check(compatibility.check_evaluation, checkpoints, config, class_names)
    state, _ = checkpoints.restore(step, abstract_state, check=check)
    return state, step


def _make_check(
    check: Callable, checkpoints: Checkpoints, config: ConfigDict, class_names: Sequence[str]
) -> Callable[[Mapping[str, Any]], None]:
    """Make ``check`` of ``compatibility`` a function of the metadata of a checkpoint."""

    def check_metadata(metadata):
        metadata = add_class_names(metadata, checkpoints.directory.parent)
        check(metadata, config, class_names=class_names)

    return check_metadata


def _read_head_rows(config: ConfigDict, classes: int) -> np.ndarray | None:
    """Rows of the loaded head for each class, from the file that ``config.init_head_rows`` names."""
    if not config.get("init_head_rows"):  # only classification has this key
        return None
    try:
        rows = np.loadtxt(fetch(config.init_head_rows), dtype=np.int64, ndmin=1)
    except (OSError, ValueError) as error:
        raise UserError(f"config.init_head_rows {config.init_head_rows} cannot be read: {error}.") from error
    if len(rows) != classes:
        raise UserError(
            f"config.init_head_rows: expected a number for each of the {classes} classes, got {len(rows)} in "
            f"{config.init_head_rows}."
        )
    return rows
