"""Trained models as files that other programs load without this package. As a command: ``dat_jax.export``."""

from typing import TYPE_CHECKING

from dat_jax import lazy

if TYPE_CHECKING:  # what _PLACES says, for type checkers
    from dat_jax.exporting.files import check_files, write_exported
    from dat_jax.exporting.programs import make_program

__all__ = ["check_files", "make_program", "write_exported"]

# Public name -> the module that has it, imported when the name is first asked for.
_PLACES = {
    "check_files": "dat_jax.exporting.files",
    "make_program": "dat_jax.exporting.programs",
    "write_exported": "dat_jax.exporting.files",
}
__getattr__, __dir__ = lazy.attach(__name__, _PLACES)
