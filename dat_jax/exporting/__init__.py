"""Trained models as files that other programs load without this package. As a command: ``dat_jax.export``."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from dat_jax.exporting.files import check_files, write_exported
    from dat_jax.exporting.programs import make_program

__all__ = ["check_files", "make_program", "write_exported"]
