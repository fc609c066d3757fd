"""What is sent: how many requests, how long, and how alike."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

Prompt = list[int] | str

# Words of our own, so that a story of any length is new and yet is English.
_NAMES = ("Ada", "Bruno", "Clara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Kwame", "Lena", "Olga")
_VERBS = ("carried", "sold", "lent", "brought", "showed", "promised", "returned", "gave")
_THINGS = ("apples", "lanterns", "maps", "letters", "coins", "ropes", "candles", "barrels", "feathers", "keys")
_PLACES = ("harbour", "mill", "station", "library", "bakery", "bridge", "market", "lighthouse", "garden", "tower")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_TOKENS_PER_WORD = 1.5


@dataclass(frozen=True, slots=True)
class Workload:
    """One load. ``rate`` 0 is a closed loop of ``clients``; ``beside`` is the length of a prompt that joins them."""

    clients: int = 16
    rate: float = 0.0
    requests: int = 0
    warm_up: int = -1
    prompt_tokens: int = 128
    output_tokens: int = 64
    shared_prefix: int = 0
    repetitive: bool = False
    beside: int = 0
    vocabulary: int = 30_000
    ignore_eos: bool = True

    @property
    def num_requests(self) -> int:
        """Four per client, or half a minute of arrivals, if nothing was said."""
        return self.requests or max(1, round(30 * self.rate)) if self.rate else self.requests or 4 * self.clients

    @property
    def num_warm_up(self) -> int:
        return self.warm_up if self.warm_up >= 0 else 1 if self.rate else self.clients

    @property
    def title(self) -> str:
        """In words."""
        load = f"{self.rate:g} requests/s" if self.rate else f"{self.clients} client{'s' * (self.clients != 1)}"
        arrival = f", a prompt of {self.beside} arrives" if self.beside else ""
        return f"{load}, {self.prompt_tokens}/{self.output_tokens} tokens{arrival}"

    def prompt(self, rng: random.Random, num_tokens: int = 0) -> Prompt:
        """One that no server has seen, but for the shared prefix: a new one every time, or prefix caches would help."""
        if self.repetitive:
            return retelling(rng, num_tokens or self.prompt_tokens)
        shared = self._ids(random.Random(0), self.shared_prefix)
        return shared + self._ids(rng, num_tokens or self.prompt_tokens)

    def prompts(self, rng: random.Random, count: int) -> list[Prompt]:
        return [self.prompt(rng) for _ in range(count)]

    def body(self, model: str, prompt: Prompt, output_tokens: int = 0) -> bytes:
        """The request, encoded, so that this costs nothing while the clock runs."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens or self.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(body | ({"ignore_eos": True} if self.ignore_eos else {}))

    def _ids(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(range(min(1000, self.vocabulary // 2), self.vocabulary), k=count)  # special ids are low


def retelling(rng: random.Random, num_tokens: int) -> str:
    """A story of about so many tokens, and the beginning of the same story again: the model repeats the rest."""
    sentences = [f"The story number {rng.randrange(10**6)} goes like this."]
    while sum(len(sentence.split()) for sentence in sentences) * _TOKENS_PER_WORD < num_tokens - 30:
        sentences.append(_sentence(rng))
    return f"{' '.join(sentences)}\n\nThe same story again, word for word:\n\n{sentences[0]}"


def _sentence(rng: random.Random) -> str:
    first, second = rng.sample(_NAMES, 2)
    what = f"{rng.randrange(2, 99)} {rng.choice(_THINGS)}"
    return f"On {rng.choice(_DAYS)} {first} {rng.choice(_VERBS)} {second} {what} at the {rng.choice(_PLACES)}."
