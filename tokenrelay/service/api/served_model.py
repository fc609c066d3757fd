"""What the API knows of the model it serves: enough to render, tokenize and judge lengths. No weights, no torch."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

from tokenrelay import __version__
from tokenrelay.model.config import MAX_STREAMING_LEN
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.weights import read_model_config, resolve
from tokenrelay.model.weights.sources import ModelSource
from tokenrelay.service.api.assistant.dialect import Dialect
from tokenrelay.service.api.schemas.models import ModelCard
from tokenrelay.service.errors import NotFoundError
from tokenrelay.service.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    name: str
    tokenizer: Tokenizer
    max_model_len: int  # of prompt and output
    context: int  # tokens that attention sees at once: less than that, if sequences may outgrow it
    dialect: Dialect
    fingerprint: str = ""  # of what decides a text beside the request
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.max_model_len)

    def require(self, name: str) -> None:
        """Raises NotFoundError when a client asks for another model."""
        if name != self.name:
            raise NotFoundError(
                f"The model '{name[:100]}' is not served here; this server has '{self.name}'.",
                param="model",
                code="model_not_found",
            )


def load_served_model(settings: Settings) -> ServedModel:
    """Resolve the setting ``model`` and read its tokenizer and its limits."""
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    limit = read_model_config(source).max_position_embeddings
    context = min(limit, settings.max_model_len or limit)
    tokenizer = Tokenizer.from_source(source)
    return ServedModel(
        name=settings.served_model_name or source.name,
        tokenizer=tokenizer,
        max_model_len=MAX_STREAMING_LEN if settings.attention_sinks else context,
        context=context,
        dialect=Dialect.of(tokenizer, settings.tool_call_format, settings.reasoning_format),
        fingerprint=_fingerprint(settings, source),
    )


def _fingerprint(settings: Settings, source: ModelSource) -> str:
    """The same wherever equal requests with equal seeds give equal texts; OpenAI's ``system_fingerprint``."""
    deciding = (__version__, source.name, source.kind, settings.device, settings.dtype, settings.kv_cache_dtype)
    limits = (settings.max_model_len, settings.attention_sinks)
    return f"fp_{hashlib.sha256(repr((deciding, limits)).encode()).hexdigest()[:10]}"
