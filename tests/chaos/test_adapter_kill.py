"""A worker is killed under streams of several adapters: each goes on with its own at the next worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chaos.streams import Recording, have_begun, read_all, read_all_while
from tests.model.peft_adapter import LLAMA, PeftAdapter
from tests.service import tiny_model as tiny_shape
from tests.service.running import MODEL, RunningService, wait_until


def write_adapter(folder: Path, seed: int) -> Path:
    """Of the tiny model."""
    shape = LlamaConfig(
        vocab_size=8,
        hidden_size=tiny_shape.HIDDEN,
        intermediate_size=tiny_shape.FEED_FORWARD,
        num_hidden_layers=tiny_shape.LAYERS,
        num_attention_heads=tiny_shape.HEADS,
        num_key_value_heads=tiny_shape.KV_HEADS,
    )
    return PeftAdapter(LlamaForCausalLM(shape), LLAMA, seed=seed).save(folder)


@pytest.mark.long
def test_streams_of_adapters_go_on_at_the_next_worker(tmp_path: Path, tiny: dict[str, Any]) -> None:
    """One is named at the start, the other is loaded while it runs; a plain stream runs beside them."""
    named, loaded = (write_adapter(tmp_path / name, seed) for seed, name in enumerate(("named", "loaded")))
    options = {"lora_modules": f"named={named}", "allow_lora_loading": True, **tiny}
    plain = {"prompt": "Once upon a time", "max_tokens": 200, "seed": 7}
    bodies = [plain | {"model": model} for model in (MODEL, "named", "loaded") * 2]
    with (
        RunningService(tmp_path, spare_workers=1, **options) as service,
        httpx.Client(base_url=service.url, timeout=60) as http,
    ):
        body = {"lora_name": "loaded", "lora_path": str(loaded)}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        undisturbed = read_all(http, bodies)

        def kill(recordings: Sequence[Recording]) -> None:
            wait_until(lambda: have_begun(recordings, 2), "all streams have begun")
            service.kill("worker")

        disturbed = read_all_while(http, bodies, kill)
        wait_until(lambda: service.log.count('"worker ready"') == 3, "the killed one's successor is ready", 60)
        assert service.metric("tokenrelay_requests_resumed_total") > 0
    for recording, expected in zip(disturbed, undisturbed, strict=True):
        recording.assert_whole()
        assert recording.choices == expected.choices
    assert len({recording.text for recording in undisturbed}) == 3
