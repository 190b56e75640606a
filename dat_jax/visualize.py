"""Draw what a trained model predicts, samples and attends to in images.

python -m dat_jax.visualize TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR] [--html] ...

The objects in a photograph; the classes in every image of a folder; a validation set beside its annotations:

  python -m dat_jax.visualize runs/quickstart_detection photo.jpg --output=figures
  python -m dat_jax.visualize runs/quickstart_segmentation photos/ --output=figures --overwrite
  python -m dat_jax.visualize runs/upernet images/validation --output=figures --labels=annotations/validation --zero_is_ignored

The attention of a classifier to a photograph, with an interactive page:

  python -m dat_jax.visualize weights/dat_pp_t photo.jpg --output=figures --query=120,200 --html

TRAINED is the work directory of a run, or an export, also one on the Hugging Face Hub (hf://USER/REPOSITORY). Each IMAGE is an
image file, a folder of images, or "-" to read file names from stdin, one per line. DIR/<stem>.png shows:

  segmentor   the image, the predicted classes, and the probability of the most likely class; with --labels also the
              annotated classes
  detector    the image, the detections, and the points that every deformable block of the backbone samples
  classifier  the sampled points of every deformable (D) block, sized by the attention that they receive; the keys that one
              query attends to most, with the window of neighborhood (N) blocks; and the offsets

With --html a classifier also writes DIR/<stem>.html, a page that shows the attention of any query, block and group of heads. It
is a single file that works offline. Preprocessing flags default to the values stored with the model.
"""

import sys

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.cli.image_flags import IMAGE_FLAGS, define_image_flags, read_image_options
from dat_jax.errors import UserError

_FLAGS = {
    "Output": ("output=DIR", "overwrite"),
    **IMAGE_FLAGS,
    "Segmentors": (*IMAGE_FLAGS["Segmentors"], "labels=FILE_OR_DIR", "zero_is_ignored"),
    "Classifiers": (*IMAGE_FLAGS["Classifiers"], "html", "query=Y,X", "keys=N", "blocks=NAME,..."),
}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of this command."""
    define_image_flags(values)
    help_text = "Annotated label maps: PNG files of class indices (255: no class) with the same names as the images."
    flags.DEFINE_string("labels", None, help_text, flag_values=values)
    help_text = "In label files, 0 means no class and k + 1 means class k, as in ADE20K."
    flags.DEFINE_bool("zero_is_ignored", False, help_text, flag_values=values)
    help_text = "Also write DIR/<stem>.html, an interactive page for any query, block and group of heads."
    flags.DEFINE_bool("html", False, help_text, flag_values=values)
    help_text = "The query, in pixels of the image counted from 0 (by default the center)."
    flags.DEFINE_string("query", None, help_text, flag_values=values)
    flags.DEFINE_integer("keys", None, "Number of keys to draw for the query (16 by default).", flag_values=values)
    help_text = (
        "Blocks whose keys are drawn, such as stages_2/blocks_1 (by default the last D block of each stage). The page opens "
        "with the last of them."
    )
    flags.DEFINE_list("blocks", None, help_text, flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check the arguments and call ``visualize_files``."""
    if len(argv) < 3 or not values.output:
        arguments = " ".join(argv[1:]) or "nothing"
        fail(f"Expected TRAINED IMAGE... --output=DIR [--labels=FILE_OR_DIR], got {arguments}.")
    from dat_jax.visualization.command import AttentionOptions, visualize_files  # imports jax, which takes seconds

    try:
        succeeded = visualize_files(
            argv[1],
            argv[2:],
            output=values.output,
            overwrite=values.overwrite,
            recursive=values.recursive,
            labels=values.labels or None,
            zero_is_ignored=values.zero_is_ignored,
            attention=AttentionOptions(values.query, values.keys, values.blocks, values.html),
            options=read_image_options(values),
        )
    except UserError as error:
        fail(str(error))
    if not succeeded:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
