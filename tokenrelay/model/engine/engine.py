"""The only door of the engine: ``add``, ``abort``, ``step``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from tokenrelay.model.config import MAX_STREAMING_LEN, DType, EngineConfig, ModelConfig, Quantization
from tokenrelay.model.engine.adapter_loading import load_adapter
from tokenrelay.model.engine.block_tables import Window
from tokenrelay.model.engine.devices import check_device, fitting_blocks, make_executor
from tokenrelay.model.engine.model_runner import ModelRunner
from tokenrelay.model.engine.ranks import LeadingExecutor
from tokenrelay.model.engine.request import Request
from tokenrelay.model.engine.sampler import Sampler
from tokenrelay.model.engine.scheduler import Scheduler
from tokenrelay.model.engine.step import StepOutput
from tokenrelay.model.transformer import kernels
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.kv_cache import allocate_kv_cache, bytes_per_block, cache_dtype
from tokenrelay.model.transformer.loading import load_transformer
from tokenrelay.model.transformer.lora import Adapter
from tokenrelay.model.transformer.quantization import describe_weights, keeps_stored
from tokenrelay.model.transformer.tensor_parallel import Share
from tokenrelay.model.transformer.transformer import Transformer
from tokenrelay.model.weights import resolve
from tokenrelay.model.weights.checkpoint import Checkpoint, open_checkpoint

DEFAULT_KV_CACHE_BYTES = 1 << 30


class Engine:
    """Continuous batching of requests over one network. Not thread-safe: one thread owns it.

    ``max_model_len`` is the limit of one request's prompt and output, in tokens.

    Tokens come out of ``step``; a request ends by itself (``StepOutput.finish_reason``) or by ``abort``.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, max_model_len: int) -> None:
        self.scheduler = scheduler
        self.max_model_len = max_model_len
        self.runner = runner

    @classmethod
    def from_model(
        cls,
        model: str,
        config: EngineConfig | None = None,
        *,
        dtype: DType | Literal["auto"] = "auto",
        quantization: Quantization = "auto",
        device: str = "auto",
        cache_dir: Path | None = None,
        ranks: Communicator | None = None,
    ) -> Engine:
        """From a short name, a GGUF file, a folder or a hub id, fetched if it is not here.

        device ``auto``: CUDA if there is one. dtype ``auto``: bfloat16. quantization ``auto``: on a CPU matrices that
        are stored in 8 or 4 bits stay so. Raises ValueError where there is no such device, or it has no such
        quantization.
        """
        source = resolve(model, cache_dir=cache_dir)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(torch.device(device))
        return cls.from_checkpoint(
            open_checkpoint(source),
            config or EngineConfig(),
            dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
            device=ranks.device if ranks else torch.device(device),
            quantization=quantization,
            ranks=ranks,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        config: EngineConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization = "none",
        ranks: Communicator | None = None,
    ) -> Engine:
        """Load the network and allocate its KV cache. With ``ranks``, this rank's share of both.

        The leader's engine leads; of the others' only the executor is used. (``engine.ranks.follow``) Raises the
        checkpoint's and the loader's ValueErrors.
        """
        model_config = checkpoint.config()
        own_config = Share(model_config, ranks.rank, ranks.size).own_config if ranks else model_config
        config = replace(config, enforce_eager=config.enforce_eager or ranks is not None)
        config = replace(config, block_size=kernels.block_size(device, config.block_size))
        cached_in = cache_dtype(config.kv_cache_dtype, dtype, device)
        longest = model_config.max_position_embeddings
        context = min(longest, config.max_model_len or longest)
        block_bytes = bytes_per_block(own_config, config.block_size, cached_in)
        num_blocks = _planned_blocks(config, block_bytes, device)
        if num_blocks is not None:
            _check_room(config, context, num_blocks)
        model = load_transformer(
            model_config,
            checkpoint.stored(dtype) if keeps_stored(quantization, device) else checkpoint.tensors(dtype),
            checkpoint.rules,
            max_model_len=context,  # what rope scaling may depend on: never on this machine's memory
            attention_sinks=config.attention_sinks,
            dtype=dtype,
            device=device,
            quantization=quantization,
            ranks=ranks,
        )
        window = _window(model_config, config, context)
        make_runner = partial(_make_runner, model, window, context, cached_in, device)
        if num_blocks is None:
            num_blocks = fitting_blocks(make_runner, config, own_config, context, block_bytes, device)
        if ranks:
            num_blocks = ranks.smallest(num_blocks)
        max_model_len = MAX_STREAMING_LEN if config.attention_sinks else min(context, num_blocks * config.block_size)
        scheduler = Scheduler(config, num_blocks, max_model_len, model_config.eos_token_ids, window)
        runner = make_runner(num_blocks, config)
        if ranks and ranks.rank == 0:
            runner.executor = LeadingExecutor(runner.executor, ranks)
        return cls(scheduler, runner, max_model_len)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.scheduler.eos_token_ids

    @property
    def vocab_size(self) -> int:
        """The network's, which may be larger than the tokenizer's."""
        return self.runner.model.config.vocab_size

    @property
    def weights(self) -> str:
        """What they take and in how many bits they are, for the log."""
        return describe_weights(self.runner.model)

    @property
    def streaming_context(self) -> int:
        """Tokens that attention sees when sequences may outgrow it (attention sinks); else 0."""
        window = self.scheduler.window
        return window.size + window.num_sinks if window.num_sinks else 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request. One that another engine had begun brings its emitted ids along.

        Raises:
            ValueError: the id is known, or prompt and output so far fill the context (an embedding needs no output),
                or its adapter is not loaded.
        """
        if request.request_id in self.scheduler.requests:
            raise ValueError(f"request {request.request_id!r} is already here")
        if request.num_tokens + (request.pooling is None) > self.max_model_len:
            raise ValueError(f"{request.num_tokens} tokens leave no room in a context of {self.max_model_len}")
        if request.adapter and request.adapter not in self.runner.adapters:
            raise ValueError(f"adapter {request.adapter!r} is not loaded")
        self.scheduler.add(request)

    def read_adapter(self, folder: Path, digest: str, max_rank: int) -> Adapter:
        """What ``runner.adapters`` takes. Any thread may call this. Raises LoRAError."""
        return load_adapter(folder, digest, self.runner.model, max_rank)

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks at once; unknown or finished ids are ignored."""
        request = self.scheduler.requests.get(request_id)
        if request is not None:
            self.scheduler.remove(request)

    def step(self) -> list[StepOutput]:
        """Compute one batch: a new token per running request, more where drafts were right."""
        scheduled = self.scheduler.schedule()
        sampled = self.runner.execute(scheduled)
        return self.scheduler.update(scheduled, sampled)


def _make_runner(
    model: Transformer,
    window: Window,
    context: int,
    cache_dtype: torch.dtype,
    device: torch.device,
    num_blocks: int,
    config: EngineConfig,
) -> ModelRunner:
    """With a cache of so many blocks, all zeros."""
    kv_cache = allocate_kv_cache(model.config, num_blocks, config.block_size, cache_dtype, device)
    executor = make_executor(model, kv_cache, device, config, max_blocks=-(-context // config.block_size))
    sampler = Sampler(model.config.eos_token_ids)
    return ModelRunner(model, sampler, executor, block_size=config.block_size, window=window)


def _planned_blocks(config: EngineConfig, bytes_per_block: int, device: torch.device) -> int | None:
    """None: what is free on the device decides, when the weights are there."""
    if config.num_blocks or config.kv_cache_bytes:
        return config.num_blocks or config.kv_cache_bytes // bytes_per_block
    return None if device.type == "cuda" else DEFAULT_KV_CACHE_BYTES // bytes_per_block


def _check_room(config: EngineConfig, context: int, num_blocks: int) -> None:
    """Raises ValueError: the cache holds no sequence, or not the whole context that is to go on when full."""
    room = num_blocks * config.block_size
    if min(context, room) < 2:
        raise ValueError("the KV cache's memory budget holds not even one block; raise kv_cache_mb")
    needed = context + config.max_num_batched_tokens + 2 * config.block_size
    if config.attention_sinks and room < needed:
        raise ValueError(
            f"attention_sinks needs room for the whole context and a step: {needed} tokens, the KV cache holds {room}; "
            "raise kv_cache_mb or lower max_model_len"
        )


def _window(model_config: ModelConfig, config: EngineConfig, context: int) -> Window:
    """The network's own sliding window, or the one that makes it go on past its context."""
    if config.attention_sinks:
        return Window(context - config.attention_sinks, config.attention_sinks)
    return Window(0 if model_config.full_attention_layers else model_config.sliding_window)
