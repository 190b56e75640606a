"""Key positions of the deformable blocks of a model, by block."""

from collections.abc import Mapping, Sequence
from typing import Any

from dat_jax.models.dat import DAT


def name_positions(sown: Mapping[str, Any], dat: DAT, image_shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Key positions that a DAT sowed, by block.

    Args:
      sown: the "intermediates" collection of the DAT; empty if no block is deformable.
      dat: the model.
      image_shape: (height, width) of its input images.

    Returns:
      Two dictionaries with a key for every D block, such as "stages_2/blocks_1".

      * "positions": key positions, (B, G, Hk, Wk, 2), (y, x), with -1 and 1 at the centers of the first and last pixel of the
        block's map.
      * "map_shapes": (height, width) of that map.
    """
    positions = {
        f"{stage}/{block}": intermediates["attn"]["positions"][0]
        for stage, blocks in sown.items()
        for block, intermediates in blocks.items()
    }
    return {
        "positions": positions,
        "map_shapes": {name: dat.map_shape(image_shape, stage=_stage_index(name)) for name in positions},
    }


def crop_positions(positions: Mapping[str, Any], dat: DAT, image_shape: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Key positions and map shapes of an image that is the top left of a larger array.

    Args:
      positions: "positions" of ``name_positions`` for one example of the array, (G, Hk, Wk, 2) for each block.
      dat: the model.
      image_shape: (height, width) of the image.

    Returns:
      "positions" and "map_shapes" as ``name_positions`` returns them for the image alone, without the batch axis.
    """
    cropped = {}
    for name, values in positions.items():
        rows, columns = dat.key_shape(image_shape, stage=_stage_index(name))
        cropped[name] = values[:, :rows, :columns]
    return {
        "positions": cropped,
        "map_shapes": {name: dat.map_shape(image_shape, stage=_stage_index(name)) for name in positions},
    }


def _stage_index(block_name: str) -> int:
    """Index of the stage: "stages_2/blocks_5" -> 2."""
    return int(block_name.split("/")[0].removeprefix("stages_"))
