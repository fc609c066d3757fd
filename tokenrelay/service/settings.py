"""The settings of every process: the only reader of the environment.

Each field is read from ``TOKENRELAY_<NAME>`` or a command-line option of the same name. Frozen; contradictions
refuse to start with both names in the message. Derived values are properties.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

LAST_PORT = 65535
ADAPTER_NAME = r"^[A-Za-z0-9_.:/-]+$"
_ORIGIN = re.compile(r"https?://[a-zA-Z0-9.-]+(:[0-9]+)?|https?://\[[0-9a-fA-F:]+\](:[0-9]+)?")


class Settings(BaseSettings):
    """All of it, with the defaults of a small deployment on one machine."""

    model_config = SettingsConfigDict(env_prefix="TOKENRELAY_", frozen=True, extra="forbid")

    # what to serve
    model: str = Field("smollm2-135m-instruct", description="Alias, GGUF file, folder with safetensors, or hub id.")
    served_model_name: str = Field("", description="Name clients use; empty: the model's own name.")
    cache_dir: Path = Field(Path("~/.cache/tokenrelay"), description="Where pulled models are kept.")

    tool_call_format: Literal["auto", "hermes", "llama3", "mistral", "gemma", "granite", "phi4"] = Field(
        "auto", description="How the model writes calls of tools; auto: as its chat template says, or as Hermes does."
    )
    reasoning_format: Literal[
        "auto", "none", "think", "mistral", "reasoning", "thinking", "thought", "seed", "command", "harmony"
    ] = Field("auto", description="How it marks its reasoning; auto: as its chat template says.")

    # adapters
    lora_modules: str = Field(
        "", description="LoRA adapters (PEFT's folders) served under names of their own: `name=path,name=path`."
    )
    allow_lora_loading: bool = Field(
        False, description="Let an operator load and unload adapters by HTTP; such a request names a path to be read."
    )
    max_loras: int = Field(8, ge=1, description="Adapters that a worker keeps in memory, the most recently used ones.")
    max_lora_rank: int = Field(64, ge=1, le=1024, description="Highest rank of an adapter.")

    # where things listen
    redis_url: str = Field(
        "",
        description="Valkey or Redis: `redis://`, `rediss://` (TLS), `unix://` or `redis+sentinel://host:port,…/name`; "
        "empty: `serve` starts an embedded one.",
    )
    redis_ca_file: str = Field("", description="Certificate authority of a `rediss://` broker; empty: the system's.")
    data_dir: Path = Field(
        Path("~/.local/state/tokenrelay"), description="Where the embedded Valkey keeps its append-only file."
    )
    broker_memory_mb: int = Field(256, ge=16, description="Memory cap of the embedded Valkey (noeviction).")
    host: str = Field("127.0.0.1", description="Address of the HTTP server.")
    port: int = Field(8000, ge=0, le=LAST_PORT, description="Port of the HTTP server; 0 picks a free one.")
    worker_metrics_port: int = Field(
        8001,
        ge=0,
        le=LAST_PORT,
        description="Port of the first model worker's /metrics, the next ones follow; 0: free ones.",
    )

    # how many processes `serve` keeps running
    workers: int = Field(1, ge=1, description="Model workers that claim requests; each takes the memory of a model.")
    spare_workers: int = Field(
        0, ge=0, description="Further workers with the model loaded, which claim only while fewer than `workers` live."
    )
    api_workers: int = Field(1, ge=1, description="API processes that share the port.")

    # the engine
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where the network runs: cpu, cuda, mps (Apple), or auto: cuda if there is one, else cpu."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of the weights that are not quantized: float32, bfloat16, float16, or auto: bfloat16.",
    )
    quantization: Literal["auto", "none", "int8", "int8-weight-only", "int4", "fp8"] = Field(
        "auto",
        description="Of the matrices: none, int8 (8 bits, and so the activations), int8-weight-only, int4 (4 bits in "
        "groups of 32, head and embedding 8), fp8 (CUDA), or auto: as the checkpoint stores them; on a GPU none.",
    )
    num_threads: int = Field(0, ge=0, description="Compute threads on a CPU; 0: one per core this process may use.")
    tensor_parallel_size: int = Field(
        1, ge=1, description="Processes that share a worker's network: a GPU each, or a part of the cores."
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="Type of the KV cache: int8, or auto: as dtype, on a CPU 16-bit integers instead of 16-bit floats.",
    )
    kv_cache_mb: int = Field(
        0,
        ge=0,
        description="Memory budget of the KV cache; 0: 1024, on CUDA what gpu_memory_utilization leaves.",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a CUDA device's memory for weights, steps and KV cache together; raise it if nobody else "
        "uses the device.",
    )
    enforce_eager: bool = Field(
        False, description="CUDA: no graphs; starts sooner and takes less memory, but small batches decode slower."
    )
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
    announce_seconds: float = Field(
        0.5, gt=0, description="A worker says this often that it lives; three times missing, and it counts as gone."
    )
    watchdog_seconds: float = Field(
        120.0, ge=0, description="A worker whose engine needs this long for one step ends itself; 0: it never does."
    )
    max_attempts: int = Field(3, ge=1, description="Workers a request may kill before it is a dead letter.")
    max_waiting: int = Field(1024, ge=1, description="Requests that may wait; more are answered 503.")
    max_waiting_tokens: int = Field(
        1 << 24, ge=0, description="Tokens they may ask for, prompts included; more are answered 503; 0: any number."
    )
    max_waiting_bytes: int = Field(
        64 << 20, ge=0, description="Memory they may take in the broker; more are answered 503; 0: any amount."
    )
    max_waiting_per_tenant: int = Field(
        0, ge=0, description="Requests of one tenant that may wait; more are answered 429; 0: any number."
    )
    max_waiting_tokens_per_tenant: int = Field(
        0, ge=0, description="Tokens that one tenant's may ask for; more are answered 429; 0: any number."
    )
    retention_seconds: float = Field(300.0, gt=0, description="How long a finished request's log can be read.")
    response_ttl_seconds: float = Field(
        4 * 3600.0, gt=0, description="How long a stored response (`/v1/responses`) is kept, counted from its end."
    )
    response_store_mb: int = Field(
        64, ge=1, description="Memory of all stored responses in the broker; the oldest make room for new ones."
    )
    request_timeout_seconds: float = Field(
        0.0, ge=0, le=86400, description="A request's deadline, queue and run together, if it names none; 0: none."
    )
    disconnect_grace_seconds: float = Field(
        0.0, ge=0, description="How long a client may be gone before its request is cancelled."
    )
    drain_seconds: float = Field(30.0, ge=0, description="How long running streams may finish after SIGTERM.")

    # who may ask
    api_keys_file: str = Field(
        "",
        description="File of API keys (`tokenrelay keys --help`), followed as it changes; empty: nobody needs one.",
    )
    metrics_need_key: bool = Field(True, description="With API keys, /metrics needs that of an operator.")
    metrics_tenants: int = Field(
        20,
        ge=0,
        description="Tenants with metrics of their own, the first of the file; others are `other` together.",
    )
    cors_origins: str = Field(
        "", description="Origins whose web pages may ask: `https://a.example,https://b.example`, or `*`; empty: none."
    )

    # what a client may send
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body.")
    max_n: int = Field(16, ge=1, description="Largest n, and most prompts in one completion request.")
    max_inputs: int = Field(2048, ge=1, description="Most inputs in one embedding request, unless fewer may wait.")
    pooling: Literal["mean", "last"] = Field(
        "mean", description="How a text becomes one embedding, if the request does not say: mean or last."
    )
    keep_alive_seconds: float = Field(15.0, gt=0, description="A silent stream sends an SSE comment this often.")

    log_prompts: bool = Field(False, description="Log every prompt, as the model sees it; else none ever is.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line logged: debug, info, warning or error."
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_integers(cls, dtype: object) -> object:
        if dtype == "int8":
            raise ValueError("int8 is not a dtype any more: set quantization to int8")
        return dtype

    @field_validator("cors_origins")
    @classmethod
    def _origins_only(cls, origins: str) -> str:
        for origin in filter(None, origins.split(",")):
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin, such as https://chat.example or http://localhost:3000")
        return origins

    @field_validator("cache_dir", "data_dir")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        return path.expanduser()

    @field_validator("lora_modules")
    @classmethod
    def _names_and_paths(cls, modules: str) -> str:
        names = [pair.partition("=")[0].strip() for pair in modules.split(",") if modules]
        for pair in modules.split(",") if modules else ():
            name, _, path = pair.partition("=")
            if not re.fullmatch(ADAPTER_NAME, name.strip()) or not path.strip() or names.count(name.strip()) > 1:
                raise ValueError(f"{pair!r} is not name=path, with a name that no other adapter has")
        return modules

    @model_validator(mode="after")
    def _no_contradictions(self) -> Settings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): every running request needs one token a step"
            )
        if self.worker_metrics_ports[-1] > LAST_PORT:
            raise ValueError(
                f"worker_metrics_port ({self.worker_metrics_port}) leaves no ports for workers ({self.workers}) "
                f"and spare_workers ({self.spare_workers}), which take the next ones up to {LAST_PORT}"
            )
        if self.tensor_parallel_size > 1 and (self.lora_modules or self.allow_lora_loading):
            raise ValueError(
                f"adapters (lora_modules, allow_lora_loading) need a worker of one process; "
                f"tensor_parallel_size is {self.tensor_parallel_size}: set it to 1"
            )
        return self

    @property
    def adapter_paths(self) -> dict[str, str]:
        """Of ``lora_modules``, by name."""
        pairs = (pair.partition("=") for pair in self.lora_modules.split(",") if self.lora_modules)
        return {name.strip(): path.strip() for name, _, path in pairs}

    @property
    def worker_metrics_ports(self) -> list[int]:
        """Of ``serve``'s workers, the spare ones last: one after the other from the first on, or free ones."""
        first, number = self.worker_metrics_port, self.workers + self.spare_workers
        return list(range(first, first + number)) if first else [0] * number

    def as_environment(self) -> dict[str, str]:
        """The environment of a child process with these settings, on top of this one's."""
        own = {f"TOKENRELAY_{name.upper()}": str(value) for name, value in self.model_dump().items()}
        return {**os.environ, **own}

    @property
    def heartbeat_seconds(self) -> float:
        """Leases are renewed at a quarter of the lease."""
        return self.lease_seconds / 4


def shared_metrics_folder() -> str:
    """Where several API processes keep their metrics together; prometheus-client reads the same variable."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
