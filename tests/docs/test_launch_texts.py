"""What the documents say to torchrun, srun and sbatch: the shell reads it, and the commands in it parse."""

import re
import shlex
import subprocess

import pytest

from ldmseg_fast.cli import build_parser
from tests.docs.test_docs import ROOT, fences

BLOCKS = [
    (path, block)
    for path in ("docs/inference.md", "docs/clusters.md", "docs/evaluation.md")
    for block in fences(ROOT / path, "bash")
    if re.search(r"\b(srun|torchrun)\b.* (predict|inpaint|evaluate) ", block)
]
SBATCH = {"nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue"}
SRUN = {"kill-on-bad-exit", "ntasks-per-node"}


def test_all_of_them_are_found():
    assert [path for path, _ in BLOCKS] == ["docs/inference.md", *["docs/clusters.md"] * 3, "docs/evaluation.md"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_parses(number):
    block = BLOCKS[number][1]
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for line in block.splitlines():
        words = shlex.split(line.removeprefix("#SBATCH "), comments=True)
        if line.startswith("#SBATCH "):
            assert {word[2:].partition("=")[0] for word in words} <= SBATCH
        elif words and words[0] in ("srun", "torchrun"):
            place = next((words.index(name) for name in ("ldmseg", "ldmseg_fast.cli", "cp") if name in words), None)
            assert place is not None, line
            if words[0] == "srun":
                assert {word[2:].partition("=")[0] for word in words[1:place]} <= SRUN
            if words[place] != "cp":
                args = build_parser().parse_args(words[place + 1 :])
                assert callable(args.run)
