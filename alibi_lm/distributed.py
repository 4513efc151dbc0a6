"""Data parallel training on what `torchrun` starts: the process group, shards, sums of gradients.

Every process holds the whole model and takes its share of the sequences of a step; gradients are
sums over tokens, so adding them up over the processes gives the gradient of the whole batch.
All functions do nothing (and need no process group) when there is one process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alibi_lm.settings import require

BUCKET_BYTES = 32 * 2**20
"""Gradients are sent in pieces of about this size: large enough for bandwidth, small enough to copy."""

_store: dist.Store | None = None
_groups_joined = 0


@dataclass(frozen=True)
class World:
    """A process among those that train together."""

    rank: int = 0
    """Number of this process, from 0."""
    world_size: int = 1
    """How many processes train together."""
    local_rank: int = 0
    """Index of this process's GPU among those that it sees."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0


def start(device: str = "auto") -> World:
    """Join the process group that `torchrun` announces in the environment.

    Args:
        device: `cpu` keeps a process on a GPU machine off the GPUs; `auto` or `cuda` takes the GPU of
            the local rank where there is one.

    Returns:
        This process's place; `World()` outside `torchrun` and for a single process.

    Raises:
        ValueError: the environment variables are incomplete or make no sense, LOCAL_RANK is beyond the
            GPUs that this process sees, or two processes would share a GPU.
    """
    global _store, _groups_joined
    if "WORLD_SIZE" not in os.environ:
        return World()
    world = World(_environment("RANK"), _environment("WORLD_SIZE"), _environment("LOCAL_RANK"))
    require(
        0 <= world.rank < world.world_size,
        f"RANK = {world.rank} with WORLD_SIZE = {world.world_size}: ranks go from 0 to WORLD_SIZE - 1. "
        "Start the processes with torchrun.",
    )
    on_gpus = device != "cpu" and torch.cuda.is_available()
    if on_gpus:
        world = replace(world, local_rank=_own_gpu(world.local_rank))
    if world.world_size == 1 or dist.is_initialized():
        return world
    backend = "gloo"
    if on_gpus:
        backend = "cpu:gloo,cuda:nccl"  # counters and objects travel on the CPU, gradients on the GPUs
        torch.cuda.set_device(world.local_rank)
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", world.rank, world.world_size))
    # Each group has its own name space: a multirun joins a new one for each run, and would otherwise read the
    # addresses of the last one and sometimes wait for them forever.
    _groups_joined += 1
    store = dist.PrefixStore(f"alibi_lm/{_groups_joined}", _store)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size)
    if on_gpus:
        gpu = str(torch.cuda.get_device_properties(world.local_rank).uuid)
        require_own_gpus(gather_objects(gpu, world))
    return world


def _own_gpu(local_rank: int) -> int:
    """Index of this process's GPU: its number on the machine, or 0 if a launcher shows it one GPU alone."""
    devices = torch.cuda.device_count()
    require(
        devices == 1 or 0 <= local_rank < devices,
        f"LOCAL_RANK = {local_rank}, but torch finds {devices} CUDA devices here. "
        f"Start {devices} processes (torchrun --nproc-per-node={devices}), or use device=cpu.",
    )
    return 0 if devices == 1 else local_rank


def require_own_gpus(gpus: list[str]) -> None:
    """Refuse a GPU shared by two processes; NCCL would do so later, in words of its own.

    Args:
        gpus: identifier of each process's GPU, in rank order. A process that sees a single GPU cannot
            tell by itself whether another one has been given the same.
    """
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        require(
            first == rank,
            f"processes {first} and {rank} have the same GPU ({gpu}), but each needs its own. Start one process "
            "per GPU (torchrun --nproc-per-node=gpu), or use device=cpu.",
        )


def _environment(name: str) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name} = {text!r} in the environment is not a whole number, but WORLD_SIZE is set. "
            "Start the processes with torchrun, or unset WORLD_SIZE."
        ) from None


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shard(n_items: int, world: World) -> range:
    """Indices of the items that belong to this process.

    The shares are contiguous, in rank order and differ by one item at most: gathered in rank order
    they are `range(n_items)` again, each index once, also when there are fewer items than processes.
    """
    return range(
        n_items * world.rank // world.world_size,
        n_items * (world.rank + 1) // world.world_size,
    )


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """Sum of `tensor` over all processes, in place, in the tensor's own dtype. Returns `tensor`."""
    if world.world_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def barrier(world: World) -> None:
    """Wait until every process has come here."""
    # A sum on the CPU, because a barrier of NCCL guesses the device and warns.
    all_reduce_sum(torch.zeros(1), world)


def gather_objects(value: Any, world: World) -> list[Any]:
    """`value` of every process, in rank order, on every process.

    Values are pickled between the processes of one training run, never to or from a file.
    """
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def all_reduce_gradients(model: nn.Module, world: World, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Replace each parameter's gradient by its sum over all processes, sent in pieces of `bucket_bytes`.

    A gradient that is None on some processes counts as zero there; one that is None on all of them
    stays None, so that an optimizer skips it just as with one process.
    """
    if world.world_size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(parameters, present.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients, bucket_bytes):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat, op=dist.ReduceOp.SUM)
        for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: Iterable[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into lists of one dtype and device and about `bucket_bytes` bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket) + tensor.nbytes
        if bucket and (
            size > bucket_bytes or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


class StopSignals:
    """Turns SIGTERM and SIGINT into a request that is read between steps: `with StopSignals(world) as signals`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0
        """Number of the signal that this process has heard; 0 for none."""

    def agreed(self) -> int:
        """The signal to stop for, 0 for none; the same on every process that asks at the same step."""
        return max(gather_objects(self.received, self.world))

    def __enter__(self) -> StopSignals:
        try:
            self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: leave signals alone
            self.before = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
