"""Flags that tell a command about the other processes of a run, and the connection to them."""

from absl import flags

flags.disclaim_key_flags()  # absl takes them for flags of the command that calls this module

PROCESS_FLAGS = ("distributed=auto|on|off", "coordinator_address=HOST:PORT", "num_processes=N", "process_id=N")


def define_process_flags(values: flags.FlagValues) -> None:
    """Define the flags of ``PROCESS_FLAGS``."""
    help_text = (
        "Whether this is one of several processes. on: jax detects the others, as on a TPU pod; auto: decided by environment "
        "variables."
    )
    flags.DEFINE_enum("distributed", "auto", ["auto", "on", "off"], help_text, flag_values=values)
    help_text = "HOST:PORT of process 0, if jax cannot detect it."
    flags.DEFINE_string("coordinator_address", "", help_text, flag_values=values)
    help_text = "Number of processes, if jax cannot detect it."
    flags.DEFINE_integer("num_processes", None, help_text, flag_values=values)
    help_text = "Index of this process, from 0, if jax cannot detect it."
    flags.DEFINE_integer("process_id", None, help_text, flag_values=values)


def read_process_options(values: flags.FlagValues) -> dict:
    """Arguments of ``parallel.multihost.start`` from the values of the flags."""
    return {
        "mode": values.distributed,
        "coordinator_address": values.coordinator_address,
        "num_processes": values.num_processes,
        "process_id": values.process_id,
    }
