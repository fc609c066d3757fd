"""Networks whose tokens do not see everything: Mistral's sliding window, and a text that outgrows a Llama's context."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.model.transformer.paged_request import BLOCK
from tokenrelay.model.config import ModelConfig
from tokenrelay.model.families import FAMILIES
from tokenrelay.model.transformer.attention import AttentionMetadata
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.transformer.kv_cache import LayerCache, allocate_kv_cache
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.transformer import Transformer

CPU = torch.device("cpu")
LENGTH, CONTEXT, SINKS, WINDOW = 150, 50, 4, 21
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
    norm="rms",
    norm_eps=1e-6,
    activation="silu",
    gated_mlp=True,
    positions="rotary",
)
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "attn_implementation": "eager",
}

needs_native = pytest.mark.skipif(not native.is_available(), reason=native.why_unavailable() or "native library")


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms start as ones: hide no mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def loaded(theirs: PreTrainedModel, config: ModelConfig, max_model_len: int, attention_sinks: int = 0) -> Transformer:
    return load_transformer(
        config,
        theirs.state_dict().items(),
        FAMILIES["llama"].rules,
        max_model_len=max_model_len,
        attention_sinks=attention_sinks,
        dtype=torch.float32,
        device=CPU,
    )


class Sequence:
    """A text computed in steps, as the engine does it: what no later token sees is another's after every step."""

    def __init__(self, model: Transformer, ids: Tensor, dtype: torch.dtype, window: int, sinks: int) -> None:
        self.model, self.ids, self.window, self.sinks = model, ids, window, sinks
        blocks = -(-len(ids) // BLOCK)
        self.table = torch.randperm(blocks) + 1
        self.cache: list[LayerCache] = allocate_kv_cache(model.config, blocks + 1, BLOCK, dtype, CPU)

    def step(self, begin: int, end: int) -> Tensor:
        """Logits of the tokens [begin, end)."""
        positions = torch.arange(begin, end)
        as_seen = positions.clamp(max=self.sinks + self.window - 1)
        metadata = AttentionMetadata(
            self.table[positions // BLOCK] * BLOCK + positions % BLOCK,
            self.table.int().unsqueeze(0),
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            sink_positions=as_seen if self.sinks and as_seen[-1] < end - 1 else None,
        )
        logits = self.model.compute_logits(self.model(self.ids[begin:end], positions, self.cache, metadata))
        self.free(end)
        return logits

    def free(self, num_computed: int) -> None:
        for index in range(-(-self.sinks // BLOCK), max(0, num_computed - self.window + 1) // BLOCK):
            for tensor in (tensor for layer in self.cache for tensor in layer if tensor is not None):
                tensor[self.table[index]] = float("nan") if tensor.is_floating_point() else 99
            self.table[index] = 0

    def logits(self, chunk: int) -> Tensor:
        steps = range(0, len(self.ids), chunk)
        return torch.cat([self.step(begin, min(begin + chunk, len(self.ids))) for begin in steps])


@torch.inference_mode()
@pytest.mark.parametrize("window", [7, WINDOW, 64])
def test_mistral_equals_transformers(window: int) -> None:
    theirs = randomised(MistralForCausalLM(MistralConfig(**SHAPE, num_hidden_layers=2, sliding_window=window)))
    config = dataclasses.replace(CONFIG, sliding_window=window, rope_theta=theirs.config.rope_parameters["rope_theta"])
    model, ids = loaded(theirs, config, LENGTH), torch.randint(0, 96, (LENGTH,))
    expected = theirs(ids.unsqueeze(0)).logits[0]
    for chunk in (1, 33, LENGTH):
        logits = Sequence(model, ids, torch.float32, window, 0).logits(chunk)
        assert (logits - expected).abs().max() <= 1e-4


@torch.inference_mode()
def test_with_sinks_one_layer_sees_the_packed_text() -> None:
    """One layer's keys know nothing of what is before them, so streaming equals a short text: sinks and window."""
    theirs = randomised(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1)))
    model = loaded(theirs, dataclasses.replace(CONFIG, num_layers=1), SINKS + WINDOW, SINKS)
    ids = torch.randint(0, 96, (LENGTH,))
    logits = Sequence(model, ids, torch.float32, WINDOW, SINKS).logits(33)
    for position in range(LENGTH):
        before = ids[: position + 1]
        packed = before if position < SINKS + WINDOW else torch.cat((ids[:SINKS], before[-WINDOW:]))
        assert (logits[position] - theirs(packed.unsqueeze(0)).logits[0, -1]).abs().max() <= 1e-4


@needs_native
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.int8])
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_chunks_have_the_bits_of_decode_steps(sinks: int, dtype: torch.dtype) -> None:
    theirs = randomised(LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2)))
    config = CONFIG if sinks else dataclasses.replace(CONFIG, sliding_window=WINDOW)
    model = loaded(theirs, config, SINKS + WINDOW if sinks else LENGTH, sinks)
    ids = torch.randint(0, 96, (LENGTH,))
    expected = Sequence(model, ids, dtype, WINDOW, sinks).logits(1)
    for chunk in (5, 16, 64, LENGTH):
        assert torch.equal(Sequence(model, ids, dtype, WINDOW, sinks).logits(chunk), expected)


def test_sinks_that_do_not_suit_are_refused_by_name() -> None:
    windowed, learned = dataclasses.replace(CONFIG, sliding_window=9), dataclasses.replace(CONFIG, positions="learned")
    with pytest.raises(ValueError, match=r"attention_sinks \(4\).*sliding_window \(9\)"):
        Transformer(windowed, CONTEXT, SINKS)
    with pytest.raises(ValueError, match=r"attention_sinks needs rotary positions.*learned"):
        Transformer(learned, CONTEXT, SINKS)
    with pytest.raises(ValueError, match=r"attention_sinks \(50\) must be between 0 and max_model_len \(50\)"):
        Transformer(CONFIG, CONTEXT, CONTEXT)
    with pytest.raises(ValueError, match="attention_sinks is not supported on cuda"):
        load_transformer(
            CONFIG, [], (), max_model_len=9, attention_sinks=4, dtype=torch.float32, device=torch.device("cuda")
        )
