"""LoRA in the engine: the merged weights' logits, several adapters in one batch, nothing shared that differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.families.networks import TINY
from tests.model.peft_adapter import GPT2, GPTJ, LLAMA, NEOX, PeftAdapter
from tests.model.weights.networks import tiny_gpt2, tiny_llama
from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.adapter_loading import load_adapter
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.transformer.kernels.native_layers import NativeLayers
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights.lora import digest_of

CPU = torch.device("cpu")
PROMPT = [5, 17, 60, 33, 2, 8, 41, 77, 12, 90, 3, 64, 29, 18, 50, 7, 11, 83, 44, 26]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs=2)


def engine_of(folder: Path, **config: Any) -> Engine:
    config = {"num_blocks": 64, **config}
    return Engine.from_model(str(folder), EngineConfig(**config), dtype="float32", device="cpu")


def put(engine: Engine, folder: Path, name: str = "") -> str:
    """Load an adapter; returns its id."""
    digest = digest_of(folder)
    engine.runner.adapters.add(name or digest, load_adapter(folder, digest, engine.runner.model, max_rank=64))
    return name or digest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return PeftAdapter(tiny_llama(), LLAMA, seed=1).save(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of some matrices only, and of another rank."""
    return PeftAdapter(tiny_llama(), ("q_proj", "down_proj"), rank=7, seed=2).save(tmp_path_factory.mktemp("two"))


Result = dict[str, tuple[list[int], list[Any]]]


def run(engine: Engine, *requests: Request) -> Result:
    """Ids, and every log probability to its last bit."""
    found: Result = {request.request_id: ([], []) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            ids, logprobs = found[output.request_id]
            ids += output.token_ids
            logprobs += [*output.prompt_logprobs, *output.logprobs]
    engine.scheduler.check_integrity()
    return found


def asking(name: str, adapter: str, prompt: list[int] = PROMPT, params: SamplingParams = GREEDY) -> Request:
    return Request(name, prompt, params, adapter=adapter)


def logits_of(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.tensor([token_ids])).logits[0]
    return logits


@pytest.mark.parametrize(
    ("make", "targets", "fields"),
    [
        (tiny_llama, LLAMA, {}),
        (tiny_llama, ("k_proj", "up_proj"), {"use_rslora": True}),
        (tiny_gpt2, GPT2, {"fan_in_fan_out": True}),
        (TINY["gpt_neox"], NEOX, {}),  # q, k and v of a head side by side
        (TINY["gptj"], GPTJ, {}),  # other elements of a head rotated together
    ],
)
def test_it_computes_what_the_merged_weights_do(
    tmp_path: Path, make: Callable[[], PreTrainedModel], targets: tuple[str, ...], fields: dict[str, Any]
) -> None:
    make().save_pretrained(tmp_path / "base")
    adapter = PeftAdapter(make(), targets, **fields)
    engine = engine_of(tmp_path / "base")
    adapter_id = put(engine, adapter.save(tmp_path / "adapter"))
    ids, logprobs = run(engine, asking("r", adapter_id))["r"]
    merged = logits_of(adapter.merge_into(make()), PROMPT + ids).log_softmax(-1)
    assert ids == merged.argmax(-1)[len(PROMPT) - 1 : -1].tolist()
    for row, token in zip(merged, logprobs[1:], strict=False):
        assert abs(row[token.token_id] - token.logprob) < 1e-4
    plain = logits_of(make(), PROMPT + ids).log_softmax(-1)
    assert (plain - merged).abs().max() > 0.1


@pytest.mark.parametrize("max_num_batched_tokens", [256, 16])
def test_a_batch_of_two_adapters_and_none_has_the_bits_of_each_alone(
    base: Path, one: Path, two: Path, max_num_batched_tokens: int
) -> None:
    """Chunks and drafts included."""
    engine = engine_of(base, max_num_seqs=16, max_num_batched_tokens=max_num_batched_tokens)
    for name, folder in (("one", one), ("two", two)):
        put(engine, folder, name)
    repetitive = [9, 8, 7, 6] * 6
    requests = {
        f"{adapter} {prompt[0]}": (adapter, prompt) for prompt in (PROMPT, repetitive) for adapter in ("", "one", "two")
    }
    together = run(engine, *(asking(name, *request) for name, request in requests.items()))
    for name, request in requests.items():
        assert run(engine, asking(name, *request))[name] == together[name]
    assert together[" 5"] != together["one 5"] != together["two 5"] != together[" 5"]
    assert run(engine_of(base), asking("r", ""))["r"] == together[" 5"]


def test_equal_prompts_share_their_blocks_with_the_same_adapter_only(base: Path, one: Path, two: Path) -> None:
    engine = engine_of(base)
    names = ["", put(engine, one), put(engine, two)]
    params = SamplingParams(max_tokens=1, temperature=0.0)
    found = []
    for turn in range(2):
        for name in names:
            engine.add(asking(f"{turn} {name}", name, params=params))
            [output] = engine.step()
            found.append(output.num_cached_tokens)
    assert found == [0, 0, 0] + [len(PROMPT) - 1] * 3


def test_preempted_requests_go_on_with_their_adapters(base: Path, one: Path, two: Path) -> None:
    engine = engine_of(base)
    names = ["", put(engine, one), put(engine, two)]
    plain = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    alone = {name: run(engine, asking(name, name, params=plain))[name] for name in names}
    crowded = engine_of(base, num_blocks=6)
    for folder in (one, two):
        put(crowded, folder)
    together = run(crowded, *(asking(name, name, params=plain) for name in names))
    assert crowded.scheduler.num_preemptions > 0
    assert together == alone


def test_a_resumed_request_says_the_same(base: Path, one: Path) -> None:
    engine = engine_of(base)
    name = put(engine, one)
    whole = run(engine, asking("r", name))["r"][0]
    other = engine_of(base)
    resumed = Request("r", PROMPT, GREEDY, output_token_ids=whole[:9], adapter=put(other, one))
    assert run(other, resumed)["r"][0] == whole[9:]


def test_a_step_is_one_call_with_adapters_or_without(base: Path, one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(base)
    taken: list[str] = []
    for kind, method in ((NativeLayers, "__call__"), (Transformer, "run_layers")):
        monkeypatch.setattr(kind, method, _noting(taken, kind.__name__, getattr(kind, method)))
    before = run(engine, asking("r", ""))
    name = put(engine, one)
    assert run(engine, asking("r", name)) != before
    assert run(engine, asking("r", "")) == before
    assert set(taken) == {"NativeLayers"}


def test_one_call_gives_the_bits_of_many(base: Path, one: Path, two: Path) -> None:
    """Rows of an adapter stand apart and side by side, as requests begin and end."""
    found = []
    for layers_at_once in (True, False):
        engine = engine_of(base, max_num_seqs=16, max_num_batched_tokens=16)
        names = ["", put(engine, one), put(engine, two)]
        if not layers_at_once:
            del engine.runner.model.run_layers
        asked = enumerate([*names, *names, names[1], names[1]])
        requests = [asking(str(index), name, PROMPT[index % 3 :]) for index, name in asked]
        found.append(run(engine, *requests))
    assert found[0] == found[1]


def _noting(taken: list[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        taken.append(name)
        return method(*arguments)

    return noted


def test_an_adapter_that_is_not_loaded_is_refused(base: Path, one: Path) -> None:
    engine = engine_of(base)
    with pytest.raises(ValueError, match="not loaded"):
        engine.add(asking("r", "one"))
    put(engine, one, "one")
    engine.runner.adapters.remove("one")
    with pytest.raises(ValueError, match="not loaded"):
        engine.add(asking("r", "one"))
