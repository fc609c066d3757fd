"""A network so small that the service around it is what a test loads: random weights, real tokens.

Its tokenizer is the beginning of SmolLM2's: the first tokens are those of the first merges, so they are a BPE of their
own, and with fewer of them sampling takes a twentieth of the time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

from tokenrelay.model.weights.gguf.metadata import GGUFMetadata, read_gguf_metadata

Matrix = npt.NDArray[np.float32]

VOCABULARY, CONTEXT = 2048, 512
LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 4, 16
LAYER_SHAPES = {
    "attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": (FEED_FORWARD, HIDDEN),
    "ffn_up": (FEED_FORWARD, HIDDEN),
    "ffn_down": (HIDDEN, FEED_FORWARD),
}
EOS = "tokenizer.ggml.eos_token_id"


def write_tiny_model(path: Path, tokenizer_from: Path) -> Path:
    """Write a Llama of two layers as GGUF, with the tokenizer of another GGUF file cut short."""
    metadata = read_gguf_metadata(tokenizer_from)
    tokens = metadata.strings("tokenizer.ggml.tokens")[:VOCABULARY]
    writer = GGUFWriter(path, "llama")
    _write_shape(writer)
    _write_tokenizer(writer, metadata, tokens)
    for name, matrix in _weights(tokens, metadata.count(EOS)).items():
        writer.add_tensor(f"{name}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: GGUFWriter) -> None:
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_layer_norm_rms_eps(1e-5)


def _write_tokenizer(writer: GGUFWriter, metadata: GGUFMetadata, tokens: list[str]) -> None:
    kept = set(tokens)
    merges = metadata.strings("tokenizer.ggml.merges")
    writer.add_tokenizer_model(metadata.string("tokenizer.ggml.model"))
    writer.add_tokenizer_pre(metadata.string("tokenizer.ggml.pre"))
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in metadata.numbers("tokenizer.ggml.token_type")[:VOCABULARY]])
    writer.add_token_merges([merge for merge in merges if merge.replace(" ", "") in kept])
    writer.add_chat_template(metadata.string("tokenizer.chat_template"))
    writer.add_bos_token_id(metadata.count("tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(metadata.count(EOS))
    writer.add_add_bos_token(False)


def _weights(tokens: list[str], eos: int) -> dict[str, Matrix]:
    """ASCII characters and the end are likelier than the rest: stop strings, ends and structure come within a few
    tokens."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN)} | {
        f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER_SHAPES.items()
    }
    weights = {name: _matrix(random, *shape) for name, shape in shapes.items()}
    weights["output"][[i for i, token in enumerate(tokens) if i == eos or (len(token) == 1 and token.isascii())]] *= 5
    norms = ("output_norm", *(f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")))
    return weights | {name: np.ones(HIDDEN, np.float32) for name in norms}


def _matrix(random: np.random.Generator, rows: int, columns: int) -> Matrix:
    return random.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
