"""One process, or many that torchrun has started: who am I, and what do we say together."""

from __future__ import annotations

import gc
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parameternet.training.errors import RecipeError, TrainingError


@dataclass
class Place:
    """A process among `world`: its rank and its device."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # group for a few bytes between the CPUs; the gradients have their own

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over all processes (on the CPU)."""
        values = values.detach().cpu()
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def largest(self, value: int) -> int:
        """The largest `value` that any process has."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def union(self, items: dict) -> dict:
        """The items of all processes."""
        return {key: value for one in self.gather(items) for key, value in one.items()}

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's tensors, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, item: Any) -> list[Any]:
        """`item` of every process, in the order of their ranks."""
        if self.world == 1:
            return [item]
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, item, group=self.control)
        return everyone

    def agreed(self, action: Callable[[], Any]) -> None:
        """Run `action` in the first process alone; what it raises on purpose is raised in every process."""
        problem = None
        if self.first:
            try:
                action()
            except TrainingError as error:
                problem = error
        problem = self.gather(problem)[0]
        if problem is not None:
            raise problem

    def wait(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier(group=self.control)


@contextmanager
def place(device: str = "auto") -> Iterator[Place]:
    """This process's place; joins the others where torchrun has set RANK and WORLD_SIZE."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else None)
    if world == 1:
        yield Place(0, 1, chosen)
        return
    _join("nccl" if chosen.type == "cuda" else "gloo")
    here = Place(rank, world, chosen, dist.new_group(backend="gloo"))
    try:
        yield here
    finally:
        # A thread of gloo that lets go of its last tensor after the interpreter has ended aborts the process. Threads
        # end with their group, and a group with the last that knows it: networks with gradients to share are cycles.
        here.control = None
        gc.collect()
        dist.destroy_process_group()


def _join(backend: str) -> None:
    # After a restart torchrun's store still holds the addresses of processes that ended, and new ones would connect to
    # them: each life of the run has its own keys.
    store, rank, world = next(iter(dist.rendezvous("env://")))
    life = agree_on_life(store, rank, world)
    dist.init_process_group(backend, store=dist.PrefixStore(f"life {life}", store), rank=rank, world_size=world)


def agree_on_life(store: dist.Store, rank: int, world: int) -> str:
    """A name that exactly the processes now running share, whatever earlier ones left in the store.

    torchrun's count of restarts is none: it is each host's own, and a host that joins again begins at 0.
    The first process proposes a random name; it is agreed on when every other one has answered, and finds its own
    answer among those that the first one has read. A name from an earlier life has other answers, or never gets all.
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


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is the first accelerator there is, or the CPU; with `local_rank`, that process's own.

    Raises:
        RecipeError: a device that torch does not know or does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" and local_rank is not None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try device=cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
