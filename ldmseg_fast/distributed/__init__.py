"""Tells which rank this is and how many there are, and has the few collectives that the rest needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ldmseg_fast.distributed.launcher import check_variables, meeting
from ldmseg_fast.errors import InUseError, LaunchError, UserError
from ldmseg_fast.locks import only_writer

T = TypeVar("T")


def is_distributed() -> bool:
    """Tells whether this process has joined a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Returns this process's number among all ranks."""
    if is_distributed():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """Returns this process's number among the ranks of its machine."""
    return int(os.environ.get("LOCAL_RANK") or "0") if launched() else 0


def world_size() -> int:
    """Returns the number of ranks."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Tells whether this is rank 0."""
    return rank() == 0


def local_size() -> int:
    """Returns the number of ranks on this machine; torchrun and deepspeed tell it by different names."""
    if not launched():
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def launched() -> bool:
    """Tells whether a launcher (deepspeed, torchrun) started this process.

    One rank of one needs nobody to meet. Where it has no address of a meeting point, such as in a pod whose environment
    has WORLD_SIZE=1 and RANK=0, it is a process like any other.
    """
    if not (os.environ.get("WORLD_SIZE") and os.environ.get("RANK")):
        return False
    meets = bool(os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"))
    return meets or os.environ["WORLD_SIZE"].strip() != "1"


def start(minutes: float = 30.0) -> None:
    """Joins the launcher's process group, NCCL on GPUs and gloo on CPUs. Does nothing without a launcher.

    minutes: how long a rank waits for the others in a collective before it gives up.

    Raises:
        LaunchError: the launcher's variables are half set or wrong, or the meeting point cannot be opened.
    """
    if is_distributed():
        return
    check_variables(os.environ)
    if not launched():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu and local_rank() >= torch.cuda.device_count():
        raise LaunchError(
            f"LOCAL_RANK={local_rank()}: there are {torch.cuda.device_count()} GPUs here; start as many ranks"
        )
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # DeepSpeed would ask for more to find out
    if on_gpu:
        torch.cuda.set_device(local_rank())
    with meeting(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], rank(), minutes):
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


def from_main(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 while the others wait, and returns its value on every rank; all ranks call it.

    Raises:
        UserError, OSError: on every rank where `function` raised one.
    """
    value: T | None = None
    error: UserError | OSError | None = None
    if is_main():
        try:
            value = function()
        except (UserError, OSError) as failure:
            error = failure
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


@contextlib.contextmanager
def only_writer_on_main(folder: str | Path, what: str, cure: str, make: bool = True) -> Iterator[None]:
    """Holds `locks.only_writer` on rank 0 for all ranks inside a `with` block; all ranks call it.

    Raises:
        InUseError, OSError: as `only_writer`, on every rank.
    """
    with contextlib.ExitStack() as stack:
        error: InUseError | OSError | None = None
        if is_main():
            try:
                stack.enter_context(only_writer(folder, what, cure, make))
            except (InUseError, OSError) as failure:
                error = failure
        error = broadcast_object(error)
        if error is not None:
            raise error
        yield


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
