"""GGUF files of a tokenizer in SentencePiece's manner: three special tokens, every byte, then pieces by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFWriter

_SPECIAL = ["<unk>", "<s>", "</s>"]


def tokens_with(pieces: Sequence[str]) -> list[str]:
    return [*_SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *pieces]


def write_sentencepiece(path: Path, pieces: Sequence[str]) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens_with(pieces))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    for add, token_id in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(token_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
