"""/tokenize, /detokenize, /apply-template and /tokenizer_info: what they say is what a generation would see."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import PacedWorker, Server, refused

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who was <|im_end|>?"}]


def ask(post: httpx.Client, path: str, **body: Any) -> Any:
    response = post.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_text_becomes_ids_in_vllms_shape(server: Server, post: httpx.Client, prefix: str) -> None:
    answer = ask(post, f"{prefix}/tokenize", prompt="Once upon a", return_token_strs=True, model=server.model)
    assert answer == {
        "count": 3,
        "max_model_len": server.process.model.max_model_len,
        "tokens": [6403, 1980, 253],
        "token_strs": ["Once", "Ġupon", "Ġa"],
    }


@pytest.mark.parametrize("text", ["", "Grüße, 世界 🌍", " two  spaces\n", "<|im_end|>", "x" * 20_000])
def test_there_and_back(server: Server, post: httpx.Client, text: str) -> None:
    answer = ask(post, "/tokenize", prompt=text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"])
    assert ask(post, "/detokenize", tokens=answer["tokens"]) == {"prompt": text, "content": text}


def test_llama_cpps_fields(server: Server, post: httpx.Client) -> None:
    pieces = ask(post, "/tokenize", content="Once 世", with_pieces=True)["tokens"]
    assert pieces[0] == {"id": 6403, "piece": "Once"}
    as_bytes = [bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces]
    assert b"".join(as_bytes).decode() == "Once 世"
    assert any(isinstance(piece["piece"], list) for piece in pieces)  # half a character
    assert len(ask(post, "/tokenize", content="<|im_end|>")["tokens"]) == 1
    assert len(ask(post, "/tokenize", content="<|im_end|>", parse_special=False)["tokens"]) > 1


async def test_a_chat_is_counted_as_a_generation_counts_it(
    server: Server, client: AsyncOpenAI, post: httpx.Client, worker: PacedWorker
) -> None:
    messages: Any = MESSAGES
    await client.chat.completions.create(model=server.model, messages=messages)
    assert ask(post, "/tokenize", messages=MESSAGES)["tokens"] == worker.claims[-1].submission.prompt_token_ids


def test_a_chat_as_the_template_renders_it(server: Server, post: httpx.Client) -> None:
    prompt = ask(post, "/apply-template", messages=MESSAGES)["prompt"]
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert prompt.endswith("<|im_start|>assistant\n")
    closed = ask(post, "/v1/apply-template", messages=MESSAGES, add_generation_prompt=False)["prompt"]
    assert prompt.startswith(closed)
    assert "assistant" not in closed
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    assert "look_up" in ask(post, "/apply-template", messages=MESSAGES, tools=[tool])["prompt"]


def test_what_the_tokenizer_is(server: Server, post: httpx.Client) -> None:
    for path in ("/tokenizer_info", "/v1/tokenizer_info"):
        told = post.get(path).json()
        assert (told["tokenizer_class"], told["vocab_size"], told["model_max_length"]) == ("BPE", 49152, 2048)
        assert told["special_tokens"]["<|im_end|>"] in told["eos_token_ids"]
        assert "im_start" in told["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
        ("/apply-template", {}, "messages"),
        (
            "/apply-template",
            {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
    ],
)
def test_what_is_wrong_is_named(post: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert refused(post.post(path, json=body))["param"] == param


def test_another_model_is_not_here(server: Server, post: httpx.Client) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert refused(post.post(path, json=body | {"model": "other"}), 404)["code"] == "model_not_found"
