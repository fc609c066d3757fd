"""The file of API keys, and the command that writes it."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.service.test_cli import run
from tokenrelay.service.key_file import ApiKeys, ApiKeysError, create_api_key, read_api_keys, revoke_api_key
from tokenrelay.service.tenants import Limits, Tenant


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "of" / "keys.jsonl"


def test_a_key_is_known_by_its_hash_only(file: Path) -> None:
    limits = Limits(requests_per_minute=5)
    secret = create_api_key(file, "laptop", "alice", weight=2.0, limits=limits)
    assert re.fullmatch(r"tr-[\w-]{43}", secret)
    assert secret not in file.read_text()
    keys = ApiKeys(read_api_keys(file))
    assert keys.owner(secret) == Tenant("alice", 2.0, limits)
    assert keys.owner(secret + "x") is None
    assert keys.owner("") is None


def test_only_its_owner_may_read_it(file: Path) -> None:
    create_api_key(file, "a", "a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    create_api_key(file, "b", "b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_name_is_there_once(file: Path) -> None:
    create_api_key(file, "a", "a")
    with pytest.raises(ApiKeysError, match="already"):
        create_api_key(file, "a", "b")
    revoke_api_key(file, "a")
    with pytest.raises(ApiKeysError, match="no key called a"):
        revoke_api_key(file, "a")
    assert read_api_keys(file) == []


def test_many_at_once_lose_none(file: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        secrets = list(threads.map(lambda i: create_api_key(file, f"key-{i}", "t"), range(24)))
    keys = ApiKeys(read_api_keys(file))
    assert all(keys.owner(secret) for secret in secrets)
    assert [path.name for path in file.parent.iterdir() if path.suffix != ".lock"] == ["keys.jsonl"]


@pytest.mark.parametrize(
    ("name", "tenant", "weight", "limits"),
    [
        ("with space", "t", 1.0, {}),
        ("n", "{t}", 1.0, {}),
        ("n", "t:u", 1.0, {}),
        ("n", "", 1.0, {}),
        ("n", "t", 0.0, {}),
        ("n", "t", 1e9, {}),
        ("n", "t", 1.0, {"max_tokens": -1}),
    ],
)
def test_what_is_out_of_range_is_refused(
    file: Path, name: str, tenant: str, weight: float, limits: dict[str, int]
) -> None:
    with pytest.raises(ApiKeysError):
        create_api_key(file, name, tenant, weight=weight, limits=Limits(**limits))
    assert not file.exists()


LINE = {"name": "n", "tenant": "t", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], "line 1"),
        (["", json.dumps(LINE), '{"name": "secret"}'], "line 3"),
        ([json.dumps(LINE | {"limit": {}})], "limit"),
        ([json.dumps(LINE | {"limits": {"requests": 1}})], "requests"),
        ([json.dumps(LINE | {"sha256": "tr-a-key-that-somebody-pasted"})], "sha256"),
        ([json.dumps(LINE), json.dumps(LINE | {"sha256": "1" * 64})], "same name"),
        ([json.dumps(LINE), json.dumps(LINE | {"name": "m"})], "same sha256"),
        (["tr-a-key-that-somebody-pasted"], "line 1"),
        (["\udcff"], "line 1"),
    ],
)
def test_a_broken_line_is_told_and_no_key_with_it(tmp_path: Path, lines: list[str], told: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(ApiKeysError, match=told) as error:
        read_api_keys(path)
    assert "pasted" not in str(error.value)


def test_the_command(tmp_path: Path) -> None:
    file = f"--api-keys-file={tmp_path / 'keys'}"
    created = run("keys", "create", "laptop", "--tenant", "alice", "--tokens-per-minute", "500", "--operator", file)
    assert ApiKeys(read_api_keys(tmp_path / "keys")).owner(created.stdout.strip()) == Tenant(
        "alice", 1.0, Limits(tokens_per_minute=500), is_operator=True
    )
    listed = run("keys", "list", file).stdout
    assert all(word in listed for word in ("laptop", "alice (operator)", "500"))
    assert created.stdout.strip() not in listed
    assert run("keys", "revoke", "laptop", file).returncode == 0
    again = run("keys", "revoke", "laptop", file)
    assert (again.returncode, "no key called laptop" in again.stderr) == (1, True)
    assert "is required" in run("keys", "list").stderr
    assert '"sha256"' in run("keys", "--help").stdout


def test_serve_does_not_start_with_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("{")
    command = [sys.executable, "-m", "tokenrelay", "serve", f"--api-keys-file={tmp_path / 'keys'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "line 1" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
