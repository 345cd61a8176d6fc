"""A server that answers every request alike."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class _Says(http.server.BaseHTTPRequestHandler):
    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    asked: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012 (replaced for each server)

    def _say(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.asked.append((self.path, dict(self.headers)))
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    do_GET = do_POST = _say  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def saying(status: int, body: bytes | dict[str, Any], **headers: str) -> Iterator[tuple[str, Any]]:
    """A server that answers everything alike; its address, and what it was asked."""
    text = json.dumps(body).encode() if isinstance(body, dict) else body
    handler = type("Says", (_Says,), {"answer": (status, headers, text), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def an_error(code: int, message: str = "words", hint: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "hint": hint}}
