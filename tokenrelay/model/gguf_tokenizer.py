"""A ``tokenizers.Tokenizer`` from the vocabulary in a GGUF file's metadata.

llama.cpp keeps tokens, merges or scores, and the *name* of the pre-tokenizer; how each name splits a text is the table
below, after the tokenizer.json of the models that brought it. A name not listed is refused, since another split
gives other ids without any error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tokenrelay.model.config import UnsupportedModelError
from tokenrelay.model.weights.gguf.metadata import GGUFMetadata

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_SPECIAL = (_UNKNOWN, _CONTROL)

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # a word ends where a capital follows a small letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How texts are cut before merging: ``splits`` one after the other, each isolating its matches."""

    splits: tuple[str, ...]
    whole_words: bool = False  # a piece that is in the vocabulary is taken as it is, merges or not
    adds_bos: bool = False  # unless the file says otherwise
    composes: bool = False  # normalises to NFC first


_GPT2 = _PreTokenizer((_WORDS,))
_DIGITS = _PreTokenizer((r"\p{N}", _WORDS))
_LLAMA3 = _PreTokenizer((_TIKTOKEN % r"\p{N}{1,3}",), whole_words=True, adds_bos=True)
_THREE_DIGITS = _PreTokenizer((_TIKTOKEN % r"\p{N}{1,3}",))
_ONE_DIGIT = _PreTokenizer((_TIKTOKEN % r"\p{N}",), composes=True)
_PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "granite-docling"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama-v3", "llama3", "falcon3", "falcon-h1"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _THREE_DIGITS),
    **dict.fromkeys(("qwen2", "stablelm2"), _ONE_DIGIT),
    "gpt-4o": _PreTokenizer((_CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}"),)),
    "tekken": _PreTokenizer((_CASED % ("", "", r"\p{N}"),), whole_words=True, adds_bos=True),
    "falcon": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _WORDS, "[0-9][0-9][0-9]")),
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def build_gguf_tokenizer(metadata: GGUFMetadata) -> Tokenizer:
    """The tokenizer that the file describes, special tokens included.

    Raises:
        UnsupportedModelError: a tokenizer model or pre-tokenizer that is not known here.
        CheckpointError: parts of the vocabulary are missing or contradict each other.
    """
    model = metadata.string("tokenizer.ggml.model")
    builder = {"gpt2": _byte_level, "llama": _sentencepiece}.get(model)
    if builder is None:
        raise UnsupportedModelError(f"{metadata.path}: tokenizer model {model!r} is not supported; known: gpt2, llama")
    tokens, types = metadata.strings("tokenizer.ggml.tokens"), _token_types(metadata)
    tokenizer = builder(metadata, tokens, types)
    kinds = list(zip(tokens, types, strict=True))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind in _SPECIAL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])
    return tokenizer


def special_token(metadata: GGUFMetadata, name: str) -> str | None:
    """The spelling of the file's ``name`` token (bos, eos, unknown, padding), if it names one."""
    token_id = metadata.token_id(f"tokenizer.ggml.{name}_token_id")
    tokens = metadata.strings("tokenizer.ggml.tokens")
    return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None


def _token_types(metadata: GGUFMetadata) -> list[int]:
    tokens = metadata.strings("tokenizer.ggml.tokens")
    if "tokenizer.ggml.token_type" not in metadata.values:
        return [_NORMAL] * len(tokens)
    types = list(metadata.integers("tokenizer.ggml.token_type"))
    if len(types) != len(tokens):
        raise metadata.error(f"has {len(tokens)} tokens, but types for {len(types)}")
    return types


def _byte_level(metadata: GGUFMetadata, tokens: list[str], types: list[int]) -> Tokenizer:
    name = metadata.string("tokenizer.ggml.pre", "default")
    kind = _PRE_TOKENIZERS.get(name)
    if kind is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UnsupportedModelError(
            f"{metadata.path}: pre-tokenizer {name!r} is not supported; known: {known}. "
            "The model's folder with tokenizer.json, instead of the GGUF file, needs none of them"
        )
    merges = [_pair(merge) for merge in metadata.strings("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(_bpe(metadata, tokens, merges, ignore_merges=kind.whole_words))
    if kind.composes:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in kind.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    _add_bos_and_eos(tokenizer, metadata, adds_bos=kind.adds_bos)
    return tokenizer


def _sentencepiece(metadata: GGUFMetadata, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = metadata.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise metadata.error(f"has {len(tokens)} tokens, but scores for {len(scores)}")
    pieces = [(t, score) for t, score, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL]
    unknown = special_token(metadata, "unknown")
    merges = _merges(pieces)
    tokenizer = Tokenizer(_bpe(metadata, tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = metadata.boolean("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add_bos_and_eos(tokenizer, metadata, adds_bos=True)
    return tokenizer


def _bpe(metadata: GGUFMetadata, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, **options)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise metadata.error(f"the vocabulary contradicts itself: {error}") from error


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _merges(pieces: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: every way to put a piece together from two others, best score first.

    Control tokens take no part, so no text can be merged into one.
    """
    scores = dict(pieces)
    order = {piece: i for i, piece in enumerate(scores)}
    ways: list[tuple[float, str, str]] = []
    for piece, score in scores.items():
        cuts = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        known = [(left, right) for left, right in cuts if left in scores and right in scores]
        ways += [(score, *way) for way in sorted(known, key=lambda way: (order[way[0]], order[way[1]]))]
    ways.sort(key=lambda way: (way[0], len(way[1]), len(way[2])), reverse=True)
    return [(left, right) for _, left, right in ways]


def _add_bos_and_eos(tokenizer: Tokenizer, metadata: GGUFMetadata, *, adds_bos: bool) -> None:
    bos, eos = special_token(metadata, "bos"), special_token(metadata, "eos")
    first = [bos] if bos and metadata.boolean("tokenizer.ggml.add_bos_token", adds_bos) else []
    last = [eos] if eos and metadata.boolean("tokenizer.ggml.add_eos_token", False) else []
    if first or last:
        ids = [(token, tokenizer.token_to_id(token)) for token in {*first, *last}]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], pair=[*first, "$A", *last, "$B"], special_tokens=ids
        )
