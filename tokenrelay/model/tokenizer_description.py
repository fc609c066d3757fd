"""What a model's files say of its tokenizer: how to build it, how its tokens become bytes, its chat template.

Two kinds of vocabulary are known: byte-level BPE (GPT-2 and most since) and SentencePiece with byte fallback (Llama 2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.gguf_tokenizer import build_gguf_tokenizer, special_token
from tokenrelay.model.weights.config_reader import generation_eos_ids, read_json
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf.config import gguf_eos_ids
from tokenrelay.model.weights.gguf.metadata import read_gguf_metadata
from tokenrelay.model.weights.sources import ModelSource

_GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SPECIAL_NAMES = (*_GGUF_NAMES, "sep_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerDescription:
    """``load`` builds a new backend each time; ``special_tokens`` are the names that chat templates may use."""

    load: Callable[[], Tokenizer]
    token_bytes: Callable[[str], bytes]
    strips_leading_space: bool
    chat_template: str | None
    special_tokens: Mapping[str, str]
    eos_token_ids: tuple[int, ...]


def describe_tokenizer(source: ModelSource) -> TokenizerDescription:
    """Read the tokenizer's files.

    Raises:
        UnsupportedModelError: a kind of tokenizer that is not known here.
        CheckpointError: files are damaged or missing.
    """
    return _from_gguf(source.path) if source.kind == "gguf" else _from_folder(source.path)


def _from_gguf(path: Path) -> TokenizerDescription:
    metadata = read_gguf_metadata(path)
    sentencepiece = metadata.string("tokenizer.ggml.model") == "llama"
    spellings = {name: special_token(metadata, key) for name, key in _GGUF_NAMES.items()}
    return TokenizerDescription(
        load=lambda: build_gguf_tokenizer(metadata),
        token_bytes=_sentencepiece_bytes if sentencepiece else _byte_level_bytes,
        strips_leading_space=sentencepiece and metadata.boolean("tokenizer.ggml.add_space_prefix", True),
        chat_template=metadata.string("tokenizer.chat_template", "") or None,
        special_tokens={name: spelling for name, spelling in spellings.items() if spelling is not None},
        eos_token_ids=gguf_eos_ids(metadata),
    )


def _from_folder(folder: Path) -> TokenizerDescription:
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    spellings = {name: _spelling(settings.get(name)) for name in _SPECIAL_NAMES}
    special_tokens = {name: spelling for name, spelling in spellings.items() if spelling is not None}
    backend = _load(folder)
    unknown = getattr(backend.model, "unk_token", None)
    if unknown is not None and unknown not in backend.get_vocab():
        raise CheckpointError(
            f"{folder}: tokenizer.json has no token {unknown[:64]!r}, which it names as the unknown one"
        )
    decoder = _decoder_parts(backend)
    sentencepiece = "ByteFallback" in decoder
    if not sentencepiece and decoder != ["ByteLevel"]:
        raise UnsupportedModelError(f"{folder}: a tokenizer that decodes by {decoder or 'nothing'} is not supported")
    eos = backend.get_vocab().get(special_tokens.get("eos_token", ""))
    return TokenizerDescription(
        load=lambda: _load(folder),
        token_bytes=_sentencepiece_bytes if sentencepiece else _byte_level_bytes,
        strips_leading_space=sentencepiece and "Strip" in decoder,
        chat_template=_chat_template(folder, settings),
        special_tokens=special_tokens,
        eos_token_ids=tuple(dict.fromkeys(([] if eos is None else [eos]) + list(generation_eos_ids(folder)))),
    )


def _load(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no tokenizer.json; write one with transformers' save_pretrained")
    backend = _read(path)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exceptions, and where Rust panics not even these
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {error}") from error


def _decoder_parts(backend: Tokenizer) -> list[str]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in decoder.get("decoders", [decoder])]


def _spelling(token: Any) -> str | None:
    """Older files write a token as an object that holds its text."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where printable, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[letter] for letter in token])
    except KeyError:  # an added token, spelled in plain text
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
