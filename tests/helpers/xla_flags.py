"""Flags of XLA that make tests compile faster, as far as the installed version knows them."""

import functools
import os
import subprocess
import sys

# Tests compile far more than they compute. Without LLVM's optimizations compiling takes half the time, and less than half
# of that again where XLA can still emit fused loops the older way, which produces less code.
_FAST_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)
_START_XLA = "from jaxlib import xla_client; xla_client.make_cpu_client()"


@functools.cache
def fast_compilation_flags() -> tuple[str, ...]:
    """Return the flags of ``_FAST_COMPILATION`` that the installed XLA knows.

    XLA ends the process at a flag that it does not know, so each one is tried in a process of its own.
    """
    return tuple(flag for flag in _FAST_COMPILATION if is_known(flag))


def is_known(flag: str) -> bool:
    """Return whether XLA starts with this flag, which takes about 0.1 s."""
    environment = {**os.environ, "XLA_FLAGS": flag}
    started = subprocess.run([sys.executable, "-c", _START_XLA], env=environment, capture_output=True, text=True)
    if started.returncode and "Unknown flag" not in started.stderr:
        raise RuntimeError(f"XLA cannot be started with {flag}: {started.stderr}")
    return started.returncode == 0
