"""The settings of every process: the only reader of the environment.

Each field is read from ``TOKENRELAY_<NAME>`` or a command-line option of the same name. Frozen; contradictions
refuse to start with both names in the message. Derived values are properties.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """All of it, with the defaults of a small deployment on one machine."""

    model_config = SettingsConfigDict(env_prefix="TOKENRELAY_", frozen=True, extra="forbid")

    # what to serve
    model: str = Field("smollm2-135m-instruct", description="Alias, GGUF file, folder with safetensors, or hub id.")
    served_model_name: str = Field("", description="Name clients use; empty: the model's own name.")
    cache_dir: Path = Field(Path("~/.cache/tokenrelay"), description="Where pulled models are kept.")

    # where things listen
    redis_url: str = Field("", description="Valkey or Redis; empty: `serve` starts an embedded one.")
    data_dir: Path = Field(
        Path("~/.local/state/tokenrelay"), description="Where the embedded Valkey keeps its append-only file."
    )
    broker_memory_mb: int = Field(256, ge=16, description="Memory cap of the embedded Valkey (noeviction).")
    host: str = Field("127.0.0.1", description="Address of the HTTP server.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the HTTP server; 0 picks a free one.")
    worker_metrics_port: int = Field(
        8001, ge=0, le=65535, description="Port of a model worker's /metrics; 0 picks one."
    )

    # the engine
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the network runs: auto, cpu or cuda.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the weights: auto, float32, bfloat16 or float16."
    )
    num_threads: int = Field(0, ge=0, description="Compute threads on a CPU; 0: one per core this process may use.")
    kv_cache_dtype: Literal["auto", "int8"] = Field("auto", description="Type of the KV cache: auto is as dtype.")
    kv_cache_mb: int = Field(1024, ge=1, description="Memory budget of the KV cache.")
    max_model_len: int = Field(0, ge=0, description="Longest prompt plus output in tokens; 0: the model's own limit.")
    max_num_seqs: int = Field(64, ge=1, description="Requests computed in one step.")
    max_num_batched_tokens: int = Field(256, ge=1, description="Token budget of one step.")
    max_prefill_tokens_beside_decodes: int = Field(
        64, ge=1, description="Prompt tokens of a step in which streams run; bounds the stall a prompt causes them."
    )
    num_speculative_tokens: int = Field(
        8, ge=0, le=64, description="Most drafts verified per request and step (prompt lookup); 0: no speculation."
    )
    attention_sinks: int = Field(
        0, ge=0, le=64, description="StreamingLLM: first tokens kept while a sequence outgrows the context; 0: it ends."
    )
    enable_prefix_caching: bool = Field(True, description="Reuse the KV blocks of equal prompt beginnings.")

    # the relay
    lease_seconds: float = Field(5.0, gt=0, description="A worker silent for this long loses its requests to another.")
    max_attempts: int = Field(3, ge=1, description="Workers a request may kill before it is a dead letter.")
    max_waiting: int = Field(1024, ge=1, description="Requests that may wait; more are answered 503.")
    retention_seconds: float = Field(300.0, gt=0, description="How long a finished request's log can be read.")
    drain_seconds: float = Field(30.0, ge=0, description="How long running streams may finish after SIGTERM.")

    # what a client may send
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body.")
    max_n: int = Field(16, ge=1, description="Largest n, and most prompts in one completion request.")
    keep_alive_seconds: float = Field(15.0, gt=0, description="A silent stream sends an SSE comment this often.")

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line logged: debug, info, warning or error."
    )

    @field_validator("cache_dir", "data_dir")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        return path.expanduser()

    @model_validator(mode="after")
    def _no_contradictions(self) -> Settings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running request needs one token a step"
            )
        return self

    def as_environment(self) -> dict[str, str]:
        """The environment of a child process with these settings, on top of this one's."""
        own = {f"TOKENRELAY_{name.upper()}": str(value) for name, value in self.model_dump().items()}
        return {**os.environ, **own}

    @property
    def heartbeat_seconds(self) -> float:
        """Leases and announcements are renewed at a quarter of the lease."""
        return self.lease_seconds / 4
