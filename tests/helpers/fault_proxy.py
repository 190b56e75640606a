"""A proxy in front of a storage server that fails as networks and services do."""

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Callable, Iterator

STALL_SECONDS = 5.0


class FaultProxy(http.server.ThreadingHTTPServer):
    """Forwards requests to a server, unless a fault is due.

    Attributes:
      choose_fault: function of (method, path) that returns None, "503", "429", "stall" (answers after five seconds), "cut"
        (closes the connection without an answer) or "lost" (does what is asked for, and closes the connection without an answer).
      faults: the faults that have occurred.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, server_port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.server_port_behind = server_port
        self.choose_fault: Callable[[str, str], str | None] = lambda method, path: None
        self.faults: list[str] = []

    def handle_error(self, request, client_address):
        """Clients that are gone are no error."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _forward(self):
        body = self._read_body()
        fault = self.server.choose_fault(self.command, self.path)
        if fault:
            self.server.faults.append(fault)
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        elif fault == "cut":
            self.close_connection = True
            return
        elif fault in ("503", "429"):
            self._answer(int(fault), [("Content-Type", "text/plain")], b"try again")
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.server_port_behind, timeout=60)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        behind.request(self.command, self.path, body=body, headers=headers)
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _forward

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        """Nothing is logged."""


@contextlib.contextmanager
def run_proxy(port: int, server_port: int) -> Iterator[FaultProxy]:
    """Run a proxy on a port in a thread."""
    proxy = FaultProxy(port, server_port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
