"""Text to token ids and back, by the vocabulary that comes with a model; needs no torch and no transformers.

Promises two things beyond transformers' own ids: a text that only *spells* a special token never becomes one unless
the caller asks for it, and decoding works on bytes, so text can be streamed exactly.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as Backend

from tokenrelay.model.chat_template import ChatTemplate, Markers
from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.detokenizer import IncrementalDetokenizer
from tokenrelay.model.gguf_tokenizer import build_gguf_tokenizer, special_token
from tokenrelay.model.weights.config_reader import generation_eos_ids, gguf_eos_ids, read_json
from tokenrelay.model.weights.errors import CheckpointError
from tokenrelay.model.weights.gguf_metadata import read_gguf_metadata
from tokenrelay.model.weights.sources import ModelSource

_GGUF_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """One model's tokenizer. ``load`` builds the ``tokenizers`` object; two are needed, one per way to see special tokens.

    The second reads special tokens' spellings as plain text, and knows each special token by a secret spelling
    instead: what the chat template wrote is respelled, what a user wrote cannot be.
    """

    def __init__(
        self,
        load: Callable[[], Backend],
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = _unpadded(load())
        self._plain = _unpadded(load())
        added = self._backend.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self.special_ids = frozenset(special)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_ids = tuple(eos_token_ids)
        self._byte_level, self.strips_leading_space = _decoding(self._backend)
        self._secrets = _Secrets(self._plain, special)
        self._markers = Markers(token.content for token in special.values())
        self._template = ChatTemplate(chat_template, special_tokens or {})
        self._unknown_id = self._backend.token_to_id(getattr(self._backend.model, "unk_token", None) or "")

    @classmethod
    def from_source(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer of a GGUF file, or of a folder with tokenizer.json.

        Raises:
            UnsupportedModelError: a kind of tokenizer that is not known here.
            CheckpointError: its files are damaged or missing.
        """
        return _from_gguf(source.path) if source.kind == "gguf" else _from_folder(source.path)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        """The ids of ``text``; with ``add_special_tokens``, between the model's beginning and end tokens.

        Without ``parse_special``, a text that spells a special token is encoded as the letters it is made of.
        """
        if parse_special:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self._encode_plain(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become replacement characters."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.append(ids) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text (a special token: its spelling); none for an id without a token."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        return _byte_level_bytes(token) if self._byte_level else _sentencepiece_bytes(token)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text as the model's template writes it; raises ChatTemplateError."""
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's ids. Only the template's own special tokens are special; raises ChatTemplateError."""
        given = [messages, tools, template_kwargs]
        marker = self._markers.choose(given, self._template.source or "")
        if marker is not None:
            messages, tools, template_kwargs = self._markers.mark(given, marker)
        text = self.render_chat(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, template_kwargs=template_kwargs
        )
        if marker is None:
            return self.encode(text, add_special_tokens=False)
        return self._encode_plain(self._secrets.respell(text).replace(marker, ""), add_special_tokens=False)

    def _encode_plain(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._secrets.originals(self._plain.encode(text, add_special_tokens=add_special_tokens).ids)
        return ids


class _Secrets:
    """Special tokens of a backend under spellings that nobody outside can guess; their own become plain text."""

    def __init__(self, backend: Backend, special: Mapping[int, AddedToken]) -> None:
        backend.encode_special_tokens = True
        key = secrets.token_hex(8)
        self._spellings = {token.content: f"\uf8ff{key}.{i}\uf8ff" for i, token in special.items()}
        self._originals: dict[int, int] = {}
        for i, token in special.items():
            secret = self._spellings[token.content]
            options = {name: getattr(token, name) for name in ("lstrip", "rstrip", "normalized", "single_word")}
            backend.add_tokens([AddedToken(secret, **options)])
            self._originals[backend.token_to_id(secret)] = i
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def respell(self, text: str) -> str:
        return self._any.sub(lambda match: self._spellings[match[0]], text)

    def originals(self, ids: Iterable[int]) -> list[int]:
        return [self._originals.get(i, i) for i in ids]
