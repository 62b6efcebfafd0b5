"""Tells which rank of which launch a process is, for work that ranks share by files and not over a network."""

from __future__ import annotations

import os
import re
import socket
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

from ldmseg_fast.distributed.launcher import check_variables
from ldmseg_fast.errors import LaunchError
from ldmseg_fast.threads import cores

_SPECIAL_STEPS = 0xFFFFFFF0  # step ids from here on are of batch scripts and interactive shells, not of `srun`
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_PORTS = (20000, 20000)  # the first port for ranks of Slurm, and how many


@dataclass(frozen=True)
class Ranks:
    """Names a process among those that were started together.

    Attributes:
        rank: its number, 0 to `world` - 1.
        world: how many there are.
        local_rank: its number on its machine.
        local_world: how many are on its machine.
        launch: what all ranks of a start have in common, and no other start at the same time has.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launch: str = ""


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """Reads what torchrun, deepspeed or srun tell a process. They need not tell where ranks meet.

    Raises:
        LaunchError: variables that are half set or wrong.
    """
    given = dict(environment)
    use_slurm(given)
    both = bool(given.get("RANK", "").strip() and given.get("WORLD_SIZE", "").strip())
    alone = both and given["WORLD_SIZE"].strip() == "1" and given["RANK"].strip() == "0"
    if not both or alone:
        if not alone:
            check_variables(given)
        return Ranks(launch=uuid.uuid4().hex)
    defaults = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    checked = given | {name: value for name, value in defaults.items() if not given.get(name, "").strip()}
    check_variables(checked)
    rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
    local_world = int(given.get("LOCAL_WORLD_SIZE", "").strip() or given.get("LOCAL_SIZE", "").strip() or world)
    local_rank = int(given.get("LOCAL_RANK", "").strip() or rank % local_world)
    job = given.get("SLURM_JOB_ID", ""), given.get("SLURM_STEP_ID", "")
    address = given.get("MASTER_ADDR", "").strip()
    names = [*job, address, given.get("MASTER_PORT", "").strip(), given.get("TORCHELASTIC_RUN_ID", "")]
    if address in _LOOPBACK:  # two machines may both say so
        names.append(socket.gethostname())
    return Ranks(rank, world, local_rank, local_world, "/".join(names))


def is_srun(environment: Mapping[str, str]) -> bool:
    """Tells whether `srun` started this process as one of several.

    A batch script and an interactive shell have Slurm's variables too, but no step of their own.

    Raises:
        LaunchError: a task's number without its job's: variables that were left over, or of which a container has got
            some. Its rank would wait for others that may not be there.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or ""
    if not (environment.get("SLURM_PROCID") and tasks.isdecimal() and int(tasks) > 1):
        return False
    step = environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID") or ""
    if not (environment.get("SLURM_JOB_ID") or environment.get("SLURM_JOBID")):
        raise LaunchError(
            f"SLURM_PROCID={environment['SLURM_PROCID']} of {tasks} tasks, but SLURM_JOB_ID is not set: "
            "`unset SLURM_PROCID` to run one process, or pass on all variables that srun sets"
        )
    return step.isdecimal() and int(step) < _SPECIAL_STEPS


def use_slurm(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE and the other variables of launchers to what `srun` says, where no launcher has.

    MASTER_ADDR becomes the first machine of the step and MASTER_PORT follows from job and step, unless they are set.

    Raises:
        LaunchError: Slurm's numbers are half set or wrong.
    """
    if environment.get("RANK", "").strip() or environment.get("WORLD_SIZE", "").strip() or not is_srun(environment):
        return
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]
    rank, local_rank = environment["SLURM_PROCID"], environment.get("SLURM_LOCALID") or "0"
    for name, text in (("SLURM_PROCID", rank), ("SLURM_LOCALID", local_rank)):
        if not (text.isascii() and text.isdecimal() and int(text) < int(tasks)):
            raise LaunchError(f"{name}={text}: a whole number below {tasks}, the tasks of the step, expected")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "localhost"
    numbers = [int(text) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") for text in (environment.get(name, ""),)
               if text.isdecimal()]  # fmt: skip
    local_world = _local_tasks(environment, int(tasks))
    if torch.cuda.is_available() and torch.cuda.device_count() == 1 < local_world:
        local_rank = "0"  # Slurm shows each task its own GPU
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(_PORTS[0] + sum(numbers) % _PORTS[1]))
    environment.update(RANK=rank, WORLD_SIZE=tasks, LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE=str(local_world))


def first_host(nodes: str) -> str:
    """Returns the first machine of Slurm's list, such as gpu07 of "gpu[07-09,12],login1"."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes.strip())
    return "".join(part or "" for part in found.groups()) if found else nodes


def _local_tasks(environment: Mapping[str, str], tasks: int) -> int:
    """How many tasks of the step this machine has; all of them where Slurm does not say."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * min(int(repeated or 1), tasks)
    node = environment.get("SLURM_NODEID", "")
    local = counts[int(node)] if node.isdecimal() and int(node) < len(counts) else max(counts, default=tasks)
    return min(max(local, int(environment.get("SLURM_LOCALID") or 0) + 1), tasks)


def threads_of_rank(ranks: Ranks, environment: Mapping[str, str], asked: int | None = None) -> int | None:
    """Returns how many threads a rank computes with: its share of the machine's cores. None: as it is.

    torchrun sets OMP_NUM_THREADS=1 where it is not set, which would leave cores without work. Slurm may have bound the
    rank to its own cores already.

    Args:
        ranks: this process.
        environment: of it.
        asked: by the user.
    """
    if asked is not None:
        return asked
    given = environment.get("OMP_NUM_THREADS", "").strip()
    by_torchrun = given == "1" and "TORCHELASTIC_RUN_ID" in environment
    if ranks.local_world == 1 or (given and not by_torchrun):
        return None
    here = environment.get("SLURM_CPUS_ON_NODE", "")
    if here.isdecimal() and cores() < int(here):
        return cores()
    return max(1, cores() // ranks.local_world)


def use_own_device(ranks: Ranks, threads: int | None = None) -> None:
    """Gives this rank its own GPU, and its share of the cores.

    Args:
        ranks: this process.
        threads: that the user asks for.

    Raises:
        LaunchError: there are fewer GPUs than ranks on this machine.
    """
    count = threads_of_rank(ranks, os.environ, threads)
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)  # our C++ reads it
        torch.set_num_threads(count)
    if ranks.world > 1 and torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"LOCAL_RANK={ranks.local_rank}: there are {torch.cuda.device_count()} GPUs here; start as many ranks"
            )
        torch.cuda.set_device(ranks.local_rank)
