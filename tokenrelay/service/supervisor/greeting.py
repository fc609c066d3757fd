"""What a newcomer needs, printed once the server can answer."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Sequence

from rich.console import Console

from tokenrelay.service.settings import Settings

POLL_SECONDS = 0.1


async def greet_when_ready(settings: Settings, metrics_ports: Sequence[int]) -> None:
    """Wait until a request would be answered; then say how to send one."""
    started = time.monotonic()
    while not await asyncio.to_thread(_is_ready, settings):  # noqa: ASYNC110 - it polls another process
        await asyncio.sleep(POLL_SECONDS)
    url = f"http://{settings.host}:{settings.port}"
    metrics = " ".join(f"http://{settings.host}:{port}/metrics" for port in metrics_ports)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"\n[bold green]ready[/bold green] after {time.monotonic() - started:.1f} s: "
        f"[bold]{settings.served_model_name}[/bold] at {url}/v1\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{settings.served_model_name}", "stream": true, '
        '"messages": [{"role": "user", "content": "What is the capital of France?"}]}\'\n\n'
        f"  docs {url}/docs · metrics {url}/metrics {metrics}\n",
        markup=True,
    )


def _is_ready(settings: Settings) -> bool:
    connection = http.client.HTTPConnection(settings.host, settings.port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
