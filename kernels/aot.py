"""Compile every kernel and shipped configuration ahead of time, with no GPU, and print what ptxas says.

    python -m ldmseg_fast.kernels.aot --sm 80 90 [--only attention] [--details] [--sass] [--json FILE]

One row per kernel (its folder) and architecture: the largest register count and shared memory of its builds, the sum of
spilled bytes, and how many matrix instructions were emitted; with --sass also the machine instructions, the waits for
wgmma and the exponentials among them, and with --details the instructions a thread spends on one element of its tile.
--headline builds each function at its headline case only, --with NAME=VALUE with another constant where configurations
have it. Exits with 1 on a spill, on more shared memory than a program may have, on a kernel that does not build, and on
an entry of the configuration table that no case reaches.
"""

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ldmseg_fast.kernels.sass import count_sass, longest_loop

SHARED_MEMORY = {80: 99, 90: 227}  # KiB for one program; 80 stands for 86, 89 and 120 too, whose limit is the lower one
POINTERS = {
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float32": "*fp32",
    "float64": "*fp64",
    "float8_e4m3fn": "*fp8e4nv",
    "uint8": "*u8",
    "int16": "*i16",
    "int32": "*i32",
    "int64": "*i64",
}

# what a tile has, by the beginnings of functions: scores, logits, or pixels of channels
TILES = {
    "attention_forward": ("BLOCK_M", "BLOCK_N"),
    "attention_fp8": ("BLOCK_M", "BLOCK_N"),
    "attention_backward": ("BLOCK_M", "BLOCK_N"),
    "panoptic_tile": ("BLOCK_X", "BLOCK_Q"),
    "forward_": ("BLOCK_P", "BLOCK_C"),
    "backward_apply": ("BLOCK_P", "BLOCK_C"),
    "backward_partial": ("BLOCK_P", "BLOCK_C"),
    "geglu": ("BLOCK",),
    "ddim_step": ("BLOCK",),
}


@dataclass(frozen=True)
class Build:
    """Describes one specialisation of one @triton.jit function, and what ptxas said of it."""

    kernel: str  # its folder
    function: str
    sm: int
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int = 0
    shared_memory: int = 0
    spill_bytes: int = 0
    wgmma: int = 0
    mma: int = 0
    instructions: int = 0  # of the machine, these three among them; counted where asked for
    waits: int = 0  # for wgmma
    exponentials: int = 0
    loop: int = 0  # the longest one
    seconds: float = 0.0
    error: str = ""

    @property
    def shared_memory_limit(self) -> int:
        """Returns the KiB that one program may use on this architecture."""
        return SHARED_MEMORY[90 if 90 <= self.sm < 120 else 80]

    @property
    def per_element(self) -> float:
        """Returns the instructions that a thread spends on one element of its tile; 0 for functions without such tiles.

        They are those of the longest loop, which goes from tile to tile, or all where there is none.
        """
        sides = next((sides for prefix, sides in TILES.items() if self.function.startswith(prefix)), ())
        if not sides or any(side not in self.constants for side in sides):
            return 0.0
        elements = math.prod(self.constants[side] for side in sides)
        return (self.loop or self.instructions) * 32 * self.num_warps / elements

    @property
    def faults(self) -> list[str]:
        """Lists what makes the build unfit to ship."""
        named = {
            f"does not build: {self.error}": bool(self.error),
            f"spills {self.spill_bytes} bytes": self.spill_bytes > 0,
            f"needs {self.shared_memory} bytes of shared memory": self.shared_memory > 1024 * self.shared_memory_limit,
        }
        return [fault for fault, present in named.items() if present]


Place = tuple[int, ...]  # of an argument, or of a member of a tuple


def specialise(launch: Any) -> tuple[dict[str, Any], dict[Place, Any], dict[Place, Any]]:
    """Chooses (signature, constants, attributes) as Triton's own launcher would.

    1 and None become constants, 16-byte pointers and integers divisible by 16 are marked. Members of a tuple count as
    arguments.
    """
    import torch

    constants: dict[Place, Any] = {}
    attributes: dict[Place, Any] = {}

    def type_of(value: Any, *path: int) -> Any:
        divisible = [["tt.divisibility", 16]]
        if isinstance(value, tuple):
            return tuple(type_of(member, *path, index) for index, member in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = divisible
            return POINTERS[str(value.dtype).removeprefix("torch.")]
        if isinstance(value, float):
            return "fp32"
        if value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = divisible
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature: dict[str, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", launch.constants[parameter.name]
        else:
            signature[parameter.name] = type_of(launch.arguments[index], index)
    return signature, constants, attributes


Switches = tuple[tuple[str, int], ...]  # names and values of constants


def collect(sm: int, headline: bool = False, switches: Switches = ()) -> tuple[list[tuple[str, Any, int]], list[str]]:
    """Collects (kernel folder, launch, sm) of every distinct build, and the table's entries that no case reaches.

    80 also stands for 89: what needs e4m3 is built for that instead. Sizes of 1 are built for 90 only, since what they
    might break is the front of the compiler. With `headline` each function is collected once, at its headline case, and
    nothing is said of the table. `switches` stand in the place of a configuration's constants.
    """
    import torch

    from ldmseg_fast.kernels import configs
    from ldmseg_fast.kernels.case import Case, all_cases, edge_cases
    from ldmseg_fast.kernels.launch import record

    def start(case: Case) -> None:
        case.triton(*case.make(torch.device("meta")))

    cases = [case for case in all_cases() if case.headline or not headline]
    work = [(case.kernel, max(sm, 89) if case.fp8 else sm, partial(start, case)) for case in cases]
    if sm == 90 and not headline:
        work += [(kernel, sm, run) for kernel, run in edge_cases()]
    distinct: dict[str, tuple[str, Any, int]] = {}
    with configs.trace_lookups() as reached:
        for kernel, target, run in work:
            with configs.architecture(target), configs.switched(dict(switches)), record() as launches:
                run()
            for launch in launches:
                rest = () if headline else (launch.config, sorted(launch.constants.items()), specialise(launch))
                key = repr((kernel, launch.kernel.__name__, *rest))
                distinct.setdefault(key, (kernel, launch, target))
    shipped = {
        (kernel, shape_class)
        for kernel, per_sm in configs.all_configs().items()
        for entry in per_sm.values()
        for shape_class in entry
    }
    if headline:
        return list(distinct.values()), []
    unreached = [f"{kernel} {shape_class} sm_{sm}" for kernel, shape_class in sorted(shipped - reached)]
    return list(distinct.values()), unreached


def build(sm: int, index: int, sass: bool = False, headline: bool = False, switches: Switches = ()) -> Build:
    """Compiles the `index`-th build of `collect(sm, headline, switches)`, and counts its instructions if asked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, launch, target = _collected(sm, headline, switches)[index]
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    about = {
        "kernel": kernel,
        "function": launch.kernel.__name__,
        "sm": target,
        "constants": launch.constants,
        **options,
    }
    signature, constants, attributes = specialise(launch)
    started = time.perf_counter()
    log = io.StringIO()
    try:
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:  # whatever the compiler raises is this build's result, not the end of the run
        return Build(**about, error=f"{type(error).__name__}: {error}"[:2000])
    report = log.getvalue()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.findall(r"Used (\d+) registers", report)
    if not spills or not registers:
        return Build(**about, error=f"ptxas printed no resource usage: {report[:200]!r}")
    ptx = compiled.asm["ptx"]
    lines = count_sass(compiled.asm["sass"]) if sass else (0, 0, 0)
    loop = longest_loop(compiled.asm["sass"]) if sass else 0
    return Build(
        **about,
        registers=max(map(int, registers)),
        shared_memory=compiled.metadata.shared,
        spill_bytes=sum(int(number) for pair in spills for number in pair),
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        instructions=lines[0],
        waits=lines[1],
        exponentials=lines[2],
        loop=loop,
        seconds=time.perf_counter() - started,
    )


@cache
def _collected(sm: int, headline: bool, switches: Switches) -> list[tuple[str, Any, int]]:
    return collect(sm, headline, switches)[0]


def _prepare_worker() -> None:
    """Before triton is imported: compile for real, each build once, and let ptxas talk."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"


def format_table(builds: Sequence[Build], details: bool) -> str:
    """Writes one line per kernel and architecture, and with `details` one per build."""
    groups: dict[tuple[str, int], list[Build]] = {}
    for each in builds:
        groups.setdefault((each.kernel, each.sm), []).append(each)
    header = f"{'kernel':<28}{'sm':>4}{'builds':>8}{'registers':>11}{'shared':>9}{'spill':>7}{'wgmma':>7}{'mma':>6}"
    sass = any(each.instructions for each in builds)
    header += f"{'instr.':>8}{'waits':>7}{'EX2':>6}" if sass else ""
    lines = [header]
    for (kernel, sm), group in groups.items():
        sums = [("wgmma", 7), ("mma", 6), *([("instructions", 8), ("waits", 7), ("exponentials", 6)] if sass else [])]
        lines.append(
            f"{kernel:<28}{sm:>4}{len(group):>8}{max(b.registers for b in group):>11}"
            f"{max(b.shared_memory for b in group):>9}{sum(b.spill_bytes for b in group):>7}"
            + "".join(f"{sum(getattr(b, name) for b in group):>{width}}" for name, width in sums)
        )
        if details:
            for b in group:
                constants = " ".join(f"{name}={int(value)}" for name, value in b.constants.items())
                lines.append(
                    f"  {b.function:<30}{b.registers:>19}{b.shared_memory:>9}{b.spill_bytes:>7}{b.wgmma:>7}{b.mma:>6}"
                    + (
                        f"{b.instructions:>8}{b.waits:>7}{b.exponentials:>6}  {b.per_element:.1f} an element"
                        if sass
                        else ""
                    )
                    + f"  {b.seconds:4.1f}s warps={b.num_warps} stages={b.num_stages} {constants}"
                )
    return "\n".join(lines)


def _switch(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    if not name or not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE expected, the value a whole number")
    return name, int(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds everything and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 80 for 8.0")
    parser.add_argument("--only", nargs="+", help="kernels (folders) to compile")
    parser.add_argument("--details", action="store_true", help="one line per build as well")
    parser.add_argument("--sass", action="store_true", help="count machine instructions too")
    parser.add_argument("--headline", action="store_true", help="each function once, at its headline case")
    parser.add_argument("--with", dest="switches", nargs="+", type=_switch, default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, help="write every build to this file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)

    _prepare_worker()
    started = time.perf_counter()
    jobs, faults, switches = [], [], tuple(options.switches)
    for sm in options.sm:
        launches, unreached = collect(sm, options.headline, switches)
        known = {name for _, launch, _ in launches for name in launch.config.constants}
        if unknown := [name for name, _ in switches if name not in known]:
            parser.error(f"--with {unknown[0]}: no configuration has it; there are {', '.join(sorted(known))}")
        faults += [f"{entry}: no case reaches this configuration" for entry in unreached]
        jobs += [
            (sm, i, options.sass, options.headline, switches)
            for i, (kernel, _, target) in enumerate(launches)
            if (not options.only or kernel in options.only) and (target == sm or target not in options.sm)
        ]
    with tempfile.TemporaryDirectory() as cache:  # a cached build would leave ptxas nothing to say
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(options.jobs, max(len(jobs), 1)), initializer=_prepare_worker) as pool:
            builds = pool.starmap(build, jobs, chunksize=1)

    print(format_table(builds, options.details))
    for each in builds:
        faults += [f"{each.kernel} sm_{each.sm} {each.function} {each.constants}: {fault}" for fault in each.faults]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    print(f"{len(builds)} builds, {len(faults)} faults, {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(
            json.dumps([asdict(each) | {"per_element": each.per_element} for each in builds], indent=1),
            encoding="utf-8",
        )
    return 1 if faults or not builds else 0


if __name__ == "__main__":
    sys.exit(main())
