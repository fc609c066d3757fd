"""What went wrong in other inference servers, and does not here: one lesson, one test.

COVERED lists the lessons whose tests stand beside the code they are about; the rest are below.
"""

from __future__ import annotations

import ast
import asyncio
import random
import re
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis as sync_redis

import tokenrelay
from tests.service.api.keyed import KeyFile, bearer, keyed
from tests.service.api.serving import Server, refused
from tests.service.relay import submission
from tests.service.running import RunningService
from tokenrelay.model.chat_template import ChatTemplate, ChatTemplateError
from tokenrelay.service import key_file
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.embedded_valkey import EmbeddedValkey
from tokenrelay.service.key_file import ApiKey, ApiKeys, digest
from tokenrelay.service.messages import (
    Event,
    MessageError,
    decode_deliveries,
    decode_event,
    decode_facts,
    decode_submission,
    encode,
)
from tokenrelay.service.settings import Settings
from tokenrelay.service.terms import AnswerSpec, decode_answer_spec
from tokenrelay.service.worker.output_processor import prefix_cache_salt

TESTS = Path(__file__).parents[2]
SOURCES = sorted(Path(tokenrelay.__file__).parent.rglob("*.py"))

COVERED = {
    "CVE-2025-32444, -29783, -30165, -47277, CVE-2024-11041, CVE-2026-3059 (pickle from the network)": (
        "test_architecture.py::test_nothing_unpickles"
    ),
    "CVE-2025-24357, -32434, -62164 (tensors of strangers)": "test_architecture.py::test_nothing_unpickles",
    "CVE-2026-7482, CVE-2025-53630, -0312 (lying GGUF headers)": (
        "model/weights/test_gguf.py::test_damaged_headers_are_refused_or_harmless"
    ),
    "CVE-2026-34756, CVE-2024-8939 (n and best_of without bound)": (
        "service/api/test_bad_input.py::test_large_nonsense_is_refused_in_little_time_and_memory"
    ),
    "CVE-2025-48942, -48943, -48944 (a bad schema ends the engine)": (
        "model/structured/test_sandbox.py::test_mutations_compile_or_say_why_not"
    ),
    "CVE-2025-32381, -29770 (grammar caches that fill memory or disk)": (
        "model/structured/test_compiler.py::test_the_least_recently_used_is_forgotten"
    ),
    "CVE-2025-57809, -58446, CVE-2026-25048 (recursion, nesting, blow-up)": (
        "model/structured/test_sandbox.py::test_what_llguidance_does_not_bound_is_bounded"
    ),
    "vLLM's --api-key guarded only /v1": ("service/api/test_authentication.py::test_no_route_answers_without_a_key"),
    "decompression bombs": "service/api/test_http.py::test_compressed_bodies_are_refused",
    "CVE-2024-47874, CVE-2026-54283 (multipart and forms)": "service/api/test_http.py::test_only_json_is_read",
    "CVE-2026-21869, -44223, CVE-2024-8768 (rare combinations end the engine)": (
        "service/test_fuzz.py::test_hundreds_of_fuzzed_requests_leave_nothing_behind"
    ),
    "special tokens in a message (llama.cpp 24382)": (
        "model/test_tokenizer.py::test_a_message_cannot_write_control_tokens"
    ),
    "special tokens in a template's arguments": (
        "model/test_tokenizer.py::test_tool_names_and_template_arguments_cannot_write_one_either"
    ),
    "slow heads (uvicorn waits for ever)": (
        "service/api/test_slow_senders.py::test_who_does_not_finish_is_disconnected"
    ),
    "CVE-2023-28858, -28859 (another caller's reply)": (
        "service/test_broker_pool.py::test_a_caller_sees_its_own_reply_however_many_others_were_cancelled"
    ),
    "CVE-2025-49844 (the broker as attack surface): its user": (
        "service/test_acl.py::test_other_keys_and_commands_are_refused"
    ),
    "CVE-2025-49844: its socket": "service/test_embedded_valkey.py::test_nobody_else_can_reach_it",
}


@pytest.mark.parametrize("lesson", COVERED)
def test_the_tests_of_the_other_lessons_exist(lesson: str) -> None:
    path, _, name = COVERED[lesson].partition("::")
    assert re.search(rf"^(async )?def {name}\(", (TESTS / path).read_text(), re.MULTILINE)


# --- messages and code from elsewhere -----------------------------------------------------------------------------

DECODERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (decode_submission, encode(submission("r", n=2))),
    (decode_event, encode(Event(token_ids=[1], text="a", finish_reason="stop"))),
    (decode_deliveries, encode([("r", 1, Event(text="a"))])),
    (decode_facts, encode({"worker_id": "w", "model": "m", "max_model_len": 1, "step_counter": 1})),
    (decode_answer_spec, encode(AnswerSpec(route="chat", model="m", created=1, num_prompt_tokens=1))),
]


@pytest.mark.parametrize(("decode", "payload"), DECODERS, ids=lambda value: getattr(value, "__name__", ""))
def test_mutated_messages_are_refused_or_read(decode: Callable[[bytes], object], payload: bytes) -> None:
    """CVE-2025-32444 and its kin: what comes over the wire is data, whatever it is."""
    draw = random.Random(0)
    for _ in range(2000):
        mutated = bytearray(payload)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(len(mutated))] = draw.randrange(256)
        try:
            decode(bytes(mutated[: draw.randint(0, len(mutated))] if draw.random() < 0.3 else mutated))
        except MessageError:
            continue


def test_no_code_is_made_of_text() -> None:
    """CVE-2025-66448, CVE-2026-22807 (auto_map); CVE-2025-9141 (eval in a tool parser)."""
    forbidden = {"eval", "exec", "compile", "__import__", "import_module"}
    for path in SOURCES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        names |= {call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr == "import_module"}
        assert not names & forbidden, path
    assert not any("trust_remote_code" in path.read_text() for path in SOURCES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_model_s_template_runs_in_a_sandbox(source: str) -> None:
    """CVE-2024-34359, CVE-2026-5760: a checkpoint's template is code."""
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])


def test_a_request_brings_no_template(server: Server, post: httpx.Client) -> None:
    """CVE-2025-61620: a template in the request, that loops."""
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}]}
    template = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    assert refused(post.post("/v1/chat/completions", json=body | {"chat_template": template}))["param"]


@pytest.mark.parametrize("name", ["tokenize", "messages", "conversation", "add_generation_prompt"])
def test_template_arguments_cannot_replace_what_is_ours(server: Server, post: httpx.Client, name: str) -> None:
    """CVE-2025-62426: ``tokenize`` among them blocked the event loop. Here it is a name like any other, or refused."""
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 10**9}
    refused(post.post("/v1/chat/completions", json=body | {"chat_template_kwargs": {name: True}}))


# --- the network --------------------------------------------------------------------------------------------------


def test_the_service_listens_where_it_says_and_nowhere_else(service: RunningService) -> None:
    """CVE-2025-30202, CVE-2026-3060: sockets on all interfaces."""
    family = [psutil.Process(service.process.pid), *psutil.Process(service.process.pid).children(recursive=True)]
    listening = {
        connection.laddr
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert {address.port for address in listening} == {service.port, service.worker_port}


async def test_a_large_head_is_cut_off(server: Server) -> None:
    """CVE-2025-48956: 64 MiB of header were taken, and kept."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    before = psutil.Process().memory_info().rss
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ")
    with pytest.raises(ConnectionError):  # noqa: PT012 - whichever of them notices
        for _ in range(64):
            writer.write(b"x" * (1 << 20))
            await writer.drain()
    assert b" 200 " not in await _rest(reader)
    writer.transport.abort()
    assert psutil.Process().memory_info().rss - before < 32 << 20  # a part of it is this client's


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/x.png", "file:///etc/passwd", "data:image/png;base64,iVBORw0KGgo="]
)
def test_nothing_is_fetched_for_a_client(server: Server, post: httpx.Client, url: str) -> None:
    """CVE-2025-6242, CVE-2026-24779, -0599, -33626, -22773: a URL in a message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        part = {"type": "image_url", "image_url": {"url": url.replace("{port}", str(listener.getsockname()[1]))}}
        body = {"model": server.model, "messages": [{"role": "user", "content": [part]}]}
        refused(post.post("/v1/chat/completions", json=body))
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


async def test_a_body_of_two_lengths_is_one_request(server: Server) -> None:
    """CVE-2025-43859 and its kin: what one proxy takes for the body, the next may take for another request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    smuggled = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    writer.write(head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
    writer.write_eof()
    answer = await _rest(reader)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 4")


def test_libraries_are_not_those_with_known_holes(valkey: EmbeddedValkey) -> None:
    """CVE-2026-48710 (starlette), CVE-2025-43859 (h11), CVE-2026-27623 and -21863 (valkey)."""
    assert _numbers(version("starlette")) >= (1, 0, 1)
    assert _numbers(version("h11")) >= (0, 16)
    with sync_redis.Redis.from_url(valkey.url) as client:
        assert _numbers(client.info("server")["valkey_version"]) >= (9, 0, 3)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def test_no_file_is_ever_served() -> None:
    """CVE-2025-62727: Range of a FileResponse."""
    assert not [path for path in SOURCES if re.search("FileResponse|StaticFiles", path.read_text())]


# --- keys and tenants ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(
    tmp_path_factory: pytest.TempPathFactory, api_settings: Settings, served_model: ServedModel
) -> Iterator[Server]:
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys.jsonl")
    file.create("alice")
    with keyed(api_settings, served_model, file) as server:
        yield server


@pytest.mark.parametrize("host", ["x/livez", "x/livez?", "x/livez#", "x/health/..", "livez", "@x/readyz", "x/livez?a="])
async def test_the_host_header_opens_no_door(locked: Server, host: str) -> None:
    """CVE-2026-48710: the path was read from a URL that the Host header is a part of."""
    reader, writer = await asyncio.open_connection("127.0.0.1", locked.port)
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    status = (await reader.read()).split(b" ", 2)[1]
    writer.close()
    assert status in (b"401", b"400")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/livez/../v1/models",
            "/livez/%2e%2e/v1/models",
            "/%2e/v1/models",
            "//v1/models",
            "/v1//models",
            "/V1/models",
        ),
        *("/livez/v1/models", "/models", "/./models", "/v1/v1/models", "/metrics/", "/metrics?x=/livez", "/docs/"),
        *("http://x/livez/../v1/models", "*", "/livez;/v1/models", "/v1/models%00", "/livez%2f..%2fv1%2fmodels"),
    ],
)
async def test_no_spelling_of_a_path_opens_a_door(locked: Server, path: str) -> None:
    """CVE-2026-48710 again: what is compared is what is routed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", locked.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    status = (await reader.read()).split(b" ", 2)[1]
    writer.close()
    assert status in (b"401", b"400")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: ``==`` told how much of a key was right. Every key is compared, whichever is presented."""
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(known: bytes, presented: bytes) -> bool:
        compared.append((known, presented))
        return known == presented

    monkeypatch.setattr(key_file, "compare_digest", compare_digest)
    names = ("a", "b", "c")
    keys = ApiKeys([ApiKey(name=name, tenant=name, sha256=digest(f"secret-{name}")) for name in names])
    for secret in ("secret-a", "secret-c", "wrong", ""):
        compared.clear()
        owner = keys.owner(secret)
        assert [known for known, _ in compared] == [digest(f"secret-{name}").encode() for name in names]
        assert (owner and owner.name) == ({"secret-a": "a", "secret-c": "c"}.get(secret))


def test_tenants_share_no_cached_prefix() -> None:
    """CVE-2025-46570: how soon the first token comes told what others had asked."""
    salts = {
        prefix_cache_salt(submission("r", tenant=tenant, cache_salt=salt)) for tenant in "ab" for salt in ("", "a", "b")
    }
    assert len(salts) == 6


def test_blocks_are_known_by_cryptographic_hashes() -> None:
    """CVE-2025-25183, -46722: with Python's ``hash`` one prompt could be given another's keys and values."""
    for path in SOURCES:
        if "engine" in path.parts:
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert "hash" not in {call.id for call in calls if isinstance(call, ast.Name)}, path


def test_a_stranger_s_page_may_not_ask(locked: Server) -> None:
    """Browsers carry no keys of ours, but a server without any is open to every page that its user opens."""
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight: Any = httpx.options(f"{locked.base_url}/v1/chat/completions", headers=headers, timeout=60)
    assert preflight.status_code == 401
    assert not [name for name in preflight.headers if name.startswith("access-control")]
    answer = httpx.get(
        f"{locked.base_url}/livez", headers={"Origin": "https://evil.example", **bearer("x")}, timeout=60
    )
    assert "access-control-allow-origin" not in answer.headers
