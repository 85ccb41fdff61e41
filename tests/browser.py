"""A headless Chromium that opens pages of a loopback server, and what its scripts send back."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('chrome')
OPTIONS = (
    *('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run'),
    *('--disable-background-networking', '--disable-component-update', '--disable-sync'),
    *('--hide-scrollbars', '--disable-dev-shm-usage', '--mute-audio'),
)


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder, further pages from memory, and takes what is posted to /result."""

    extensions_map = {  # noqa: RUF012
        **SimpleHTTPRequestHandler.extensions_map,
        '.mjs': 'text/javascript',
        '.wasm': 'application/wasm',
    }

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition('?')[0])  # type: ignore[attr-defined]
        if page is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header('Content-Type', 'text/html; charset=utf-8')
        self.end_headers()
        self.wfile.write(page.encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.server.results.put(json.loads(body))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]


@contextmanager
def serve(folder: Path, pages: dict[str, str] | None = None) -> Iterator[Any]:
    """A server of a folder; `pages` are added by their paths.

    Attributes of what is yielded: `url`, `asked` (paths that were requested), `results`.
    """
    server = ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(_Handler, directory=str(folder))
    )
    server.pages, server.results, server.asked = pages or {}, queue.Queue(), []  # type: ignore[attr-defined]
    server.url = f'http://127.0.0.1:{server.server_port}'  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def run(server: Any, path: str, seconds: float = 120) -> Any:
    """Open a page whose script posts to /result, and return what it posted."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, f'--user-data-dir={profile}', '--remote-debugging-port=0',
             server.url + path],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            return server.results.get(timeout=seconds)
        finally:
            process.terminate()
            process.wait(20)


def screenshot(url: str, path: Path, width: int, height: int, seconds: int = 20) -> None:
    """Draw a page, after `seconds` of its own time."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        subprocess.run(
            [CHROMIUM, *OPTIONS, f'--user-data-dir={profile}', f'--screenshot={path}',
             f'--window-size={width},{height}', f'--virtual-time-budget={1000 * seconds}', url],
            check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def width_of(page: Path, width: int) -> int:
    """How many pixels a page is wide in a window of `width`: more than that has to be scrolled."""
    frame = (
        f'<iframe id="page" src="/{page.name}" width="{width}" height="800" style="border:0">'
        '</iframe><script>page.onload = () => fetch("/result", {method: "POST", body: '
        'JSON.stringify(page.contentDocument.documentElement.scrollWidth)})</script>'
    )
    with serve(page.parent, {'/frame': frame}) as server:
        return run(server, '/frame')
