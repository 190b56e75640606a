"""Packages of the distribution: dat_jax, with configs/ installed as dat_jax/configs.

Everything else is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dat_jax", "dat_jax.*"]), "dat_jax.configs"],
    package_dir={"dat_jax.configs": "configs"},
)
