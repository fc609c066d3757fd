"""A real browser's EventSource reads on by itself when the API process dies. (where Chromium is installed)"""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.running import MODEL, RunningService, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
PAGE = """<!DOCTYPE html><pre id="text"></pre><pre id="ids"></pre><pre id="opened"></pre><script>
const show = (id, more) => { document.getElementById(id).textContent += more };
const source = new EventSource("URL");
source.onopen = () => show("opened", "+");
source.onmessage = (event) => {
  show("ids", event.lastEventId + " ");
  if (event.data == "[DONE]") { source.close(); return }
  for (const choice of JSON.parse(event.data).choices) show("text", choice.text);
};
</script>"""
SECONDS = 25  # until the page is looked at


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
@pytest.mark.long
def test_a_browser_reads_on(service: RunningService, tmp_path: Path) -> None:
    body = {"model": MODEL, "prompt": "The history of bread", "max_tokens": 400, "temperature": 1, "seed": 1}
    body |= {"ignore_eos": True}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with http.stream("POST", "/v1/completions", json=body | {"stream": True, "on_disconnect": "continue"}) as begun:
            name = begun.headers["x-response-id"]
    page = tmp_path / "page.html"
    page.write_text(PAGE.replace("URL", f"{service.url}/v1/requests/{name}/stream"))

    joined = service.metric("tokenrelay_streams_joined_total")

    def kill() -> None:
        wait_until(lambda: service.metric("tokenrelay_streams_joined_total") > joined, "the browser is here", 20)
        service.kill("api")

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        shown = look(page)
        killing.result()
    assert shown["text"] == expected
    ids = shown["ids"].split()
    assert ids[-1] == "done"
    assert len(set(ids)) == len(ids)
    assert len(shown["opened"]) >= 2, "the connection never broke"


def look(page: Path) -> dict[str, str]:
    """The page's elements by id, after a while. It comes from a file, so the browser is told to allow that."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-web-security"]
    flags += [f"--user-data-dir={page.parent}/profile", f"--timeout={1000 * SECONDS}"]
    command = [CHROMIUM, *flags, "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=4 * SECONDS, check=True).stdout
    return {name: html.unescape(text) for name, text in re.findall(r'<pre id="(\w+)">(.*?)</pre>', dom, re.DOTALL)}
