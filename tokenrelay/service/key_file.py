"""The file of API keys: one JSON object per line, without the keys themselves.

A key is 256 random bits, so its SHA-256 tells nobody what it is, and needs neither salt nor slow hashing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hmac import compare_digest
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import to_builtins

from tokenrelay.service.tenants import MAX_WEIGHT, MIN_WEIGHT, NO_LIMITS, Limits, Tenant

PREFIX = "tr-"  # by which scanners for leaked secrets may know one
SECRET_BYTES = 32
MAX_FILE_BYTES = 16 << 20

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]  # they become parts of Redis keys


class ApiKeysError(ValueError):
    """The file cannot be used; the message says where and why, and never what a key is."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One line of the file."""

    name: Name
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    tenant: Name
    weight: Annotated[float, msgspec.Meta(ge=MIN_WEIGHT, le=MAX_WEIGHT)] = 1.0
    limits: Limits = NO_LIMITS
    operator: bool = False
    created: str = ""

    @property
    def owner(self) -> Tenant:
        return Tenant(self.tenant, self.weight, self.limits, self.operator)


class ApiKeys:
    """Those of one version of the file."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(key.sha256.encode(), key.owner) for key in keys]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def tenants(self) -> list[str]:
        """Their names, in the file's order."""
        return list(dict.fromkeys(tenant.name for _, tenant in self._keys))

    def owner(self, secret: str) -> Tenant | None:
        """Whose key this is. Takes as long for a wrong one as for a right one."""
        presented = digest(secret).encode()
        owners = [tenant for known, tenant in self._keys if compare_digest(known, presented)]
        return owners[0] if owners else None


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def read_api_keys(path: Path) -> list[ApiKey]:
    """Raises ApiKeysError when the file is not there, or any line of it is wrong."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ApiKeysError(f"cannot read the API keys in {path}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ApiKeysError(f"cannot use the API keys in {path}: it is larger than {MAX_FILE_BYTES >> 20} MB")
    keys = [_parse(path, number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    for what in ("name", "sha256"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise ApiKeysError(f"cannot use the API keys in {path}: two of them have the same {what}")
    return keys


def _parse(path: Path, number: int, line: bytes) -> ApiKey:
    try:
        return msgspec.json.decode(line, type=ApiKey)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiKeysError(f"cannot use the API keys in {path}, line {number}: {error}") from None


def create_api_key(
    path: Path, name: str, tenant: str, *, weight: float = 1.0, limits: Limits = NO_LIMITS, operator: bool = False
) -> str:
    """Add a key to the file, which need not exist. Returns the key: it is kept nowhere. Raises ApiKeysError."""
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    fields = {"name": name, "tenant": tenant, "weight": weight, "limits": to_builtins(limits), "operator": operator}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        key = msgspec.convert({**fields, "sha256": digest(secret), "created": created}, ApiKey)
    except msgspec.ValidationError as error:
        raise ApiKeysError(f"not a key: {error}") from None
    with _rewriting(path) as keys:
        if any(name == known.name for known in keys):
            raise ApiKeysError(f"there is a key called {name} already; revoke it, or choose another name")
        keys.append(key)
    return secret


def revoke_api_key(path: Path, name: str) -> None:
    """Take a key out of the file. Raises ApiKeysError when it is not there."""
    with _rewriting(path) as keys:
        left = [key for key in keys if key.name != name]
        if len(left) == len(keys):
            raise ApiKeysError(f"there is no key called {name}")
        keys[:] = left


@contextmanager
def _rewriting(path: Path) -> Iterator[list[ApiKey]]:
    """Changes go into a new file, which takes the place of the old one at once: no reader sees half of it."""
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_api_keys(path) if path.exists() else []
        yield keys
        _replace(path, b"".join(msgspec.json.encode(key) + b"\n" for key in keys))


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:  # mode 0600
        if path.exists():
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777)  # the server may be another user of the group
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
