"""Compile a configuration's steps ahead of time for a TPU or GPU that is not attached, and report memory, FLOPs and bytes.

python -m dat_jax.compile_report --config=FILE --topology=v5e:2x2|v6e:2x2|v5p:2x2x1|h100 [--config.KEY=VALUE ...]

Memory of the training step on one chip; the largest batch size that fits on a GPU; the ops and modules that move the most bytes
in an evaluation:

  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:1x1 --steps=train --config.batch_size=64
  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=h100 --find_batch
  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:2x2 --steps=eval --top=20

Collectives inside and between four slices of 256 chips, which the network of the data center connects:

  python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:16x16 --slices=4 --steps=train \\
      --config.batch_size=8192

The number of programs that an evaluation of images of many sizes needs, and how long they take to compile:

  python -m dat_jax.compile_report --config=configs/upernet.py:dat_pp_t --topology=v5e:2x2 --evaluation \\
      --config.data.directory=/data/ADEChallengeData2016

The compiler must be installed: `pip install libtpu` for a TPU, `pip install "jax[cuda12]"` for a GPU. No data set is read, except
for the sizes of the validation images with --evaluation.
"""

from absl import flags

from dat_jax.cli.flags import fail, run_tool
from dat_jax.config.files import define_config_flag
from dat_jax.errors import UserError

_FLAGS = {
    "Steps and device": ("config=CONFIG", "topology=NAME", "slices=N", "steps=train,eval", "find_batch", "evaluation"),
    "Output": ("json=FILE", "top=ROWS"),
    "Data set and GPU description": ("classes=N", "examples=N", "target_config=FILE"),
    "Implementations of ops": ("choices=FILE",),
}


def define_flags(values: flags.FlagValues) -> None:
    """Define all flags of this command. Importing the module defines none, as dat_jax.main also has the flag ``config``."""
    define_config_flag(values)
    help_text = "Devices to compile for: v5e:2x2, v6e:2x2, v5p:2x2x1 or other sizes of these, h100, or cpu."
    flags.DEFINE_string("topology", None, help_text, flag_values=values)
    help_text = "Number of slices of this TPU topology, which the network of the data center connects."
    flags.DEFINE_integer("slices", 1, help_text, lower_bound=1, flag_values=values)
    flags.DEFINE_list("steps", ["train", "eval"], "Steps to compile: train, eval or both.", flag_values=values)
    help_text = "Find the largest batch size per chip that fits, compiling once per batch size."
    flags.DEFINE_bool("find_batch", False, help_text, flag_values=values)
    flags.DEFINE_alias("find-batch", "find_batch", flag_values=values)
    help_text = (
        "Instead of the steps, compile the network for every shape of images that an evaluation needs, and print the number of "
        "programs and their compile times."
    )
    flags.DEFINE_bool("evaluation", False, help_text, flag_values=values)
    flags.DEFINE_string("json", None, "JSON file for the report.", flag_values=values)
    help_text = "Number of rows in the tables of bytes by op and by module; 0 omits them."
    flags.DEFINE_integer("top", 0, help_text, lower_bound=0, flag_values=values)
    help_text = (
        "Number of classes, if config.data.directory names a data set (by default 1,000 for classification, 150 for "
        "segmentation and 80 for detection)."
    )
    flags.DEFINE_integer("classes", None, help_text, lower_bound=1, flag_values=values)
    help_text = "Number of training examples, if config.data.directory names a data set."
    flags.DEFINE_integer("examples", 1_281_167, help_text, lower_bound=1, flag_values=values)
    help_text = "File of choices of implementations of ops, as `dat-jax tune` writes them; by default none are chosen."
    flags.DEFINE_string("choices", None, help_text, flag_values=values)
    help_text = "File that describes a GPU to its compiler (by default an H100)."
    flags.DEFINE_string("target_config", None, help_text, flag_values=values)


def main(_: list[str]) -> None:
    """Check the flags and call ``report_steps``."""
    values = flags.FLAGS
    if values.config is None or not values.topology:
        fail("Expected --config=CONFIG --topology=NAME, such as --config=dat_pp_t --topology=v5e:2x2.")
    if values.evaluation and values.find_batch:
        fail("--evaluation and --find_batch cannot be combined.")
    if values.choices and (values.evaluation or values.find_batch):
        fail("--choices are for one batch size, and cannot be combined with --evaluation or --find_batch.")
    if values.evaluation and values.slices > 1:
        fail("--evaluation and --slices cannot be combined.")
    from dat_jax.profiling import command  # imports jax, which takes seconds

    try:
        if values.evaluation:
            command.report_evaluation(
                values.config, topology=values.topology, json_file=values.json, target_config=values.target_config
            )
            return
        command.report_steps(
            values.config,
            topology=values.topology,
            slices=values.slices,
            steps=values.steps,
            find_batch=values.find_batch,
            json_file=values.json,
            top=values.top,
            classes=values.classes,
            examples=values.examples,
            target_config=values.target_config,
            choices_file=values.choices,
        )
    except UserError as error:
        fail(str(error))


if __name__ == "__main__":
    run_tool(main, groups=_FLAGS, define_flags=define_flags)
