"""Choice of what the backward pass recomputes, by the memory that a training step may take."""

import logging

import jax

from dat_jax.cli.console import format_size
from dat_jax.errors import UserError
from dat_jax.parallel import multihost, sharding
from dat_jax.profiling.memory import device_bytes, peak_bytes
from dat_jax.training.trainer import Trainer

logger = logging.getLogger(__name__)
POLICIES = (
    "none",
    "dots",
    "blocks",
)  # values of ``DAT.remat``, from the fastest to the one that takes the least memory
_SHARE = 0.9  # of a device's memory, for a budget of -1: the rest is for programs of evaluations, and for fragmentation


def choose_remat(trainer: Trainer, *, compiler_options: dict | None = None) -> Trainer:
    """Make the run with the first of ``POLICIES`` whose compiled training step needs at most ``config.memory_budget``.

    All processes must call it. Nothing is run. With the compilation cache, the step is not compiled again later.

    Args:
      trainer: the run, before its first step, with its ``choices``.
      compiler_options: for ``Lowered.compile``.

    Returns:
      The run with ``config.model.remat`` replaced; the same run if the budget is 0.

    Raises:
      UserError: no choice fits, or the budget is -1 and the memory of the devices is unknown.
    """
    budget = trainer.config.memory_budget
    if not budget:
        return trainer
    limit = budget * 2**30 if budget > 0 else _SHARE * _find_memory(trainer)
    for policy in POLICIES:
        candidate = trainer.with_remat(policy)
        needed = _measure(candidate, compiler_options)
        fits = needed is not None and needed <= limit
        if all(text == "True" for text in multihost.gather_texts(str(fits))):
            assert needed is not None
            logger.info(
                "remat %s: the training step needs %s of each device, within the %s of config.memory_budget.",
                *(policy, format_size(needed), format_size(limit)),
            )
            return candidate
        amount = "more memory than a device has" if needed is None else format_size(needed)
        logger.info("remat %s: the training step needs %s, more than %s.", policy, amount, format_size(limit))
    raise UserError(
        f"The training step does not fit into the {format_size(limit)} of config.memory_budget with any remat. Set "
        "--config.accumulate_steps=2 or more, a smaller --config.batch_size, or a larger --config.mesh.fsdp."
    )


def _find_memory(trainer: Trainer) -> float:
    sizes = [device_bytes(device) for device in trainer.mesh.local_devices]
    known = [size for size in sizes if size is not None]
    if not known:
        kind = trainer.mesh.devices.ravel()[0].device_kind
        raise UserError(
            f"config.memory_budget=-1 needs devices whose memory is known, got {kind}: give a number of GiB."
        )
    return min(known)


def _measure(trainer: Trainer, compiler_options: dict | None) -> int | None:
    """Bytes that the training step needs on each device, or None if the compiler ran out of memory."""
    where = sharding.batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        for name, leaf in trainer.task.example_batch(trainer.config.batch_size).items()
    }
    lowered = trainer.jitted_train_step.lower(*trainer.step_arguments(trainer.abstract_state, batch))
    try:
        return peak_bytes(lowered.compile(compiler_options).memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
