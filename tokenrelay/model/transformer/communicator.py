"""What the ranks of one network say to each other: plain tensors, over gloo between CPUs and NCCL between GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

dist: Any = torch.distributed  # its types leave out much of this
CONNECT_TIMEOUT = timedelta(minutes=2)
STEP_TIMEOUT = timedelta(days=365)  # an idle leader is silent; a rank that is gone shows by its broken connection


class RankLost(ConnectionError):
    """A rank of this network is gone, and with it a share of the weights: the others can do nothing without it."""


class Communicator:
    """Connects ``size`` ranks, of which this is number ``rank``; number 0 leads. All of them make the same calls.

    The backends are used as objects, so a process has no group but those it was given.
    """

    def __init__(self, rendezvous: Path, rank: int, size: int, device: torch.device) -> None:
        """``rendezvous``: a file that all ranks, and nobody else, can write. Blocks until all are there.

        Raises RankLost when they do not come.
        """
        self.rank, self.size, self.device = rank, size, device
        store = dist.FileStore(str(rendezvous), size)
        with _a_loss_if_it_fails():
            self._on_host = _gloo(store, rank, size)
            self._on_device = self._on_host if device.type == "cpu" else _nccl(store, rank, size, device)

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, the same bits at each; on CPUs a row's bits do not depend on the rows beside it.

        There the ranks' numbers are added one after the other: a ring of more than two would begin elsewhere for
        every stretch of the tensor.
        """
        with _a_loss_if_it_fails():
            if x.device.type != "cpu":
                self._on_device.allreduce([x]).wait()
                return x
            total, *others = self._gather(x.contiguous())
        for other in others:
            total += other
        return total

    def broadcast(self, tensor: Tensor) -> None:
        """The leader's ``tensor``, in main memory, to all others, in place."""
        with _a_loss_if_it_fails():
            self._on_host.broadcast(tensor, 0).wait()

    def smallest(self, number: int) -> int:
        """Of the numbers that the ranks have."""
        with _a_loss_if_it_fails():
            return int(min(self._gather(torch.tensor([number]))))

    def await_all(self) -> None:
        """Return when all ranks have called it."""
        self.smallest(0)

    def close(self) -> None:
        """Break the connections, so that the other ranks need not wait for this one."""
        del self._on_host, self._on_device  # `abort` leaves sockets open

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._on_host.allgather([parts], [x]).wait()
        return parts


def device_of_rank(name: str, rank: int) -> torch.device:
    """Each rank has a GPU of its own; ``auto``: if there are any. Raises ValueError for other devices."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"tensor_parallel_size divides networks on cpu and cuda, not on {name}; set it to 1")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", rank)
    return torch.device("cpu")


def _gloo(store: Any, rank: int, size: int) -> Any:
    """On the loopback interface: the ranks are processes of one machine, and strangers shall not meet their sockets."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._threads = 1
    options._timeout = CONNECT_TIMEOUT
    group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
    group.set_timeout(STEP_TIMEOUT)
    return group


def _nccl(store: Any, rank: int, size: int, device: torch.device) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = CONNECT_TIMEOUT
    group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
    torch.cuda.set_device(device)
    group.eager_connect_single_device(device)
    return group


@contextmanager
def _a_loss_if_it_fails() -> Iterator[None]:
    """Whatever a collective fails of, the ranks are no longer together."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"a rank of this network is gone: {str(error).splitlines()[0]}") from error
