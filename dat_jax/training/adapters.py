"""Training of low-rank adapters instead of the weights of a model, see ``models.lora``."""

import dataclasses

import jax
from ml_collections import ConfigDict

from dat_jax.errors import UserError
from dat_jax.models.lora import GROUP, init_adapters, merge_adapters
from dat_jax.tasks.objective import Objective


def with_adapters(objective: Objective, config: ConfigDict) -> Objective:
    """The objective of a model with adapters: its parameters have a further group, which ``loss`` and ``predict`` merge.

    Args:
      objective: the objective of the model.
      config: the group ``lora`` of a configuration; with a rank of 0 the objective is returned unchanged.

    Raises:
      UserError: from ``init``, if the model has none of the layers.
    """
    if not config.rank:
        return objective

    def init(key, batch):
        variables = objective.init(key, batch)
        params = variables["params"]
        try:
            adapters = init_adapters(jax.random.fold_in(key, 1), params, rank=config.rank, layers=config.layers)
        except ValueError as error:
            raise UserError(f"config.lora.layers {tuple(config.layers)!r} cannot be used: {error}") from None
        return {**variables, "params": {**params, GROUP: adapters}}

    def merged(function):
        def call(variables, *arguments):
            params = merge_adapters(variables["params"], scale=config.alpha / config.rank)
            return function({**variables, "params": params}, *arguments)

        return call

    names = ("loss", "predict", "outputs", "embed")
    functions = {name: getattr(objective, name) for name in names}
    changed = {name: merged(function) for name, function in functions.items() if function is not None}
    return dataclasses.replace(objective, init=init, **changed)
