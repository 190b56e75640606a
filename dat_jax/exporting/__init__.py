"""Trained models as files that other programs load without this package: StableHLO, ONNX and safetensors.

``python -m dat_jax.export`` is the command. The folder that it writes also holds the weights in this package's own format,
so that ``dat_jax.load`` reads it. That format alone, a folder with model.json and params/, belongs to
``dat_jax.checkpoints.exports``.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from dat_jax.exporting.files import check_files, load_program, write_exported
    from dat_jax.exporting.hub import push_exported
    from dat_jax.exporting.programs import make_features_program, make_program

__all__ = ["check_files", "load_program", "make_features_program", "make_program", "push_exported", "write_exported"]
