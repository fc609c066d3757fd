"""The deployment files agree with the code and with each other. Nothing here needs a Docker daemon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tokenrelay.service.metrics import ApiMetrics, WorkerMetrics, new_registry
from tokenrelay.service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
PROMETHEUS = ROOT / "deploy/prometheus/prometheus.yml"
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
DATASOURCE = ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml"
DASHBOARD = ROOT / "deploy/grafana/dashboards/tokenrelay.json"
OURS = ("model", "api", "worker")
# Declared, but of no use on a dashboard: each with its reason.
NOT_ON_DASHBOARD: set[str] = set()


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), comments dropped and continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


COMPOSE = read_yaml(ROOT / "docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


# --- Dockerfile -----------------------------------------------------------------------------------------------------


def is_ignored(path: str) -> bool:
    """Docker's rule: the last line that matches the path or one of its parents decides; ``!`` takes it back in."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        pattern = re.sub(r"\\\[(.*?)\\\]", r"[\1]", pattern)
        if re.fullmatch(f"(?:{pattern})(?:/.*)?", path):
            ignored = not line.startswith("!")
    return ignored


def copied_sources() -> list[Path]:
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    return [ROOT / source for words in copies for source in words[:-1]]


def test_every_copied_path_exists_and_reaches_the_builder() -> None:
    assert copied_sources()
    for source in copied_sources():
        assert source.exists(), f"COPY {source}: no such file"
        inside = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        lost = {p.relative_to(ROOT).as_posix() for p in inside if is_ignored(p.relative_to(ROOT).as_posix())}
        assert all(re.search(r"__pycache__/|\.(pyc|so|o)$", p) for p in lost), f"ignored, but needed: {lost}"


@pytest.mark.parametrize("path", [".git/config", ".env", ".venv/bin/python", "model.gguf", "tokenrelay/a/_native.so"])
def test_what_must_not_reach_the_builder_is_ignored(path: str) -> None:
    assert is_ignored(path)


def test_the_last_stage_has_no_compiler_and_no_root() -> None:
    starts = [i for i, (word, _) in enumerate(instructions()) if word == "FROM"]
    runtime = instructions()[starts[-1] :]
    assert not any("apt-get" in rest or "pip install" in rest for word, rest in runtime if word == "RUN")
    users = [rest for word, rest in runtime if word == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a numeric user: Kubernetes cannot check a name"
    assert any(word == "HEALTHCHECK" for word, _ in runtime)


def test_the_image_has_the_versions_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert f"torch=={arguments['TORCH_VERSION']}" in project["dependencies"]
    python = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    assert python, "pin the patch release and the Debian release"
    assert python[1] == project["requires-python"].removeprefix(">=")


def test_every_setting_that_a_file_names_exists() -> None:
    known = {f"TOKENRELAY_{name.upper()}" for name in Settings.model_fields}
    for name in ("Dockerfile", "docker-compose.yml", "deploy/compose.cuda.yml", "deploy/healthcheck.py"):
        named = set(re.findall(r"\bTOKENRELAY_[A-Z_]+", (ROOT / name).read_text()))
        assert named <= known, f"{name}: {named - known}"


@pytest.fixture(params=[200, 503])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """(port, the status it answers)"""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield httpd.server_port, request.param
        httpd.shutdown()
        thread.join()


def healthcheck(port: int) -> int:
    command = [sys.executable, str(ROOT / "deploy/healthcheck.py"), "/livez", str(port)]
    return subprocess.run(command, capture_output=True, env={"http_proxy": "http://127.0.0.1:1"}).returncode


def test_healthcheck_tells_200_from_anything_else(server: tuple[int, int]) -> None:
    port, status = server
    assert healthcheck(port) == (0 if status == 200 else 1)


def test_healthcheck_fails_where_nothing_listens() -> None:
    assert healthcheck(1) == 1


# --- docker-compose.yml ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docker-compose.yml", "deploy/compose.cuda.yml"])
def test_compose_file_follows_the_compose_specification(name: str) -> None:
    package = pytest.importorskip("check_jsonschema", reason="it ships the specification's schema")
    schema = json.loads((files(package) / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(read_yaml(ROOT / name))


def test_docker_compose_accepts_both_files() -> None:
    if not shutil.which("docker") or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    for names in (["docker-compose.yml"], ["docker-compose.yml", "deploy/compose.cuda.yml"]):
        options = [word for name in names for word in ("-f", name)]
        run(["docker", "compose", *options, "config", "--quiet"])


def test_what_compose_refers_to_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES), name
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name
        for source, *_ in (volume.split(":") for volume in service.get("volumes", [])):
            is_path = source.startswith(".")
            assert (ROOT / source).is_dir() if is_path else source in COMPOSE["volumes"], f"{name}: {source}"
        for other, how in service.get("depends_on", {}).items():
            health = SERVICES[other]["healthcheck"].get("test")
            assert health or how["condition"] == "service_completed_successfully", f"{name} waits for {other} in vain"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened_and_watched(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service
    assert "test" in service["healthcheck"] or name == "model", "only the one-shot service has no health"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "loopback unless asked otherwise"
    assert re.search(r":v?\d+\.\d+", service["image"]) or name in OURS, "pin major and minor"


def test_a_worker_can_be_scaled_and_a_drain_is_not_cut_short() -> None:
    assert not {"container_name", "ports"} & set(SERVICES["worker"]), "the second replica would collide"
    for name in ("api", "worker"):
        drain = float(SERVICES[name]["environment"]["TOKENRELAY_DRAIN_SECONDS"])
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain


def test_the_broker_keeps_its_promises_and_is_out_of_reach() -> None:
    command = SERVICES["valkey"]["command"]
    for option in ("--appendonly yes", "--appendfsync everysec", "--maxmemory-policy noeviction", "--maxmemory "):
        assert option in command
    assert SERVICES["valkey"]["networks"] == ["broker"]
    assert COMPOSE["networks"]["broker"] == {"internal": True}


# --- Prometheus and Grafana -----------------------------------------------------------------------------------------


def declared() -> dict[str, set[str]]:
    """Each declared metric with the names of its series."""
    registry = new_registry()
    ApiMetrics(registry, "m"), WorkerMetrics(registry, "m")
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    return {m.name: {m.name + s for s in suffixes[m.type]} for m in registry.collect()}


def used(expressions: list[str]) -> set[str]:
    return {name for e in expressions for name in re.findall(r"\b(?:tokenrelay|process|python)_\w+", e)}


def panels() -> list[dict[str, Any]]:
    everything: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return everything


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel.get("targets", [])]


def alert_expressions() -> list[str]:
    return [rule["expr"] for group in read_yaml(ALERTS)["groups"] for rule in group["rules"]]


def test_every_metric_shown_or_alerted_on_is_declared() -> None:
    series = set().union(*declared().values())
    assert used(dashboard_expressions()) <= series
    assert used(alert_expressions()) <= series


def test_every_declared_metric_is_shown() -> None:
    shown = used(dashboard_expressions())
    ours = {name: series for name, series in declared().items() if name.startswith("tokenrelay_")}
    assert {name for name, series in ours.items() if not series & shown} == NOT_ON_DASHBOARD


def test_dashboard_panels_are_distinct_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_what_is_provisioned_is_where_compose_mounts_it() -> None:
    [source] = read_yaml(DATASOURCE)["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == read_yaml(PROMETHEUS)["global"]["scrape_interval"]
    [provider] = read_yaml(ROOT / "deploy/grafana/provisioning/dashboards/tokenrelay.yml")["providers"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]


def test_prometheus_scrapes_the_services_on_the_ports_they_listen_on() -> None:
    targets = {
        (name, dns["port"])
        for job in read_yaml(PROMETHEUS)["scrape_configs"]
        for dns in job["dns_sd_configs"]
        for name in dns["names"]
    }
    fields = Settings.model_fields
    assert targets == {("api", fields["port"].default), ("worker", fields["worker_metrics_port"].default)}
    jobs = {job["job_name"] for job in read_yaml(PROMETHEUS)["scrape_configs"]}
    named = {j for e in alert_expressions() + dashboard_expressions() for j in re.findall(r'job="([^"]+)"', e)}
    assert named <= jobs


def run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) not installed")


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_alerts_fire_when_they_should() -> None:
    run(["promtool", "check", "config", PROMETHEUS])
    run(["promtool", "test", "rules", ROOT / "tests/deploy/alerts_test.yml"])


@needs_promtool
def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    queries = [e.replace("$__rate_interval", "1m").replace("$model", ".*") for e in dashboard_expressions()]
    rules = [{"record": f"query_{i}", "expr": query} for i, query in enumerate(queries)]
    path = tmp_path / "dashboard.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(["promtool", "check", "rules", path])
