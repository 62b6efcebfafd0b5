"""Which rank of which launch a process is, as torchrun and srun say it."""

import pytest

from ldmseg_fast.distributed import ranks
from ldmseg_fast.distributed.ranks import Ranks, first_host, is_srun, ranks_of, threads_of_rank, use_slurm
from ldmseg_fast.errors import LaunchError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "7",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "70", "SLURM_STEP_ID": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
BARE = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}


def numbers(found: Ranks) -> tuple[int, int, int, int]:
    return found.rank, found.world, found.local_rank, found.local_world


def test_torchrun_and_srun():
    assert numbers(ranks_of(TORCHRUN)) == (3, 4, 1, 2)
    assert numbers(ranks_of(SRUN)) == (5, 8, 1, 4)
    assert numbers(ranks_of(BARE | {"SLURM_JOBID": "9", "SLURM_STEPID": "0"})) == (1, 2, 1, 2)
    assert numbers(ranks_of(SRUN | TORCHRUN)) == (3, 4, 1, 2)  # srun torchrun
    assert numbers(ranks_of({"RANK": "1", "WORLD_SIZE": "2"})) == (1, 2, 1, 2)  # no meeting point is needed


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},  # a batch script
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # an interactive shell
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
    ],
    ids=["nothing", "a pod", "batch script", "interactive shell", "one task"],
)
def test_one_process(environment):
    assert numbers(ranks_of(environment)) == (0, 1, 0, 1)
    assert ranks_of(environment).launch != ranks_of(environment).launch


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
        (SRUN | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8"),
        (SRUN | {"SLURM_LOCALID": "-1"}, "SLURM_LOCALID=-1"),
        (BARE, "SLURM_PROCID=1 of 2 tasks, but SLURM_JOB_ID is not set: `unset SLURM_PROCID`"),
        (SRUN | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
    ],
    ids=[
        "RANK alone",
        "RANK too large",
        "no number",
        "SLURM_PROCID too large",
        "SLURM_LOCALID negative",
        "no job",
        "empty job",
    ],
)
def test_wrong_variables(environment, word):
    with pytest.raises(LaunchError, match=word):
        ranks_of(environment)


def test_ranks_of_one_start_have_one_name():
    other = TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}
    assert ranks_of(TORCHRUN).launch == ranks_of(other).launch
    assert ranks_of(TORCHRUN).launch != ranks_of(TORCHRUN | {"MASTER_PORT": "29501"}).launch
    assert ranks_of(SRUN).launch == ranks_of(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).launch
    assert ranks_of(SRUN).launch != ranks_of(SRUN | {"SLURM_STEP_ID": "3"}).launch


def test_two_machines_that_both_say_localhost_are_two_starts(monkeypatch):
    at_home = TORCHRUN | {"MASTER_ADDR": "127.0.0.1"}
    first = ranks_of(at_home).launch
    monkeypatch.setattr(ranks.socket, "gethostname", lambda: "another")
    assert ranks_of(at_home).launch != first


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu7", "gpu7"), ("gpu[07-09,12],login1", "gpu07"), ("a-[1,3]", "a-1"), ("a1,b2", "a1"), ("n[3]-x", "n3-x")],
)
def test_the_first_machine(nodes, host):
    assert first_host(nodes) == host


def test_what_slurm_says_becomes_a_launcher_s_variables():
    environment = dict(SRUN)
    use_slurm(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == list("5814")
    assert environment["MASTER_ADDR"] == "gpu07" and 1024 < int(environment["MASTER_PORT"]) < 65536
    before = dict(SRUN) | {"MASTER_ADDR": "x", "MASTER_PORT": "5"}
    use_slurm(before)
    assert (before["MASTER_ADDR"], before["MASTER_PORT"]) == ("x", "5")
    assert not is_srun({"SLURM_NTASKS": "4"})


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(ranks, "cores", lambda: 16)
    two = Ranks(0, 2, 0, 2)
    assert threads_of_rank(two, {}) == 8
    assert threads_of_rank(two, {"OMP_NUM_THREADS": "3"}) is None
    assert threads_of_rank(two, {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}) == 8  # torchrun's own 1
    assert threads_of_rank(two, {}, 5) == 5
    assert threads_of_rank(Ranks(), {}) is None
    assert threads_of_rank(Ranks(0, 64, 0, 64), {}) == 1
    assert threads_of_rank(two, {"SLURM_CPUS_ON_NODE": "64"}) == 16  # srun has bound it to its own
    assert threads_of_rank(two, {"SLURM_CPUS_ON_NODE": "16"}) == 8
