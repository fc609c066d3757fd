"""The sampling fields of both routes, and what the worker gets of them."""

from __future__ import annotations

from typing import Any

import msgspec
import openai
import pytest
from openai import AsyncOpenAI

from tests.service.api.serving import PacedWorker, Server
from tokenrelay.model.sampling_params import SamplingParams, SamplingParamsError

SENT: dict[str, Any] = {
    **{"min_p": 0.05, "typical_p": 0.9, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2},
    **{"dynatemp_range": 0.3, "dynatemp_exponent": 2, "presence_penalty": 0.5, "frequency_penalty": -1},
    **{"repetition_penalty": 1.1, "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 3},
    "dry_penalty_last_n": 64,
}


async def params_of(server: Server, client: AsyncOpenAI, worker: PacedWorker, **fields: Any) -> SamplingParams:
    await client.completions.create(model=server.model, prompt="Once", extra_body=fields)
    return worker.claims[-1].submission.params


async def test_both_routes_pass_all_of_it_on(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    await client.chat.completions.create(model=server.model, messages=messages, extra_body=SENT)
    for params in (worker.claims[-1].submission.params, await params_of(server, client, worker, **SENT)):
        assert {name: getattr(params, name) for name in SENT} == SENT


async def test_neutral_values_and_nulls_change_nothing(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    neutral = {"repeat_penalty": 1, "top_n_sigma": -1, "logit_bias": {}, "bad_words": [], "dry_multiplier": 0}
    for fields in (neutral, dict.fromkeys((*SENT, *neutral, "allowed_token_ids", "dry_sequence_breakers"))):
        params = await params_of(server, client, worker, seed=5, **fields)
        assert params == SamplingParams(max_tokens=16, seed=5)


async def test_llama_cpps_name_of_the_repetition_penalty(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    for fields in ({"repeat_penalty": 1.2}, {"repeat_penalty": 1.2, "repetition_penalty": 1.2}):
        assert (await params_of(server, client, worker, **fields)).repetition_penalty == 1.2


async def test_tokens_and_words_arrive_as_ids(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    params = await params_of(
        *(server, client, worker),
        logit_bias={"5": 1, "49151": -100},
        allowed_token_ids=[7, 3, 7],
        bad_words=["Once upon", " upon"],
        dry_multiplier=1,
        dry_sequence_breakers=["\n", "upon", 42],
    )
    encode = server.process.model.tokenizer.encode
    assert params.logit_bias == ((5, 1.0), (49151, -100.0))
    assert params.allowed_token_ids == (3, 7)
    words = ("Once upon", " Once upon", "upon", " upon")
    assert params.bad_words == tuple(tuple(encode(word, add_special_tokens=False)) for word in words)
    breakers = [encode(text, add_special_tokens=False)[-1] for text in ("a\n", "aupon")]
    assert params.dry_sequence_breakers == (*breakers, 42)


async def test_dry_has_llama_cpps_breakers_unless_told(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    params = await params_of(server, client, worker, dry_multiplier=1)
    decode = server.process.model.tokenizer.decode
    assert [decode([token_id]) for token_id in params.dry_sequence_breakers] == ["\n", ":", '"', "*"]
    assert (await params_of(server, client, worker, dry_multiplier=1, dry_sequence_breakers=[])) == SamplingParams(
        max_tokens=16, seed=worker.claims[-1].submission.params.seed, dry_multiplier=1
    )


async def test_mirostat_has_llama_cpps_names_and_defaults(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    for fields, tau, eta in (
        ({"mirostat": 2}, 5, 0.1),
        ({"mirostat": 2, "mirostat_tau": 3, "mirostat_eta": 0.2}, 3, 0.2),
        ({"mirostat": 0, "mirostat_tau": 3}, 0, 0.1),
    ):
        params = await params_of(server, client, worker, **fields)
        assert (params.mirostat_tau, params.mirostat_eta) == (tau, eta)


async def test_best_of_or_n_is_the_width_of_a_beam_search(
    server: Server, client: AsyncOpenAI, worker: PacedWorker
) -> None:
    beams: dict[str, Any] = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": True, "temperature": 0}
    for fields, n, width in (({"n": 3}, 3, 3), ({"n": 2, "best_of": 4}, 2, 4), ({}, 1, 1)):
        params = await params_of(server, client, worker, seed=5, **beams, **fields)
        assert params == SamplingParams(
            max_tokens=16, seed=5, temperature=0, n=n, beam_width=width, length_penalty=0.5, early_stopping=True
        )
        assert worker.claims[-1].submission.cost == 1 + 16 * width


async def test_what_stops_a_choice_may_be_part_of_it(server: Server, client: AsyncOpenAI, worker: PacedWorker) -> None:
    params = await params_of(server, client, worker, stop="x", include_stop_str_in_output=True)
    assert params.include_stop_str_in_output


async def test_an_unknown_id_is_refused_with_the_vocabulary_s_size(server: Server, client: AsyncOpenAI) -> None:
    for fields in ({"logit_bias": {"49152": 1}}, {"allowed_token_ids": [49152]}):
        with pytest.raises(openai.BadRequestError, match="from 0 to 49151") as refused:
            await client.completions.create(model=server.model, prompt="Once", extra_body=fields)
        assert refused.value.param == next(iter(fields))


def test_parameters_survive_the_broker() -> None:
    params = SamplingParams(
        max_tokens=5, logit_bias=((5, 1.0),), bad_words=((1, 2), (3,)), allowed_token_ids=(1,), **SENT
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in SENT for value in (float("nan"), -101)]
    + [("logit_bias", ((1, 101.0),)), ("bad_words", ((),)), ("typical_p", 0), ("repetition_penalty", 0)],
)
def test_parameters_out_of_range_name_themselves(name: str, value: Any) -> None:
    with pytest.raises(SamplingParamsError) as refused:
        SamplingParams(max_tokens=5, **{name: value})
    assert refused.value.param == name
