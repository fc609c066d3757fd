"""The process of rank 1 and up of a worker: its share of the network, and nothing else."""

from __future__ import annotations

import gc
import signal
from contextlib import suppress
from pathlib import Path

from tokenrelay.model.engine.ranks import follow
from tokenrelay.model.transformer.communicator import RankLost
from tokenrelay.model.weights import resolve
from tokenrelay.service.settings import Settings
from tokenrelay.service.worker.main import load_engine
from tokenrelay.service.worker.ranks import connect


def run_follower(settings: Settings, rank: int, rendezvous: Path) -> None:
    """Compute what the worker computes, until it is gone. What it is told by signals, the worker is told as well."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    with suppress(RankLost):
        ranks = connect(settings, rendezvous, rank)
        engine = load_engine(resolve(settings.model, cache_dir=settings.cache_dir), settings, ranks)
        gc.freeze()
        gc.enable()
        follow(engine.runner.executor, ranks)
