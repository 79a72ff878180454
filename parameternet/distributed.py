"""Run in one process or in several started by torchrun: ranks, devices and communication."""

from __future__ import annotations

import gc
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["DEVICES", "Place", "agree_on_life", "choose_device", "join", "local_rank"]

DEVICES = "auto, cpu, cuda, cuda:1 or mps"


@dataclass
class Place:
    """One of `world` processes."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # process group for a few bytes between CPUs; gradients use the default group

    @property
    def first(self) -> bool:
        """Return whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes; the result is on the CPU."""
        values = values.detach().cpu()
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def largest(self, value: int) -> int:
        """Return the largest `value` of all processes."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def union(self, items: dict) -> dict:
        """Merge the dictionaries of all processes."""
        return {key: value for one in self.gather(items) for key, value in one.items()}

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast the first process's tensors, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, item: Any) -> list[Any]:
        """Return the `item` of every process, by rank."""
        if self.world == 1:
            return [item]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, item, group=self.control)
        return everyone

    def agreed(self, action: Callable[[], Any]) -> None:
        """Run `action` in the first process; raise its errors in every process."""
        problem = None
        if self.first:
            try:
                action()
            except Exception as error:
                problem = error
        problem = self.gather(problem)[0]
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier(group=self.control)


def local_rank() -> int | None:
    """Return this process's index on its host, which is also the index of its GPU; None for a single process."""
    return int(os.environ.get("LOCAL_RANK", 0)) if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None


def choose_device(device: str | torch.device | None = None, local_rank: int | None = None) -> torch.device:
    """Return a device that torch can use.

    Args:
        device: A device that torch knows; None or `auto`: the first CUDA device, else Apple's (mps), else the CPU.
        local_rank: Index of the GPU for `cuda`; None for the current one.

    Raises:
        ValueError: torch cannot use the device.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:  # torch's message lists dozens of types
        raise ValueError(f"device {str(device)!r} cannot be used: it does not exist; use {DEVICES}") from error
    if chosen.type == "cuda" and chosen.index is None and local_rank is not None:
        chosen = torch.device("cuda", local_rank)
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = f"torch finds {torch.cuda.device_count()} CUDA devices" if chosen.type == "cuda" else "torch finds none"
        raise ValueError(f"device {str(device)!r} cannot be used: {found}; use {DEVICES}") from error
    return chosen


@contextmanager
def join(device: torch.device, backend: str = "gloo", patience: timedelta | None = None) -> Iterator[Place]:
    """Yield this process's `Place`, after joining the other processes if torchrun has set RANK and WORLD_SIZE.

    Args:
        backend: Backend of the default group, which communicates tensors.
        patience: Time that a process waits for others; None: torch's default, 30 minutes.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        yield Place(0, 1, device)
        return
    _join(backend)
    here = Place(rank, world, device, dist.new_group(backend="gloo", timeout=patience))
    try:
        yield here
    finally:
        # A gloo thread that frees its last tensor after the interpreter has exited aborts the process. Threads end with
        # their group, which DistributedDataParallel modules keep alive in reference cycles.
        here.control = None
        gc.collect()
        dist.destroy_process_group()


def _join(backend: str) -> None:
    # After a restart torchrun's store still has the addresses of processes that ended, and new ones would connect to
    # them, so each start of the run has its own keys.
    store, rank, world = next(iter(dist.rendezvous("env://")))
    life = agree_on_life(store, rank, world)
    dist.init_process_group(backend, store=dist.PrefixStore(f"life {life}", store), rank=rank, world_size=world)


def agree_on_life(store: dist.Store, rank: int, world: int) -> str:
    """Agree on a name shared by exactly the running processes, whatever earlier processes left in the store.

    torchrun's restart count cannot serve as this name: each host has its own, and a host that rejoins starts at 0. The
    first process proposes a random name, every other process answers with a random text, and a process accepts the name
    once it finds its answer among those that the first one read. A name from an earlier start has other answers.
    """
    mine = secrets.token_hex(8)
    if rank == 0:
        store.set("life", mine)
        answers = [store.get(f"{mine}/{other}").decode() for other in range(1, world)]
        store.set(f"{mine}/all", json.dumps(answers))
        return mine
    while True:
        name = store.get("life").decode()
        store.set(f"{name}/{rank}", mine)
        while store.get("life").decode() == name:
            if store.check([f"{name}/all"]) and json.loads(store.get(f"{name}/all"))[rank - 1] == mine:
                return name
            time.sleep(0.02)
