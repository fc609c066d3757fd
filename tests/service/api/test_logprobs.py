"""What clients are told of tokens: how likely they were, which ids they have, and where their text begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI
from transformers import LlamaConfig

from tests.service.api.serving import PacedWorker, Server, sse_events, words
from tokenrelay.model.families import read_hf_config
from tokenrelay.model.sampling_params import SamplingParams, TokenLogprobs
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.service.api.admission.answer_specs import Wording, answer_specs
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.lifecycle.choices import Finished, Output, Step
from tokenrelay.service.api.openai.completion_format import CompletionFormat
from tokenrelay.service.api.openai.logprobs import LogprobsFormat
from tokenrelay.service.api.schemas.chat import ChatCompletionRequest
from tokenrelay.service.api.schemas.completions import Completion, CompletionRequest
from tokenrelay.service.api.schemas.usage import CompletionUsage, PromptTokensDetails
from tokenrelay.service.api.served_model import ServedModel
from tokenrelay.service.messages import Submission

QUESTION: Any = [{"role": "user", "content": "Hi"}]
TEXT = "Grüße aus 東京 🗼."
NO_USAGE = CompletionUsage(
    prompt_tokens=0, completion_tokens=0, total_tokens=0, prompt_tokens_details=PromptTokensDetails(cached_tokens=0)
)


@pytest.fixture(scope="module")
def tokenizer(loaded_model: ServedModel) -> Tokenizer:
    return loaded_model.tokenizer


# --- what is written --------------------------------------------------------------------------------------------------


def prompt_of(*token_ids: int) -> Submission:
    return Submission(request_id="r", prompt_token_ids=list(token_ids), params=SamplingParams(max_tokens=9))


def served(tokenizer: Tokenizer) -> ServedModel:
    dialect, network = Dialect.of(tokenizer), read_hf_config(LlamaConfig().to_dict())
    return ServedModel(name="m", tokenizer=tokenizer, max_model_len=64, network=network, context=64, dialect=dialect)


def chat_format(tokenizer: Tokenizer, **fields: Any) -> LogprobsFormat:
    body = ChatCompletionRequest(model="m", messages=QUESTION, logprobs=True, **fields)
    [spec] = answer_specs(body, Wording("chat"), [prompt_of(1)], served(tokenizer))
    return LogprobsFormat(spec, tokenizer)


def completion_format(tokenizer: Tokenizer, **fields: Any) -> LogprobsFormat:
    body = CompletionRequest(model="m", prompt="p", **fields)
    [spec] = answer_specs(body, Wording("completion"), [prompt_of(1)], served(tokenizer))
    return LogprobsFormat(spec, tokenizer)


def test_a_part_of_a_character_has_its_exact_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🗼", add_special_tokens=False)
    assert len(ids) > 1
    content = chat_format(tokenizer).chat([TokenLogprobs(token_id, -1, 1) for token_id in ids]).content
    assert bytes(byte for token in content for byte in token.bytes).decode() == "🗼"
    assert all("\ufffd" in token.token for token in content)


def test_minus_infinity_is_written_as_openai_does(tokenizer: Tokenizer) -> None:
    impossible = TokenLogprobs(5, float("-inf"), 9, ((6, -0.5), (7, float("-inf"))))
    [token] = chat_format(tokenizer, top_logprobs=2).chat([impossible]).content
    assert (token.logprob, [other.logprob for other in token.top_logprobs]) == (-9999.0, [-0.5, -9999.0])
    told = completion_format(tokenizer, logprobs=2).completion([5], [impossible], [0])
    assert told.token_logprobs == [-9999.0]


def test_of_several_alternatives_with_one_name_the_token_itself_counts(tokenizer: Tokenizer) -> None:
    """Names are all that a completion tells of alternatives; parts of characters share one."""
    first, second, *_ = tokenizer.encode("🗼東", add_special_tokens=False)
    token = TokenLogprobs(second, -3.0, 2, ((first, -0.1),))
    told = completion_format(tokenizer, logprobs=1).completion([second], [token], [0])
    assert told.top_logprobs == [{"\ufffd": -3.0}]
    by_id = completion_format(tokenizer, logprobs=1, return_tokens_as_token_ids=True)
    told = by_id.completion([second], [token], [0])
    assert told.top_logprobs == [{f"token_id:{first}": -0.1, f"token_id:{second}": -3.0}]
    assert told.tokens == [f"token_id:{second}"]


def told(streaming: CompletionFormat, output: Output) -> list[Completion]:
    """The chunks of a step, also those that are bytes already."""
    chunks = streaming.chunks(Step(1, output))
    return [Completion.model_validate_json(chunk) if isinstance(chunk, bytes) else chunk for chunk in chunks]


def answered(tokenizer: Tokenizer, prompt: str | list[int], outputs: Sequence[Output], **fields: Any) -> dict[str, Any]:
    """The choice that the outputs make, streamed and at once: both must be the same."""
    body = CompletionRequest(model="m", prompt=prompt, logprobs=0, **fields)
    ids = tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
    specs = answer_specs(body, Wording("completion"), [prompt_of(*ids)], served(tokenizer))
    streaming, whole = (CompletionFormat(specs, tokenizer, "r") for _ in range(2))
    chunks = [chunk.choices[0].model_dump() for output in outputs for chunk in told(streaming, output)]
    everything = Output(
        0,
        "".join(output.text for output in outputs),
        [token_id for output in outputs for token_id in output.token_ids],
        [token for output in outputs for token in output.logprobs],
        outputs[0].prompt_logprobs,
        outputs[-1].finish_reason,
    )
    [choice] = whole.answer(Finished([everything], NO_USAGE)).model_dump()["choices"]
    assert joined(chunks) == choice
    return dict(choice)


def outputs_of(ids: Sequence[int], text: str, prompt_ids: Sequence[int]) -> list[Output]:
    """One token per output; all of the text with the last, as if a stop string might have begun with it."""
    of_prompt = (None, *(TokenLogprobs(token_id, -2, 1) for token_id in prompt_ids[1:]))
    outputs = [Output(0, "", [ids[0]], [TokenLogprobs(ids[0], -1, 1)], of_prompt)]
    outputs += [Output(0, "", [token_id], [TokenLogprobs(token_id, -1, 1)]) for token_id in ids[1:]]
    return [*outputs, Output(0, text, finish_reason="stop")]


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chunks of one choice as one: what grows is put together, everything else comes once."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            before = whole.get(name)
            if value is None or before is None or name == "index":
                whole[name] = before if value is None else value
            elif isinstance(value, dict):
                whole[name] = joined([before, value])
            else:
                assert name not in ("finish_reason", "prompt_token_ids", "prompt_logprobs"), "comes once"
                whole[name] = before + value
    return whole


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_point_into_the_text(tokenizer: Tokenizer, echo: bool, as_ids: bool) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    prompt_ids = tokenizer.encode("Drüben: ", add_special_tokens=True)
    choice = answered(tokenizer, prompt_ids if as_ids else "Drüben: ", outputs_of(ids, TEXT, prompt_ids), echo=echo)
    assert choice["text"] == ("Drüben: " if echo else "") + TEXT
    told = choice["logprobs"]
    whole = [
        (token, offset)
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True)
        if "\ufffd" not in token
    ]
    assert len(whole) > 6
    assert all(choice["text"].startswith(token, offset) for token, offset in whole)
    assert told["text_offset"] == sorted(told["text_offset"])
    assert told["token_logprobs"] == ([None] + [-2] * (len(prompt_ids) - 1) if echo else []) + [-1] * len(ids)


def test_special_tokens_have_a_place_but_no_width(tokenizer: Tokenizer) -> None:
    """One before the prompt's text, which was not sent; and one at the end of the output, which is not shown."""
    [eos, *_] = tokenizer.eos_token_ids
    [once] = tokenizer.encode("Once", add_special_tokens=False)
    body = CompletionRequest(model="m", prompt="Once", logprobs=0, echo=True)
    specs = answer_specs(body, Wording("completion"), [prompt_of(eos, once)], served(tokenizer))
    output = Output(
        0, "Once", [once, eos], [TokenLogprobs(i, -1, 1) for i in (once, eos)], [None, TokenLogprobs(once, -1, 1)]
    )
    [choice] = CompletionFormat(specs, tokenizer, "r").answer(Finished([output], NO_USAGE)).choices
    assert choice.text == "OnceOnce"
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 0, 4, 8]


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_openais_client_reads_the_logprobs_of_a_chat(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, stream: bool
) -> None:
    create: Any = client.chat.completions.create
    answer = await create(model=server.model, messages=QUESTION, logprobs=True, top_logprobs=2, n=2, stream=stream)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    content: list[list[Any]] = [[], []]
    for choice in (choice for chunk in chunks for choice in chunk.choices if choice.logprobs):
        content[choice.index] += choice.logprobs.content
    token_text = server.process.model.tokenizer.token_bytes
    for tokens in content:
        assert [token.bytes for token in tokens] == [list(token_text(i)) for i in range(8)]
        assert [token.token.encode() for token in tokens] == [token_text(i) for i in range(8)]
        assert [token.logprob for token in tokens] == [-0.5] * 8
        assert [[(top.token.encode(), top.logprob) for top in token.top_logprobs] for token in tokens] == [
            [(token_text(100), -0.25), (token_text(101), -0.5)]
        ] * 8


async def test_each_chunk_of_a_chat_tells_only_its_own_tokens(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    """Or a long stream would cost the square of its length."""
    chunks = await streamed(http, chat(server, logprobs=True))
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [logprobs and len(logprobs["content"]) for logprobs in told] == [None, *[1] * 8, None]


# --- completions ------------------------------------------------------------------------------------------------------


async def test_openais_client_reads_the_logprobs_of_a_completion(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    answer = await client.completions.create(model=server.model, prompt="Once", logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    name = server.process.model.tokenizer.token_bytes
    assert told.tokens == [name(i).decode() for i in range(8)]
    assert told.token_logprobs == [-0.5] * 8
    assert told.top_logprobs is not None
    assert told.top_logprobs[1] == {name(100).decode(): -0.25, name(101).decode(): -0.5, name(1).decode(): -0.5}
    assert told.text_offset is not None
    assert len(told.text_offset) == 8


async def test_echo_puts_the_prompt_and_its_logprobs_in_front(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    answer = await client.completions.create(model=server.model, prompt="Once upon", echo=True, logprobs=1, n=2)
    for choice in answer.choices:
        assert choice.text == "Once upon" + words(8)
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert choice.logprobs.tokens[:2] == ["Once", " upon"]
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs == [None, -1, *[-0.5] * 8]
        assert choice.logprobs.text_offset is not None
        assert choice.logprobs.text_offset[:3] == [0, 4, 9]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)
    assert worker.claims[0].submission.params.prompt_logprobs == 1


async def test_echo_alone_needs_no_logprobs(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    answer = await client.completions.create(model=server.model, prompt=["Once", "upon"], echo=True)
    assert [choice.text for choice in answer.choices] == ["Once" + words(8), "upon" + words(8)]
    assert worker.claims[0].submission.params.prompt_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_no_tokens_at_all_score_the_prompt(
    server: Server, client: AsyncOpenAI, worker: PacedWorker, stream: bool
) -> None:
    create: Any = client.completions.create
    fields: Any = {"max_tokens": 0, "echo": True, "logprobs": 0, "stream": stream}
    fields |= {"stream_options": {"include_usage": True}} if stream else {}
    answer = await create(model=server.model, prompt="Once upon", **fields)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.text for choice in choices if choice.text] == ["Once upon"]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    [told] = [choice.logprobs for choice in choices if choice.logprobs]
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["Once", " upon"], [None, -1], [0, 4])
    [usage] = [chunk.usage for chunk in chunks if chunk.usage]
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 0, 2)
    submission = worker.claims[0].submission
    assert (submission.prompt_only, submission.params.max_tokens) == (True, 1)


# --- both routes ------------------------------------------------------------------------------------------------------

FIELDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "token ids": {"return_token_ids": True},
    "prompt_logprobs": {"prompt_logprobs": 2, "n": 2},
    "prompt_logprobs alone": {"prompt_logprobs": 0, "max_tokens": 0},
    "all of it": {"prompt_logprobs": 1, "return_token_ids": True, "n": 2, "return_tokens_as_token_ids": True},
}
OF_CHAT = {"logprobs": True, "top_logprobs": 3}
OF_COMPLETIONS = {"logprobs": 3, "echo": True}


def chat(server: Server, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": server.model, "messages": QUESTION, **fields}


def completion(server: Server, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": server.model, "prompt": ["Once upon", "a time"], **fields}


async def streamed(http: httpx.AsyncClient, request: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    response = await http.post(request[0], json={**request[1], "stream": True})
    *chunks, done = [event["data"] for event in sse_events(response.text) if "data" in event]
    assert done == "[DONE]"
    return [httpx.Response(200, content=chunk).json() for chunk in chunks]


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
async def test_the_chunks_of_a_stream_are_the_answer_in_pieces(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker, fields: dict[str, Any]
) -> None:
    more = dict.fromkeys(("max_tokens", "n"), None) | fields
    for path, body in (chat(server, **more, **OF_CHAT), completion(server, **more, **OF_COMPLETIONS)):
        whole = (await http.post(path, json=body)).json()
        chunks = await streamed(http, (path, body))
        for choice in whole["choices"]:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            message = choice.pop("message", None)
            if message:
                assert "".join(part.pop("delta").get("content") or "" for part in parts) == message["content"]
            assert joined(parts) == choice
        assert [chunk.get("prompt_logprobs") for chunk in chunks][:1] == [whole.get("prompt_logprobs")]
        assert not any("prompt_logprobs" in chunk or "prompt_token_ids" in chunk for chunk in chunks[1:])


async def test_prompt_logprobs_are_vllms(server: Server, http: httpx.AsyncClient, worker: PacedWorker) -> None:
    path, body = completion(server, prompt_logprobs=2)
    choices = (await http.post(path, json=body)).json()["choices"]
    encode, text = server.process.model.tokenizer.encode, server.process.model.tokenizer.token_bytes
    for prompt, choice in zip(body["prompt"], choices, strict=True):
        first, second = choice["prompt_logprobs"]
        assert first is None
        own = encode(prompt, add_special_tokens=True)[1]
        assert second == {
            str(own): {"logprob": -1.0, "rank": 3, "decoded_token": text(own).decode()},
            "100": {"logprob": -0.25, "rank": 1, "decoded_token": text(100).decode()},
            "101": {"logprob": -0.5, "rank": 2, "decoded_token": text(101).decode()},
        }
    path, body = chat(server, prompt_logprobs=0)
    whole = (await http.post(path, json=body)).json()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in whole["choices"][0]


async def test_each_place_shows_as_many_alternatives_as_it_asked_for(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    """The larger number is computed for the prompt, once."""
    path, body = completion(server, prompt="Once upon", echo=True, logprobs=3, prompt_logprobs=1)
    [choice] = (await http.post(path, json=body)).json()["choices"]
    assert worker.claims[0].submission.params.prompt_logprobs == 3
    assert [told and len(told) for told in choice["prompt_logprobs"]] == [None, 2]
    assert [told and len(told) for told in choice["logprobs"]["top_logprobs"][:2]] == [None, 4]


async def test_token_ids_go_in_and_come_out(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    extra: Any = {"return_token_ids": True}
    answer: Any = await client.completions.create(model=server.model, prompt=[6403, 1980], extra_body=extra)
    assert (answer.choices[0].prompt_token_ids, answer.choices[0].token_ids) == ([6403, 1980], list(range(8)))
    answer = await client.chat.completions.create(model=server.model, messages=QUESTION, extra_body=extra)
    assert answer.prompt_token_ids == server.process.model.tokenizer.encode_chat(QUESTION)
    assert answer.choices[0].token_ids == list(range(8))


async def test_what_was_not_asked_for_is_not_mentioned(
    server: Server, http: httpx.AsyncClient, worker: PacedWorker
) -> None:
    for path, body in (chat(server), completion(server)):
        answer = (await http.post(path, json=body)).json()
        assert answer.keys() == {"id", "object", "created", "model", "choices", "usage", "system_fingerprint"}
        assert answer["choices"][0].keys() - {"text", "message"} == {"index", "logprobs", "finish_reason"}


async def test_the_documentation_tells_of_it(server: Server, http: httpx.AsyncClient) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    both = {"prompt_logprobs", "return_token_ids", "best_of", "use_beam_search", "mirostat", "priority", "cache_salt"}
    assert schemas["ChatCompletionRequest"]["properties"].keys() >= both | {"logprobs", "top_logprobs"}
    assert schemas["CompletionRequest"]["properties"].keys() >= both | {"logprobs", "echo"}
    assert schemas["ChatTokenLogprob"]["properties"].keys() == {"token", "logprob", "bytes", "top_logprobs"}
    assert schemas["CompletionLogprobs"]["properties"].keys() == {
        *("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
