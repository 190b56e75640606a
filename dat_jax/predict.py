"""Predict classes, label maps or objects in images with a trained model.

python -m dat_jax.predict TRAINED IMAGE... [--output=DIR] [--json=FILE] [--csv=FILE] [--top=5] ...

The most likely classes of every image in a folder, also as a table; the classes in a photograph; every image of a folder with
its objects drawn; names of files from another program, with all detections as JSON:

  python -m dat_jax.predict runs/quickstart photos/ --top=3 --csv=classes.csv
  python -m dat_jax.predict runs/quickstart_segmentation photo.jpg
  python -m dat_jax.predict runs/quickstart_detection photos/ --output=drawn --min_score=0.5
  find photos -name '*.png' | python -m dat_jax.predict runs/quickstart_detection - --json=objects.json --quiet

TRAINED is the work directory of a run, or an export, also one on the Hugging Face Hub (hf://USER/REPOSITORY). Each IMAGE is an
image file, a folder of images, or "-" to read file names from stdin, one per line. Results are printed, one line per image:

  classifier  the most likely classes with their probabilities; --output is not supported
  segmentor   the classes in the image with their shares of the pixels; DIR/<stem>.png holds the class index of every pixel
  detector    the classes of the objects with their scores; DIR/<stem>.png is the image with these objects drawn

--json and --csv write all results. For a detector they include detections below --min_score, and the JSON file has COCO's
format of results, with the category ids of the training data. Image ids are those of a COCO file (--annotations=FILE), or the
numbers in the file names if all names are numbers, or 1, 2, 3, ... Preprocessing flags default to the values stored with the
model.
"""

import sys

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.cli.image_flags import IMAGE_FLAGS, define_image_flags, read_image_options
from dat_jax.errors import UserError

_FLAGS = {
    "Output": ("output=DIR", "json=FILE", "csv=FILE", "overwrite", "quiet"),
    **IMAGE_FLAGS,
    "Detectors": (*IMAGE_FLAGS["Detectors"], "annotations=FILE"),
    "Classifiers": (*IMAGE_FLAGS["Classifiers"], "batch_size=N"),
}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of this command."""
    define_image_flags(values)
    flags.DEFINE_string("json", None, "JSON file for the results of all images.", flag_values=values)
    flags.DEFINE_string("csv", None, "CSV file for the results of all images.", flag_values=values)
    help_text = (
        "COCO file with the image ids for --json, by file name; also with the category ids if it has all classes."
    )
    flags.DEFINE_string("annotations", None, help_text, flag_values=values)
    flags.DEFINE_integer("batch_size", None, "Number of images per batch (8 by default).", flag_values=values)
    flags.DEFINE_bool("quiet", False, "Print errors only.", short_name="q", flag_values=values)


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    """Check the arguments and call ``predict_files``."""
    if len(argv) < 3:
        arguments = " ".join(argv[1:]) or "nothing"
        fail(f"Expected TRAINED IMAGE... [--output=DIR] [--json=FILE] [--csv=FILE], got {arguments}.")
    from dat_jax.inference.command import predict_files  # imports jax, which takes seconds

    try:
        succeeded = predict_files(
            argv[1],
            argv[2:],
            output=values.output,
            json_file=values.json or None,
            csv_file=values.csv or None,
            annotations=values.annotations or None,
            overwrite=values.overwrite,
            recursive=values.recursive,
            quiet=values.quiet,
            options=read_image_options(values),
        )
    except UserError as error:
        fail(str(error))
    if not succeeded:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
