"""Chat templates that write control tokens in the manner of each family, and tokenizers of each kind that have them.

Vocabularies are as hostile as a published one may be: plain text can be merged, letter by letter, into every control
token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram

from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights.sources import resolve

_TEXT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{- content | trim -}}{%- else -%}"
    "{%- for part in content or [] -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


def _template(turn: str, tools: str) -> str:
    """``turn`` writes the message ``m``; ``tools`` what there is to call."""
    return f"{_TEXT}{{% if tools %}}{tools}{{% endif %}}{{% for m in messages %}}{turn}{{% endfor %}}"


_CALLS = (
    "{% for c in m.tool_calls or [] %}%s{{ c.function.name }} {{ c.function.arguments if c.function.arguments is string"
    " else c.function.arguments | tojson }}%s{% endfor %}"
)


def _calls(before: str = "", after: str = "") -> str:
    return _CALLS.replace("%s", before, 1).replace("%s", after, 1)


# Control tokens, and the template. Some write mappings as Python does, or JSON in ASCII: as published ones do.
FAMILIES: dict[str, tuple[list[str], str]] = {
    "chatml": (
        ["<|im_start|>", "<|im_end|>"],
        _template(
            "<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
            "{{ text(m.content) }}" + _calls("<tool_call>", "</tool_call>") + "<|im_end|>\n",
            "<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n",
        ),
    ),
    "llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>"
        + _template(
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.reasoning_content }}{{ text(m.content) }}"
            + _calls()
            + "<|eot_id|>",
            "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}",
        ),
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
        "<s>"
        + _template(
            "{% if m.role == 'assistant' %}{{ m.reasoning_content }}{{ text(m.content) }}"
            + _calls("[TOOL_CALLS]")
            + "</s>{% else %}[INST]{{ text(m.content) }}[/INST]{% endif %}",
            "[AVAILABLE_TOOLS]{{ tools | tojson(ensure_ascii=true) }}[/AVAILABLE_TOOLS]",
        ),
    ),
    "gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>"
        + _template(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.reasoning_content }}"
            "{{ text(m.content) }}{{ m.tool_calls }}<end_of_turn>\n",
            "<start_of_turn>user\n{{ tools }}<end_of_turn>\n",
        ),
    ),
    "phi": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|end|>"],
        _template(
            "{{ '<|' + m.role + '|>' }}{{ m.reasoning_content }}{{ text(m.content) }}" + _calls() + "<|end|>",
            "<|tool|>{{ tools | tojson }}<|/tool|>",
        ),
    ),
    "granite": (
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"],
        _template(
            "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.reasoning_content }}{{ text(m.content) }}"
            + _calls("<|tool_call|>")
            + "<|end_of_text|>\n",
            "<|start_of_role|>tools<|end_of_role|>{{ tools | tojson(indent=4) }}<|end_of_text|>\n",
        ),
    ),
    "gpt-oss": (
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>"],
        _template(
            "{% if m.reasoning_content %}<|start|>{{ m.role }}<|channel|>analysis<|message|>"
            "{{ m.reasoning_content }}<|end|>{% endif %}<|start|>{{ m.role }}<|message|>{{ text(m.content) }}<|end|>"
            "{% for c in m.tool_calls or [] %}<|start|>assistant to=functions.{{ c.function.name }}<|channel|>json"
            "<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}",
            "<|start|>developer<|message|>{% for t in tools %}// {{ t.function.description }}\ntype "
            "{{ t.function.name }} = {{ t.function.parameters | tojson }}{% endfor %}<|end|>",
        ),
    ),
}


def _grown(control: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make every control token of its letters, one after the other."""
    return list(dict.fromkeys((token[:n], token[n]) for token in control for n in range(1, len(token))))


def _vocabulary(letters: Sequence[str], control: Sequence[str]) -> list[str]:
    """What these merges make, too; the control tokens come last."""
    pieces = dict.fromkeys([*letters, *"".join(control), *(a + b for a, b in _grown(control))])
    return [piece for piece in pieces if piece not in control] + list(control)


def _saved(backend: Backend, control: Sequence[str], template: str, folder: Path, normalized: bool = False) -> Path:
    backend.add_special_tokens([AddedToken(token, normalized=normalized, special=True) for token in control])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def _byte_level(control: Sequence[str], template: str, folder: Path, composes: bool = False) -> Path:
    tokens = _vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), control)
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=_grown(control)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if composes:
        backend.normalizer = normalizers.NFKC()
    return _saved(backend, control, template, folder, normalized=composes)


def _composing(control: Sequence[str], template: str, folder: Path) -> Path:
    """Control tokens are looked for in the normalized text, where a wide ＜ has become a <."""
    return _byte_level(control, template, folder, composes=True)


_BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _spaces(backend: Backend, prefix: bool) -> None:
    spaces, strip = normalizers.Replace(" ", "▁"), [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(parts)


def _sentencepiece(control: Sequence[str], template: str, folder: Path, prefix: bool = False) -> Path:
    tokens = ["<unk>", *_BYTES, *_vocabulary("▁abcdefgh", control)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(BPE(vocab=vocab, merges=_grown(control), byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    _spaces(backend, prefix)
    return _saved(backend, ["<unk>", *control], template, folder)


def _prefixed_sentencepiece(control: Sequence[str], template: str, folder: Path) -> Path:
    return _sentencepiece(control, template, folder, prefix=True)


def _unigram(control: Sequence[str], template: str, folder: Path) -> Path:
    """Nothing is likelier than a control token."""
    pieces = [(token, -1.0) for token in _vocabulary("▁abcdefgh", control)[: -len(control)]]
    scored = [("<unk>", 0.0), *((token, -9.0) for token in _BYTES), *pieces, *((token, 0.0) for token in control)]
    backend = Backend(Unigram(scored, unk_id=0, byte_fallback=True))
    _spaces(backend, prefix=True)
    return _saved(backend, ["<unk>", *control], template, folder)


def _gguf(path: Path, model: str, tokens: list[str], control: Sequence[str], template: str, **fields: Any) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types([2 if t == "<unk>" else 6 if t in _BYTES else 3 if t in control else 1 for t in tokens])
    writer.add_chat_template(template)
    for name, value in fields.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _gguf_gpt2(control: Sequence[str], template: str, folder: Path) -> Path:
    tokens = _vocabulary(sorted(pre_tokenizers.ByteLevel.alphabet()), control)
    merges = [f"{left} {right}" for left, right in _grown(control)]
    fields = {"add_tokenizer_pre": "gpt-2", "add_token_merges": merges}
    return _gguf(folder / "x.gguf", "gpt2", tokens, control, template, **fields)


def _gguf_llama(control: Sequence[str], template: str, folder: Path, prefix: bool = False) -> Path:
    tokens = ["<unk>", *_BYTES, *_vocabulary("▁abcdefgh", control)]
    scores = [-float(i) for i in range(len(tokens))]
    fields = {"add_token_scores": scores, "add_unk_token_id": 0, "add_add_space_prefix": prefix}
    return _gguf(folder / "x.gguf", "llama", tokens, control, template, **fields)


def _prefixed_gguf_llama(control: Sequence[str], template: str, folder: Path) -> Path:
    return _gguf_llama(control, template, folder, prefix=True)


KINDS = {
    "byte-level BPE": _byte_level,
    "byte-level BPE, normalizing": _composing,
    "SentencePiece BPE": _sentencepiece,
    "SentencePiece BPE, a space in front": _prefixed_sentencepiece,
    "Unigram": _unigram,
    "GGUF gpt2": _gguf_gpt2,
    "GGUF llama": _gguf_llama,
    "GGUF llama, a space in front": _prefixed_gguf_llama,
}


def tokenizer(kind: str, family: str, folder: Path) -> Tokenizer:
    """Of this kind, with the control tokens and the template of this family."""
    control, template = FAMILIES[family]
    return Tokenizer.from_source(resolve(str(KINDS[kind](control, template, folder))))
