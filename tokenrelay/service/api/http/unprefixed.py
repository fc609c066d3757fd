"""The routes below ``/v1`` answer without it, too: some clients are given a base URL and leave it out."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

PREFIX = "/v1"


class UnprefixedMiddleware:
    """Completes a path before anything else looks at it, authentication first of all.

    Only where the first part of the path is that of a route below ``/v1``, and of no other route.
    """

    def __init__(self, app: ASGIApp, paths: Iterable[str]) -> None:
        """``paths``: of all routes."""
        self._app = app
        paths = list(paths)
        below = {_first_part(path.removeprefix(PREFIX)) for path in paths if path.startswith(f"{PREFIX}/")}
        self._missing_prefix = below - {_first_part(path) for path in paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _first_part(scope["path"]) in self._missing_prefix:
            scope = {**scope, "path": PREFIX + scope["path"], "raw_path": PREFIX.encode() + scope.get("raw_path", b"")}
        await self._app(scope, receive, send)


def _first_part(path: str) -> str:
    """``/chat/completions`` → ``chat``"""
    return path.partition("/")[2].partition("/")[0]
