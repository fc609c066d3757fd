"""The engine without the service: token ids in, token ids out."""

from __future__ import annotations

from pathlib import Path

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.engine.request import Request
from tokenrelay.model.sampling_params import SamplingParams
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import resolve


def test_generate_in_five_lines(smollm2_path: Path) -> None:
    tokenizer = Tokenizer.from_source(resolve(str(smollm2_path)))
    engine = Engine.from_model(str(smollm2_path), EngineConfig(num_blocks=64), device="cpu")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    engine.add(Request("mine", prompt, SamplingParams(max_tokens=16, temperature=0)))
    output = []
    while engine.has_work:
        output += [token_id for step in engine.step() for token_id in step.token_ids]
    assert "Paris" in tokenizer.decode(output)
