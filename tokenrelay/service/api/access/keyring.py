"""The API keys this process goes by: those of the file, read again when it changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import structlog

from tokenrelay.service.key_file import ApiKeys, ApiKeysError, read_api_keys
from tokenrelay.service.metrics import ApiMetrics
from tokenrelay.service.tenants import DEFAULT_TENANT, Tenant

POLL_SECONDS = 1.0  # a look at the file costs microseconds, and works on every file system

log = structlog.get_logger()

_Version = tuple[int, int, int] | None  # of the file: when it was written, its size and its inode


class Keyring:
    """Without a file it is ``open``: everybody is the default tenant. Raises ApiKeysError for a file that is no use:
    to start without keys would let everybody in, or nobody."""

    def __init__(self, path: str, metrics: ApiMetrics) -> None:
        self._path = Path(path).expanduser() if path else None
        self._metrics = metrics
        self._version: _Version = None
        self._keys = ApiKeys([])
        if self._path:
            self._read(self._path)
        else:
            metrics.tenants.name([DEFAULT_TENANT.name])

    @property
    def open(self) -> bool:
        return self._path is None

    def owner(self, secrets: list[str]) -> Tenant | None:
        """Who asks with any of these; None: nobody that is known."""
        if self.open:
            return DEFAULT_TENANT
        return next((tenant for tenant in map(self._keys.owner, secrets) if tenant), None)

    async def run(self) -> NoReturn:
        """Follow the file. One that cannot be read leaves the keys as they are."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._path:
                await asyncio.to_thread(self._refresh, self._path)

    def _refresh(self, path: Path) -> None:
        if _version(path) == self._version:
            return
        try:
            self._read(path)
        except ApiKeysError as error:
            log.error("the API keys stay as they were", reason=str(error))
            self._metrics.api_keys_broken.set(1)
        else:
            log.info("read the API keys again", number=len(self._keys))

    def _read(self, path: Path) -> None:
        self._version = _version(path)  # before reading: a change meanwhile is seen the next time
        self._keys = ApiKeys(read_api_keys(path))
        self._metrics.tenants.name(self._keys.tenants)
        self._metrics.api_keys.set(len(self._keys))
        self._metrics.api_keys_broken.set(0)


def _version(path: Path) -> _Version:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
