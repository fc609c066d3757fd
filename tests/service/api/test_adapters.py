"""LoRA adapters over HTTP: loaded, listed, asked for by name in every protocol, unloaded; refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.peft_adapter import LLAMA, PeftAdapter
from tests.service.api.keyed import KeyFile, bearer, keyed
from tests.service.api.serving import PacedWorker, Server, refused, serving
from tokenrelay.service.api.app import create_app
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.settings import Settings

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def network(served_model: ServedModel) -> LlamaForCausalLM:
    """Its shape is the served model's: what an adapter is held against."""
    shape = served_model.network
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
        )
    )


@pytest.fixture(scope="module")
def adapter(network: LlamaForCausalLM) -> PeftAdapter:
    return PeftAdapter(network, ("q_proj", "v_proj"), rank=2)


@pytest.fixture(scope="module")
def folder(adapter: PeftAdapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter.save(tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def running_server(api_settings: Settings, served_model: ServedModel, folder: Path) -> Iterator[Server]:
    own = {"allow_lora_loading": True, "lora_modules": f"named={folder}"}
    with serving(api_settings.model_copy(update=own), served_model) as server:
        yield server


async def listed(http: httpx.AsyncClient) -> dict[str, str | None]:
    """Parents by name."""
    return {card["id"]: card.get("parent") for card in (await http.get("/v1/models")).json()["data"]}


def loading(name: str, folder: Path, **fields: Any) -> dict[str, Any]:
    return {"lora_name": name, "lora_path": str(folder), **fields}


async def test_from_loading_to_unloading(
    server: Server, http: httpx.AsyncClient, other: httpx.AsyncClient, worker: PacedWorker, folder: Path
) -> None:
    """Every API process knows it at once."""
    name = "team/sql-2"
    ask = {"model": name, "prompt": "Once", "max_tokens": 2}
    loaded = await http.post(LOAD, json=loading(name, folder))
    assert loaded.status_code == 200, loaded.text
    assert (loaded.json()["id"], loaded.json()["parent"]) == (name, server.model)
    assert await listed(http) == {server.model: None, "named": server.model, name: server.model}
    assert (await listed(other))[name] == server.model
    assert (await other.get(f"/v1/models/{name}")).json()["parent"] == server.model
    answer = await other.post("/v1/completions", json=ask)
    assert answer.json()["model"] == name
    [claim] = worker.claims
    adapter = claim.submission.adapter
    assert adapter is not None
    assert (adapter.name, adapter.path) == (name, str(folder))
    unloaded = await http.post(UNLOAD, json={"lora_name": name})
    assert unloaded.json() == {"id": name, "object": "model", "deleted": True}
    assert refused(await other.post("/v1/completions", json=ask), 404)["code"] == "model_not_found"
    assert refused(await http.post(UNLOAD, json={"lora_name": name}), 404)["param"] == "lora_name"
    assert name not in await listed(http)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}], "stream": False}),
        ("/api/generate", {"prompt": "Hi", "stream": False}),
    ],
)
async def test_every_protocol_takes_its_name(
    http: httpx.AsyncClient, worker: PacedWorker, path: str, body: dict[str, Any]
) -> None:
    for model in ("named", "named:latest") if path.startswith("/api/") else ("named",):
        answer = await http.post(path, json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        adapter = worker.claims[-1].submission.adapter
        assert adapter is not None
        assert adapter.name == "named"


async def test_its_tokens_are_the_model_s(server: Server, http: httpx.AsyncClient) -> None:
    answers = [
        (await http.post("/v1/tokenize", json={"model": name, "prompt": "Hi"})).json()
        for name in (server.model, "named")
    ]
    assert answers[0] == answers[1]
    assert refused(await http.post("/v1/tokenize", json={"model": "nobody", "prompt": "Hi"}), 404)


async def test_the_fingerprint_is_the_adapter_s(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    told = set()
    for name in (server.model, "named", "named"):
        answer = await http.post("/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 1})
        told.add(answer.json()["system_fingerprint"])
    assert len(told) == 2


async def test_ollama_s_list_has_it(server: Server, http: httpx.AsyncClient) -> None:
    models = (await http.get("/api/tags")).json()["models"]
    assert {model["name"]: model["details"]["parent_model"] for model in models}["named:latest"] == server.model
    assert (await http.post("/api/show", json={"model": "named"})).status_code == 200


async def test_a_name_stands_for_one_adapter(
    server: Server, http: httpx.AsyncClient, folder: Path, network: LlamaForCausalLM, tmp_path: Path
) -> None:
    other = PeftAdapter(network, ("o_proj",), rank=1).save(tmp_path)
    for _ in range(2):  # the same again is no news
        assert (await http.post(LOAD, json=loading("mine", folder))).status_code == 200
    assert refused(await http.post(LOAD, json=loading("mine", other)))["code"] == "adapter_exists"
    assert (await http.post(LOAD, json=loading("mine", other, load_inplace=True))).status_code == 200
    for taken in ("named", server.model):
        assert refused(await http.post(LOAD, json=loading(taken, other, load_inplace=True)))["param"] == "lora_name"
    assert refused(await http.post(UNLOAD, json={"lora_name": "named"}))["param"] == "lora_name"
    assert refused(await http.post(LOAD, json=loading("no spaces", other)))["param"] == "lora_name"
    assert (await http.post(UNLOAD, json={"lora_name": "mine"})).status_code == 200


A = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("fields", "change", "named"),
    [
        ({}, lambda tensors: tensors.pop(A), "layers.3.self_attn.q_proj.lora_A"),
        ({}, lambda tensors: tensors.update({A: tensors[A][:, 1:].contiguous()}), A),
        ({}, lambda tensors: tensors.update({A: tensors[A].int()}), A),
        ({}, lambda tensors: tensors.update({"base_model.model.lm_head.weight": tensors[A].clone()}), "lm_head.weight"),
        ({}, lambda tensors: tensors.clear(), "no tensor"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, None, "o_proj"),
        ({"r": 65}, None, "max_lora_rank"),
        ({"r": 0}, None, " r "),
        ({"lora_alpha": None}, None, "lora_alpha"),
        ({"use_dora": True}, None, "use_dora"),
        ({"bias": "all"}, None, "bias"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
        ({"peft_type": "IA3"}, None, "peft_type"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights"),
        ({"rank_pattern": {".*": 3}}, None, "rank_pattern"),
        ({"from_the_future": True}, None, "from_the_future"),
    ],
)
async def test_what_cannot_be_used_is_refused_by_name(
    http: httpx.AsyncClient, adapter: PeftAdapter, tmp_path: Path, fields: dict[str, Any], change: Any, named: str
) -> None:
    tensors = dict(adapter.tensors)
    if change:
        change(tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter.fields | fields))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    error = refused(await http.post(LOAD, json=loading("bad", tmp_path)))
    assert (error["param"], error["code"]) == ("lora_path", "invalid_adapter")
    assert named in error["message"]
    assert "bad" not in await listed(http)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}x", b"PK\3\4" * 9])
async def test_a_damaged_file_is_refused(http: httpx.AsyncClient, folder: Path, tmp_path: Path, content: bytes) -> None:
    assert refused(await http.post(LOAD, json=loading("bad", tmp_path)))["code"] == "invalid_adapter"
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    assert refused(await http.post(LOAD, json=loading("bad", tmp_path)))["code"] == "invalid_adapter"
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert refused(await http.post(LOAD, json=loading("bad", tmp_path)))["code"] == "invalid_adapter"


async def test_a_file_larger_than_any_adapter_is_not_read(
    http: httpx.AsyncClient, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    with (tmp_path / "adapter_model.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk
    assert "bytes" in refused(await http.post(LOAD, json=loading("bad", tmp_path)))["message"]


def test_only_an_operator_may_and_only_if_a_setting_says_so(
    api_settings: Settings, served_model: ServedModel, folder: Path, tmp_path: Path
) -> None:
    file = KeyFile(tmp_path / "keys.jsonl")
    alice, operator = file.create("alice"), file.create("operator", operator=True)
    body = loading("mine", folder)
    for allowed, who, status in ((True, alice, 403), (False, operator, 403), (True, operator, 200)):
        with keyed(api_settings, served_model, file, allow_lora_loading=allowed) as server:
            for path in (LOAD, UNLOAD):
                sent = body if path == LOAD else {"lora_name": "mine"}
                response = httpx.post(server.base_url + path, json=sent, headers=bearer(who), timeout=60)
                assert response.status_code == status, response.text


def test_an_adapter_named_by_the_settings_must_be_one(served_model: ServedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        create_app(Settings(lora_modules=f"bad={tmp_path}"), served_model)
    with pytest.raises(ValueError, match="as the model itself"):
        create_app(Settings(lora_modules=f"{served_model.name}={tmp_path}"), served_model)


def test_settings_name_each_adapter_once() -> None:
    assert Settings(lora_modules="a=/x, b=/y=z").adapter_paths == {"a": "/x", "b": "/y=z"}
    for wrong in ("a", "a=", "=x", "a=/x,a=/y", "a b=/x", ","):
        with pytest.raises(ValueError, match="name=path"):
            Settings(lora_modules=wrong)


def test_all_matrices_of_a_layer_may_be_adapted(
    network: LlamaForCausalLM, served_model: ServedModel, tmp_path: Path
) -> None:
    folder = PeftAdapter(network, LLAMA, rank=1).save(tmp_path)
    create_app(Settings(lora_modules=f"all={folder}"), served_model)
