"""Builds a model worker from settings, and runs it until SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time

import structlog
import torch

from tokenrelay.model.config import EngineConfig
from tokenrelay.model.engine.engine import Engine
from tokenrelay.model.structured.compiler import GrammarCompiler
from tokenrelay.model.tokenizer import Tokenizer
from tokenrelay.model.transformer.communicator import Communicator
from tokenrelay.model.transformer.kernels import native
from tokenrelay.model.weights import ModelSource, resolve
from tokenrelay.service.broker import connect
from tokenrelay.service.keys import Keys
from tokenrelay.service.metrics import WorkerMetrics, new_registry
from tokenrelay.service.notification import tell_ready
from tokenrelay.service.queue import Queue
from tokenrelay.service.registry import Registry
from tokenrelay.service.settings import Settings
from tokenrelay.service.token_log import TokenLog
from tokenrelay.service.worker.metrics_server import MetricsServer
from tokenrelay.service.worker.output_processor import OutputProcessor
from tokenrelay.service.worker.ranks import Followers, check_division
from tokenrelay.service.worker.role import Role
from tokenrelay.service.worker.worker import Worker

log = structlog.get_logger()


def run_worker(
    settings: Settings, role: Role, *, metrics_socket: socket.socket | None = None, ready_fd: int = -1
) -> None:
    """Load the model, then serve until SIGTERM or SIGINT. Raises when the engine dies.

    ``metrics_socket`` replaces the port of the settings. ``ready_fd`` is told when requests can come.
    """
    metrics_socket = metrics_socket or socket.create_server((settings.host, settings.worker_metrics_port))
    source = resolve(settings.model, cache_dir=settings.cache_dir)
    check_division(source, settings)
    started = time.perf_counter()
    with Followers(settings) as followers:
        ranks = followers.connect()
        engine = load_engine(source, settings, ranks)
        seconds = round(time.perf_counter() - started, 2)
        log.info("model loaded", model=source.name, seconds=seconds, weights=engine.weights)
        tokenizer = Tokenizer.from_source(source)
        compiler = GrammarCompiler(tokenizer, vocab_size=engine.vocab_size)
        settings = settings.model_copy(update={"served_model_name": settings.served_model_name or source.name})
        gc.freeze()  # the garbage collector need not walk the libraries and the network again and again
        gc.enable()
        process = _Process(settings, role, metrics_socket, ready_fd)
        asyncio.run(process.serve(engine, tokenizer, compiler, followers))


def load_engine(source: ModelSource, settings: Settings, ranks: Communicator | None = None) -> Engine:
    """The engine that the settings describe, or this rank's share of it, when all have theirs."""
    config = EngineConfig(
        kv_cache_bytes=settings.kv_cache_mb << 20,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_prefill_tokens_beside_decodes=settings.max_prefill_tokens_beside_decodes,
        max_model_len=settings.max_model_len,
        num_speculative_tokens=settings.num_speculative_tokens,
        attention_sinks=settings.attention_sinks,
        kv_cache_dtype=settings.kv_cache_dtype,
        enable_prefix_caching=settings.enable_prefix_caching,
    )
    num_threads = settings.num_threads or len(os.sched_getaffinity(0))
    _use_threads(max(1, num_threads // settings.tensor_parallel_size))
    engine = Engine.from_model(
        str(source.path),
        config,
        dtype=settings.dtype,
        quantization=settings.quantization,
        device=settings.device,
        ranks=ranks,
    )
    if ranks:
        ranks.await_all()
    return engine


def _use_threads(num_threads: int) -> None:
    """Two pools of threads would fight for the cores: torch keeps one thread when the native kernels have them all."""
    if native.is_available():
        native.set_num_threads(num_threads)
        torch.set_num_threads(1)
        log.info("native kernels", instruction_set=native.isa(), threads=num_threads)
    else:
        torch.set_num_threads(num_threads)
        log.warning("no native kernels", reason=native.why_unavailable())


class _Process:
    """What surrounds the worker."""

    def __init__(self, settings: Settings, role: Role, metrics_socket: socket.socket, ready_fd: int) -> None:
        self._settings = settings
        self._role = role
        self._metrics_socket = metrics_socket
        self._ready_fd = ready_fd

    async def serve(
        self, engine: Engine, tokenizer: Tokenizer, compiler: GrammarCompiler, followers: Followers
    ) -> None:
        settings, model = self._settings, self._settings.served_model_name
        redis = connect(settings.redis_url, ca_file=settings.redis_ca_file)
        relay = (redis, Keys(model), settings)
        metrics = WorkerMetrics(new_registry(), model)
        metrics.kv_cache_blocks.set(engine.scheduler.block_pool.num_blocks)
        worker = Worker(
            engine,
            OutputProcessor(tokenizer, engine.eos_token_ids, engine.streaming_context),
            compiler,
            Queue(*relay),
            TokenLog(*relay),
            Registry(*relay),
            metrics,
            settings,
            model,
            self._role,
        )
        followers.on_death = worker.end
        server = MetricsServer(metrics.registry, self._metrics_socket)
        for signum in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signum, _drain, worker, server)
        telling = asyncio.create_task(self._tell_when_announced(worker, server))
        try:
            await worker.run()
        finally:
            telling.cancel()
            server.close()
            await redis.aclose()

    async def _tell_when_announced(self, worker: Worker, server: MetricsServer) -> None:
        await worker.announced.wait()
        tell_ready(self._ready_fd)
        url = f"http://{self._settings.host}:{server.server_port}/metrics"
        log.info("worker ready", worker=worker.worker_id, metrics=url)


def _drain(worker: Worker, server: MetricsServer) -> None:
    """From now on the metrics of this port are those of a successor, if there is one."""
    worker.drain()
    asyncio.get_running_loop().run_in_executor(None, server.close)
