"""What the API knows of the model it serves: enough to render, tokenize and judge lengths. No weights, no torch."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

from tokenrelay import __version__
from tokenrelay.model.config import MAX_STREAMING_LEN, ModelConfig
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import ModelDescription, describe, read_model_config, resolve
from tokenrelay.model.weights.sources import ModelSource
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.schemas.models import ModelCard
from tokenrelay.service.messages import Adapter
from tokenrelay.service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    max_model_len: int  # of prompt and output
    network: ModelConfig
    context: int  # tokens that attention sees at once: less than that, if sequences may outgrow it
    dialect: Dialect
    fingerprint: str = ""  # of what decides a text beside the request
    description: ModelDescription = field(default_factory=ModelDescription)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.max_model_len)

    def fingerprint_with(self, adapter: Adapter | None) -> str:
        return _digest((self.fingerprint, adapter.digest)) if adapter else self.fingerprint


def load_served_model(settings: Settings) -> ServedModel:
    """Resolve the setting ``model`` and read its tokenizer and its limits."""
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    config = read_model_config(source)
    limit = config.max_position_embeddings
    context = min(limit, settings.max_model_len or limit)
    tokenizer = Tokenizer.from_source(source)
    return ServedModel(
        name=settings.served_model_name or source.name,
        tokenizer=tokenizer,
        max_model_len=MAX_STREAMING_LEN if settings.attention_sinks else context,
        network=config,
        context=context,
        dialect=Dialect.of(tokenizer, settings.tool_call_format, settings.reasoning_format),
        fingerprint=_fingerprint(settings, source),
        description=describe(source, config),
    )


def _fingerprint(settings: Settings, source: ModelSource) -> str:
    """The same wherever equal requests with equal seeds give equal texts; OpenAI's ``system_fingerprint``."""
    deciding = (__version__, source.name, source.kind, settings.device, settings.dtype, settings.kv_cache_dtype)
    limits = (settings.max_model_len, settings.attention_sinks)
    return _digest((deciding, limits))


def _digest(deciding: object) -> str:
    return f"fp_{hashlib.sha256(repr(deciding).encode()).hexdigest()[:10]}"
