"""Tells which rank this is and how many there are, and has the few collectives that the rest needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Tells whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns this process's number among all ranks."""
    return dist.get_rank() if is_distributed() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns this process's number among the ranks of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Tells whether this is rank 0."""
    return rank() == 0


def local_size() -> int:
    """Returns the number of ranks on this machine; torchrun and deepspeed tell it by different names."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched() -> bool:
    """Tells whether a launcher (deepspeed, torchrun) started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def start(minutes: float = 30.0) -> None:
    """Joins the launcher's process group, NCCL on GPUs and gloo on CPUs. Does nothing without a launcher.

    minutes: how long a rank waits for the others in a collective before it gives up.
    """
    if not launched() or is_distributed():
        return
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # DeepSpeed would ask for more to find out
    if on_gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes))


def stop() -> None:
    """Leaves the process group together with all ranks, so that none waits for another at exit.

    gloo's threads drop the tensors of a collective after its caller has gone on. A thread that is about to when the
    interpreter ends aborts the process (PyTorch pull request 179291). The barrier lets them finish, and its own work
    holds no tensor of Python's.
    """
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def device() -> torch.device:
    """Returns the device of this rank."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Waits until all ranks are here."""
    if is_distributed():
        dist.barrier()


def all_reduce_mean(value: Tensor) -> Tensor:
    """Averages a tensor, float of any shape, over the ranks: a new tensor, or the tensor itself on one rank."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def any_rank(flag: bool) -> bool:
    """Tells whether `flag` is set on any rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag), device=device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def run_on_main(function: Callable[[], None]) -> None:
    """Calls `function` on rank 0 while the others wait.

    Raises:
        OSError: on every rank where `function` raised one.
    """
    problem = ""
    if is_main():
        try:
            function()
        except OSError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise OSError(problem)


def gather_objects(value: Any) -> list[Any]:
    """Returns `value` of every rank, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
