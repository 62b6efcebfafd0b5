"""What a launcher's variables mean, and which of them cannot be."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldmseg_fast import distributed
from ldmseg_fast.distributed import launcher
from ldmseg_fast.distributed.launcher import check_variables, meeting
from ldmseg_fast.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
WRONG = {
    "RANK alone": ({"RANK": "0"}, "WORLD_SIZE"),
    "WORLD_SIZE=2 alone": ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    "empty RANK": (WHOLE | {"RANK": ""}, "RANK is not set or empty"),
    "empty MASTER_ADDR": (WHOLE | {"MASTER_ADDR": " "}, "MASTER_ADDR"),
    "no MASTER_PORT": ({key: value for key, value in WHOLE.items() if key != "MASTER_PORT"}, "MASTER_PORT"),
    "no LOCAL_RANK": ({key: value for key, value in WHOLE.items() if key != "LOCAL_RANK"}, "LOCAL_RANK"),
    "RANK=2 of 2": (WHOLE | {"RANK": "2"}, "RANK=2: below WORLD_SIZE=2"),
    "RANK=1 of 1": (WHOLE | {"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1"),
    "RANK=-1": (WHOLE | {"RANK": "-1"}, "RANK=-1"),
    "RANK=one": (WHOLE | {"RANK": "one"}, "RANK=one"),
    "RANK=1.0": (WHOLE | {"RANK": "1.0"}, "RANK=1.0"),
    "RANK=²": (WHOLE | {"RANK": "²"}, "RANK=²"),
    "WORLD_SIZE=0": (WHOLE | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    "LOCAL_RANK=x": (WHOLE | {"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
    "LOCAL_RANK=2 of 2": (WHOLE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2"),
    "LOCAL_WORLD_SIZE=": (WHOLE | {"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE=many"),
    "port 0": (WHOLE | {"MASTER_PORT": "0"}, "MASTER_PORT=0"),
    "port 65536": (WHOLE | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
    "port http": (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT=http"),
}
ALONE = {
    "nothing": {},
    "a pod's": {"RANK": "0", "WORLD_SIZE": "1"},
    "a pod's with half a meeting point": {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod-0"},
    "WORLD_SIZE=1 alone": {"WORLD_SIZE": "1"},
    "empty ones": {"RANK": "", "WORLD_SIZE": ""},
    "a meeting point alone": {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "3"},
    "Slurm's": {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"},
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    def give(variables: dict[str, str]) -> None:
        for name in (*launcher.NEEDED, *launcher.NUMBERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_named_with_its_cure(name: str, environment) -> None:
    variables, words = WRONG[name]
    with pytest.raises(LaunchError) as caught:
        check_variables(variables)
    said = str(caught.value)
    assert words in said and "\n" not in said and ("torchrun" in said or "port from 1 to 65535" in said)
    environment(variables)
    with pytest.raises(LaunchError):
        distributed.start()


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str, environment) -> None:
    check_variables(ALONE[name])
    environment(ALONE[name])
    distributed.start()
    assert not distributed.launched() and not distributed.is_distributed()
    assert (distributed.rank(), distributed.local_rank(), distributed.local_size()) == (0, 0, 1)


def test_ranks_of_a_launcher(environment) -> None:
    for variables in (
        WHOLE,
        WHOLE | {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        WHOLE | {"WORLD_SIZE": "1"},
    ):
        check_variables(variables)
        environment(variables)
        assert distributed.launched() and distributed.rank() == int(variables["RANK"])


def test_a_taken_port_is_named_within_seconds(tmp_path: Path) -> None:
    """By rank 0, which cannot open it, and by rank 1, which a stranger answers."""
    program = "import sys; from ldmseg_fast.train import main; sys.exit(main(['autoencoder', 'data.root=x']))"
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        own = WHOLE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stranger.getsockname()[1])}
        own |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        begun = time.monotonic()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | own | {"RANK": rank, "LOCAL_RANK": rank},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    for error in errors:
        assert "another program has this port" in error and error.count("\n") == 1, error
    assert time.monotonic() - begun < 60


def test_an_unknown_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "LOOKUP", 0.0)
    for address in ("no.such.machine.invalid", "x" * 70):
        with pytest.raises(LaunchError, match=f"MASTER_ADDR={address}: no machine"), meeting(address, "29500", 0, 1.0):
            pass


def test_a_rank_says_whom_it_waits_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(launcher, "QUIET", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LaunchError, match="rank 0 did not come"), meeting("127.0.0.1", str(port), 3, 0.01):
        pass
    assert "rank 3: waits for the other ranks at MASTER_ADDR=127.0.0.1" in capfd.readouterr().err
