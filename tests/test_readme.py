"""The README is true: its tables are the code's, its blocks run, its files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.service.running import RunningService
from tokenrelay.service.metrics import ApiMetrics, WorkerMetrics
from tokenrelay.service.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def section(name: str) -> str:
    return README.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0].strip()


def settings_table() -> str:
    rows = ["| setting | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{field.default}`" if field.default != "" else "–"
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def metrics_table() -> str:
    rows = ["| metric | type | process | |", "|---|---|---|---|"]
    for process, declared in (("API", ApiMetrics), ("worker", WorkerMetrics)):
        registry = CollectorRegistry()
        declared(registry, "m")
        for family in registry.collect():
            suffix = "_total" if family.type == "counter" else ""
            rows.append(f"| `{family.name}{suffix}` | {family.type} | {process} | {family.documentation} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_the_code() -> None:
    assert section("settings") == settings_table()


def test_the_table_of_metrics_is_the_code() -> None:
    assert section("metrics") == metrics_table()


def test_files_it_names_exist() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    files = {f"/{path}" for top in ("benchmarks", "tests", "tokenrelay") for path in (ROOT / top).rglob("*.py")}
    for path in re.findall(r"[\w/]+\.py", tree):
        assert any(file.endswith(f"/{path}") for file in files), path


@pytest.mark.parametrize(("language", "block"), [b for b in BLOCKS if "make " not in b[1]])
def test_its_blocks_run(service: RunningService, language: str, block: str) -> None:
    block = block.replace("http://127.0.0.1:8000", service.url)
    command = ["sh", "-ec", block] if language == "sh" else [sys.executable, "-c", block]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Paris|sky", done.stdout), done.stdout
