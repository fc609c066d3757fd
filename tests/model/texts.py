"""Seeded texts that are hard on tokenizers: scripts, emoji, combining marks, white space, code, control spellings."""

from __future__ import annotations

import random

PARTS = (
    *("the quick brown fox", "Hello", "it's", "WE'LL", "don’t", "e.g.", "x=1;", "naïve café", "ﬁnancial", "…", "—"),
    *(
        "Привет, мир",
        "你好，世界",
        "こんにちは",
        "안녕하세요",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते",
        "สวัสดี",
        "ꦲꦏ꧀ꦱꦫ",
        "𐍈𐌰",
        "𝔘𝔫𝔦",
    ),
    *(
        "🙂",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "🇩🇪🇫🇷",
        "👍🏽",
        "❤️",
        "e\u0301",
        "a\u0308\u0323",
        "Z\u0351\u036b\u0343",
        "\u200d",
        "\ufeff",
        "\u00ad",
    ),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", " \n ", "\r\n", "\u00a0", "\u3000", "\u2028", "\x00", "\x7f"),
    *("0", "7", "1234567890", "3.14159", "1,000", "½²³", "Ⅷ", "٣٤٥", "१२", "0x1F"),
    *("def f(x):\n    return x\n", "{{ }}", "<b>", "a->b", "//", "```", "$x^2$", "http://a.b/?c=d&e#f", "\\n", "'s 'S"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_",
        "end|>",
        "<|",
        "|>",
        "<repo_name>",
        "<s>",
        "</s>",
        "<unk>",
    ),
    *("▁", "Ġ", "Ċ", "<0x0A>", "�", "\U0010fffd", "\ue000", "\uf8ff"),
)


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """``count`` texts of up to 12 parts, with and without spaces between, and a random character here and there."""
    chance = random.Random(seed)
    return [_text(chance) for _ in range(count)]


def _text(chance: random.Random) -> str:
    between = chance.choice(["", "", " ", "\n"])
    parts = [chance.choice(PARTS) if chance.random() < 0.9 else _character(chance) for _ in range(chance.randrange(13))]
    return between.join(parts)


def _character(chance: random.Random) -> str:
    code = chance.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)
