"""Text to token ids and back, by the vocabulary that comes with a model; needs no torch and no transformers.

Promises two things beyond transformers' own ids: a text that only *spells* a special token never becomes one unless
the caller asks for it, and decoding works on bytes, so text can be streamed exactly.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from tokenrelay.model.chat_template import ChatTemplate, Markers, unmarked
from tokenrelay.model.detokenizer import IncrementalDetokenizer
from tokenrelay.model.tokenizer_description import TokenizerDescription, describe_tokenizer
from tokenrelay.model.weights.sources import ModelSource

__all__ = ["IncrementalDetokenizer", "Tokenizer"]


class Tokenizer:
    """One model's tokenizer: ids as transformers gives them, and control over who may write special tokens.

    Holds two backends. The plain one reads special tokens' spellings as text, and knows each special token by a
    secret spelling instead: what the chat template wrote is respelled, and what a user wrote cannot be.
    """

    def __init__(self, described: TokenizerDescription) -> None:
        self._backend, self._plain = described.load(), described.load()
        special = {i: t for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        self._secrets = _Secrets(self._plain, special)
        self._markers = Markers(token.content for token in special.values())
        self.special_tokens = {token.content: token_id for token_id, token in special.items()}
        self._template = ChatTemplate(described.chat_template, described.special_tokens)
        self._token_bytes = described.token_bytes
        self.strips_leading_space = described.strips_leading_space
        self.special_ids = frozenset(special)
        self.eos_token_ids = described.eos_token_ids
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._unknown_id = self._backend.token_to_id(getattr(self._backend.model, "unk_token", None) or "")

    @classmethod
    def from_source(cls, source: ModelSource) -> Tokenizer:
        """The tokenizer of a GGUF file, or of a folder with tokenizer.json.

        Raises:
            UnsupportedModelError: a kind of tokenizer that is not known here.
            CheckpointError: its files are damaged or missing.
        """
        return cls(describe_tokenizer(source))

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool = True) -> list[int]:
        """The ids of ``text``; with ``add_special_tokens``, between the model's beginning and end tokens.

        Without ``parse_special``, a text that spells a special token is encoded as the letters it is made of.
        """
        if parse_special:
            return _encoding(self._backend, text, add_special_tokens).ids
        return self._encode_plain(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become replacement characters."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.append(ids) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text (a special token: its spelling); none for an id without a token."""
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._token_bytes(token)

    def spelling(self, token_id: int) -> str:
        """The token as the vocabulary writes it, in whatever alphabet of its own."""
        return self._backend.id_to_token(token_id) or ""

    @property
    def kind(self) -> str:
        """Of its model: BPE, Unigram …"""
        return type(self._backend.model).__name__

    @property
    def chat_template(self) -> ChatTemplate:
        """How messages become a prompt."""
        return self._template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text as the model's template writes it; raises ChatTemplateError."""
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt's ids. Only the template's own special tokens are special; raises ChatTemplateError."""
        given = [messages, tools, template_kwargs]
        marker = self._markers.choose(given, self._template.source or "")
        if marker is not None:
            messages, tools, template_kwargs = self._markers.mark(given, marker)
        text = self.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=template_kwargs,
        )
        text = self._secrets.respell(text)
        return self._encode_plain(unmarked(text, marker) if marker else text, add_special_tokens=False)

    def _encode_plain(self, text: str, *, add_special_tokens: bool) -> list[int]:
        encoding = _encoding(self._plain, text, add_special_tokens)
        if self.special_ids.isdisjoint(encoding.ids):  # a loop over a long prompt takes a tenth of encoding it
            return self._secrets.originals(encoding.ids)
        ids: list[int] = []
        for i, added in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if i in self.special_ids and not added and i != self._unknown_id:
                ids += self._spelled_out(i)
            else:
                ids.append(self._secrets.original(i))
        return ids

    def _spelled_out(self, token_id: int) -> list[int]:
        """The token as single characters: some vocabularies can merge plain text into a special token."""
        spelling = self._plain.id_to_token(token_id) or ""
        return [part.id for character in spelling for part in self._plain.model.tokenize(character)]


def _encoding(backend: Backend, text: str, add_special_tokens: bool) -> Encoding:
    """``backend.encode`` would hold the interpreter's lock, for seconds if the text is long; batch calls do not."""
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


class _Secrets:
    """Special tokens of a backend under spellings that nobody outside can guess; their own become plain text."""

    def __init__(self, backend: Backend, special: Mapping[int, AddedToken]) -> None:
        backend.encode_special_tokens = True
        key = secrets.token_hex(8)
        self._spellings = {token.content: f"\uf8ff{key}.{i}\uf8ff" for i, token in special.items()}
        backend.add_tokens([_respelled(token, self._spellings[token.content]) for token in special.values()])
        self._originals = {backend.token_to_id(self._spellings[token.content]): i for i, token in special.items()}
        longest_first = sorted(self._spellings, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def respell(self, text: str) -> str:
        return self._any.sub(lambda match: self._spellings[match[0]], text)

    def original(self, token_id: int) -> int:
        return self._originals.get(token_id, token_id)

    def originals(self, token_ids: list[int]) -> list[int]:
        return list(map(self._originals.get, token_ids, token_ids))


def _respelled(token: AddedToken, content: str) -> AddedToken:
    return AddedToken(
        content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
    )
