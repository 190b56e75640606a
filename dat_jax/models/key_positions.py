"""Where the deformable blocks of a model sample their maps."""

from collections.abc import Mapping
from typing import Any

from dat_jax.models.dat import DAT


def name_positions(sown: Mapping[str, Any], dat: DAT, image_shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """What a DAT sowed, by block.

    Args:
      sown: its "intermediates"; empty where no block is deformable.
      dat: the model.
      image_shape: (height, width) of the images that it saw.

    Returns:
      {"positions": of every D block, "stages_2/blocks_1", those of its keys, (B, G, Hk, Wk, 2), (y, x), -1 and 1 the centres
      of the first and last pixel of its map; "map_shapes": the (height, width) of that map}.
    """
    positions = {
        f"{stage}/{block}": of_block["attn"]["positions"][0]
        for stage, blocks in sown.items()
        for block, of_block in blocks.items()
    }
    return {
        "positions": positions,
        "map_shapes": {name: dat.map_shape(image_shape, stage=_stage_of(name)) for name in positions},
    }


def _stage_of(block_name: str) -> int:
    """stages_2/blocks_5 -> 2."""
    return int(block_name.split("/")[0].removeprefix("stages_"))
