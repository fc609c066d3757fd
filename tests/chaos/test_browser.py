"""A real browser's EventSource reads on by itself when the API process dies. (where Chromium is installed)"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.running import MODEL, RunningService, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
PAGE = """<!DOCTYPE html><script>
const seen = { text: "", ids: [], opened: 0 };
const source = new EventSource("URL");
source.onopen = () => seen.opened++;
source.onmessage = (event) => {
  seen.ids.push(event.lastEventId);
  if (event.data != "[DONE]") {
    for (const choice of JSON.parse(event.data).choices) seen.text += choice.text;
    return;
  }
  source.close();
  fetch("/", { method: "POST", body: JSON.stringify(seen) });
};
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.long
def test_a_browser_reads_on(service: RunningService, tmp_path: Path) -> None:
    body = {"model": MODEL, "prompt": "The history of bread", "max_tokens": 400, "temperature": 1, "seed": 1}
    body |= {"ignore_eos": True}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with http.stream("POST", "/v1/completions", json=body | {"stream": True, "on_disconnect": "continue"}) as begun:
            name = begun.headers["x-response-id"]
    joined = service.metric("tokenrelay_streams_joined_total")
    with browsing(PAGE.replace("URL", f"{service.url}/v1/requests/{name}/stream"), tmp_path) as told:
        wait_until(lambda: service.metric("tokenrelay_streams_joined_total") > joined, "the browser is here")
        service.kill("api")
        [seen] = wait_until(lambda: told, "it has read everything", 60)
    assert seen["text"] == expected
    assert seen["ids"][-1] == "done"
    assert len(set(seen["ids"])) == len(seen["ids"])
    assert seen["opened"] >= 2, "the connection never broke"


@contextmanager
def browsing(page: str, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """A browser that looks at this page, and what the page tells. It may read from another server than its own."""
    told: list[dict[str, Any]] = []

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(page.encode())

        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._answer(b"")

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(body)

    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-web-security",
        f"--user-data-dir={folder}/profile",
    ]
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{site.server_port}/"
        browser = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield told
        finally:
            browser.kill()
            browser.wait()
            site.shutdown()
