"""``/metrics`` of a model worker, in a thread, also on a socket that was inherited.

prometheus-client's own server opens its socket itself, so that a worker's successor could not start beside it.
"""

from __future__ import annotations

import socket
import threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape is not worth a line."""


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Answers until ``close``."""

    daemon_threads = True

    def __init__(self, registry: CollectorRegistry, sock: socket.socket) -> None:
        super().__init__(sock.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_name, self.server_port = sock.getsockname()[:2]
        self.setup_environ()
        self.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more: whoever shares the socket gets all that come from now on."""
        self.shutdown()
        self.server_close()
