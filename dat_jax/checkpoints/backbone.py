"""The backbone of a trained model, for another head."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dat_jax.checkpoints.loading import load_pretrained
from dat_jax.checkpoints.model_description import Model, get_backbone
from dat_jax.errors import UserError
from dat_jax.models.backbone import Backbone
from dat_jax.models.dat import DAT
from dat_jax.models.layers import ScaleAndBias


def load_backbone(
    path: str | os.PathLike,
    *,
    out_indices: Sequence[int] | None = None,
    output_norms: bool = True,
    **overrides,
) -> tuple[Backbone, dict[str, Any]]:
    """Load the backbone of a trained model for another head. Use it as ``backbone.apply(variables, images)``.

    Args:
      path: see ``load_pretrained``.
      out_indices: indices of the stages whose maps the backbone returns, in ascending order; None for all.
      output_norms: whether each map has a LayerNorm of its own. Those of a segmentor or detector are loaded; for maps without a
        trained norm, such as all maps of a classifier, they are initialized.
      **overrides: see ``load_pretrained``.

    Returns:
      The backbone, and its variables {"params": {"dat": ..., "norms_0": ..., ...}} without the stages after the last map, on the
      default device.

    Raises:
      UserError: see ``load_pretrained``; or ``out_indices`` are not stages of the model in ascending order.
    """
    model, variables = load_pretrained(path, **overrides)
    return extract_backbone(model, variables, out_indices=out_indices, output_norms=output_norms)


def extract_backbone(
    model: Model, variables: Mapping[str, Any], *, out_indices: Sequence[int] | None, output_norms: bool
) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a model and its variables, see ``load_backbone``.

    Args:
      model: a classifier, segmentor or detector.
      variables: its variables.
      out_indices: see ``load_backbone``.
      output_norms: see ``load_backbone``.

    Raises:
      UserError: ``out_indices`` are not stages of the model in ascending order.
    """
    dat = get_backbone(model)
    try:
        indices = dat.resolve_out_indices(out_indices)
    except ValueError as error:
        raise UserError(str(error)) from error
    backbone = Backbone(dat, out_indices=indices, output_norms=output_norms, dtype=dat.dtype)
    trained = {"dat": variables["params"]} if isinstance(model, DAT) else variables["params"]["backbone"]
    needed = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 64, 64, dat.in_channels)))["params"]
    params: dict[str, Any] = {"dat": {name: trained["dat"][name] for name in needed["dat"]}}
    for index, channels in zip(indices, backbone.channels, strict=True):
        name = f"norms_{index}"
        if name in needed:
            params[name] = trained.get(name) or ScaleAndBias(channels).init(jax.random.key(0))["params"]
    return backbone, {"params": params}
