"""Kernels against torch, torch.compile and the libraries that can be imported; red tests, no numbers.

A case that fails or differs from torch is a red row with its reason, and is not timed; the others go on.

    python benchmarks/bench_kernels.py --all            every case, within --minutes (default 8)
    python benchmarks/bench_kernels.py --quick          the cases that targets are stated for, without torch.compile
    python benchmarks/bench_kernels.py --only attention
    python benchmarks/bench_kernels.py --tune configs.json    try launch configurations, write the best ones found

Every variant is captured in a CUDA graph, so that the time of the GPU is compared and not that of Python. Cases marked
"forward, backward" time both for everybody. Without a GPU the rows say "not measured" and carry the floor instead.
"""

import argparse
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    import checkout  # noqa: F401  (run as a script)

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import RESULTS, ROOT, BenchmarkError, Run, Timing, measure, reason_of
from benchmarks.measuring.kernel_tuning import compile_in_parallel, tune
from benchmarks.measuring.options import parse_options
from benchmarks.measuring.timing import captured
from ldmseg_fast.distributed.ending import run_command
from ldmseg_fast.kernels import configs
from ldmseg_fast.kernels.attention.op import FP8_ARCHITECTURE
from ldmseg_fast.kernels.backend import KERNELS
from ldmseg_fast.kernels.case import Case, all_cases
from ldmseg_fast.kernels.roofline import GPUS, find_gpu, floor_us

Variant = Callable[[], Any]
# (rtol, atol in units of the largest value) between a kernel and torch, both in the dtype of the case
AGREEMENT = {torch.float32: (1e-3, 1e-4), torch.float16: (1e-2, 2e-2), torch.bfloat16: (2e-2, 5e-2)}
FP8_AGREEMENT = 0.1  # the norm of the difference over that of torch's result; `kernels.fp8_error` prints what to expect
CLOSING_SECONDS = 5.0  # for the file
SECONDS_TO_TEST = 900.0  # most that the tests may take, beside --minutes
SECONDS_TO_COMPILE = 30  # what one torch.compile may take: none is started later than this before the end


class Deadline:
    """How much of the time budget is left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()


def run_tests(kernels: Sequence[str], seconds: float = SECONDS_TO_TEST) -> None:
    """The tests of `kernels`, in parallel processes: most of their time is the compiler's.

    Raises:
        BenchmarkError: they fail, or do not end within `seconds`.
    """
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = [str(path) for kernel in kernels for path in sorted(ROOT.glob(f"tests/kernels/test_{kernel}*.py"))]
    listed = subprocess.run([*pytest, "--collect-only", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not tests:
        raise BenchmarkError(f"the kernels' tests cannot be collected:\n{listed.stdout[-2000:]}{listed.stderr[-2000:]}")
    shares = max(1, min(8, len(os.sched_getaffinity(0)) // 2, len(tests)))
    running = [subprocess.Popen([*pytest, "-x", *tests[i::shares]], cwd=ROOT) for i in range(shares)]
    end = time.monotonic() + seconds
    try:
        failed = [process.wait(max(end - time.monotonic(), 0.1)) for process in running]
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"the kernels' tests took more than {seconds:.0f} s: nothing is measured") from error
    finally:
        for process in running:
            process.kill()
    if any(failed):
        raise BenchmarkError("the kernels' tests fail: nothing is measured")
    print(f"{len(tests)} tests passed")


def attention_peers(case: Case) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """Other implementations of softmax attention, as functions of q, k, v [B, N, heads, d] and the scale."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def through(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
            return out.transpose(1, 2)

        return run

    yield "sdpa flash", through(SDPBackend.FLASH_ATTENTION)
    yield "sdpa cudnn", through(SDPBackend.CUDNN_ATTENTION)
    yield "sdpa efficient", through(SDPBackend.EFFICIENT_ATTENTION)
    if importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        yield "xformers", lambda q, k, v, scale: memory_efficient_attention(q, k, v, scale=scale)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        yield "flash-attn", lambda q, k, v, scale: flash_attn_func(q, k, v, softmax_scale=scale)


def convolve_by_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    residual: Tensor | None,
    _scale: None,
    _weight_scale: None,
    stride: int,
    upsample: bool,
    *_others: Any,
) -> Tensor:
    """What runs in the convolution kernel's place: cuDNN in x's dtype, and PyTorch's operations; makes no moments."""
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    out = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), stride, 1)
    out = out if added is None else out + added.to(x.dtype)[..., None, None]
    return out if residual is None else out + residual


def differentiated(function: Callable[..., Tensor], arguments: tuple[Any, ...], leaves: tuple[int, ...]) -> Variant:
    """Forward and the gradients of a sum, as a function of no arguments; the forward alone without leaves."""
    if not leaves:
        return lambda: function(*arguments)
    inputs = [value.detach().requires_grad_() if i in leaves else value for i, value in enumerate(arguments)]
    wanted = [inputs[i] for i in leaves]

    def run() -> tuple[Tensor, ...]:
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))

    return run


def variants(case: Case, arguments: tuple[Any, ...], compile_too: bool) -> Iterator[tuple[str, Callable[[], Variant]]]:
    """(name, something that makes the function to time); making one may fail where a library refuses the case"""
    yield "triton", lambda: lambda: case.triton(*arguments)
    yield "torch", lambda: differentiated(case.torch, arguments, case.leaves)
    if case.kernel == "attention":
        for name, peer in attention_peers(case):
            yield name, partial(differentiated, peer, arguments, case.leaves)
        return
    if case.kernel == "convolution" and not case.fp8:
        yield "cudnn", lambda: lambda: convolve_by_cudnn(*arguments)
    if compile_too:
        yield "torch.compile", lambda: differentiated(torch.compile(case.torch), arguments, case.leaves)


def agree(case: Case, arguments: tuple[Any, ...]) -> bool:
    """The kernel equals plain torch at the full shape, where offsets are large."""
    ours, theirs = case.triton(*arguments), differentiated(case.torch, arguments, case.leaves)()
    ours, theirs = ((each,) if isinstance(each, Tensor) else tuple(each) for each in (ours, theirs))
    if case.fp8:
        return all(float((one - other).norm() / other.norm()) < FP8_AGREEMENT for one, other in zip(ours, theirs))
    rtol, atol = AGREEMENT[case.dtype]
    for one, other in zip(ours, theirs):
        if not one.is_floating_point():
            if (one != other).float().mean() > 1e-4:  # a pixel whose probability is the threshold, within rounding
                return False
            continue
        if case.kernel == "panoptic_head" and one.ndim == 2:
            continue  # a score moves by such a pixel
        largest = float(other.abs().max()) if other.numel() else 0.0
        if not torch.allclose(one.float(), other.float(), rtol=rtol, atol=atol * largest):
            return False
    return True


def measure_case(run: Run, case: Case, compile_too: bool, deadline: Deadline) -> None:
    """All variants of one case, interleaved; a variant that cannot run is named with its reason."""
    torch.manual_seed(0)
    arguments = case.make(torch.device("cuda"))
    if not agree(case, arguments):
        return add_red(run, case, "differs from torch")
    run.check(f"{case.kernel} {case.name} {case.dtype} equals torch", True)
    functions: dict[str, Variant] = {}
    for name, make in variants(case, arguments, compile_too):
        if name == "torch.compile" and deadline.seconds_left < SECONDS_TO_COMPILE:
            print_not_measured(case, name, "time budget")
            continue
        try:
            functions[name] = captured(make())
        except Exception as error:  # a peer's refusal, whatever its type, is a row and not the end
            torch.cuda.synchronize()
            if name == "triton":
                return add_red(run, case, reason_of(error))
            print_not_measured(case, name, reason_of(error))
    timings = measure(functions, device="cuda", rounds=30, max_seconds=max(1.0, min(8.0, deadline.seconds_left / 4)))
    gpu = find_gpu(run.environment["gpu"]["name"])
    floor = floor_us(case, gpu) / 1e3 if gpu else math.inf
    run.add(
        f"{case.kernel} {case.name}",
        timings,
        baseline="torch",
        case=case_of(case),
        bytes_moved=case.bytes_moved,
        flops=case.operations or None,
        floor_ms=floor if floor < math.inf else None,
    )
    print_rates(case, timings["triton"])


def case_of(case: Case) -> dict[str, Any]:
    return {"dtype": str(case.dtype).removeprefix("torch."), "batch": case.batch}


def add_red(run: Run, case: Case, reason: str) -> None:
    run.add_red(f"{case.kernel} {case.name}", "triton", reason, case=case_of(case))


def print_rates(case: Case, timing: Timing) -> None:
    seconds = timing.median / 1e3
    rates = f"  triton: {case.bytes_moved / seconds / 1e9:.0f} GB/s"
    if case.operations:
        rates += f", {case.operations / seconds / 1e12:.0f} TFLOP/s"
    print(rates + f"   p20 {timing.percentile(20):.4f} p50 {timing.median:.4f} p80 {timing.percentile(80):.4f} ms")


def print_not_measured(case: Case, variant: str, reason: str) -> None:
    floors = "  ".join(f"{gpu.name} {floor_us(case, gpu):.1f}".replace("inf", "-") for gpu in GPUS)
    dtype = str(case.dtype).removeprefix("torch.")
    print(f"{case.kernel} {case.name} {dtype} {variant}: not measured ({reason})  floor in us: {floors}", flush=True)


def measure_ceilings(run: Run) -> None:
    """What this GPU reaches: a copy, and a large bfloat16 matrix product on random data."""
    size = 2**29
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timings = measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device="cuda", rounds=10)
    run.add_value("copy bandwidth", 2 * size / timings["copy"].median / 1e6, "GB/s", variant="torch")
    run.add_value("bfloat16 matmul", 2 * 8192**3 / timings["matmul"].median / 1e9, "TFLOP/s", variant="torch")


def benchmark(cases: Sequence[Case], options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        for case in cases:
            print_not_measured(case, "triton", "no CUDA device")
        return 0
    if configs.current_architecture() < FP8_ARCHITECTURE:
        for case in cases:
            if case.fp8:
                print_not_measured(case, "triton", "this GPU has no products of e4m3")
        cases = [case for case in cases if not case.fp8]
    run = Run("kernels", quick=options.quick, folder=options.out)
    kernels = sorted({case.kernel for case in cases})
    if not options.no_tests:
        run_tests(kernels)
        run.check(f"tests of {', '.join(kernels)}", True)
    deadline = Deadline(options.minutes)  # the tests had a time of their own
    measure_ceilings(run)
    for case in sorted(cases, key=lambda case: not case.headline):
        if deadline.seconds_left < 5:
            add_red(run, case, "not measured (time budget)")
            continue
        try:
            measure_case(run, case, case.headline and not options.quick, deadline)
            torch.cuda.empty_cache()
        except Exception as error:  # out of memory, or a launch that failed: a row, and the next case
            add_red(run, case, reason_of(error))
    run.save(options.out)
    return int(bool(run.red))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case (the default)")
    parser.add_argument("--quick", action="store_true", help="headline cases, no torch.compile")
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="these kernels only")
    parser.add_argument("--minutes", type=float, default=8.0, help="time budget, without the tests")
    parser.add_argument(
        "--no-tests", action="store_true", help="they ran just now; cases are compared with torch all the same"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write the best configurations found to FILE")
    options = parse_options(parser, arguments)
    cases = [case for case in all_cases() if not options.only or case.kernel in options.only]
    if options.quick:
        cases = [case for case in cases if case.headline]
    if options.tune and not torch.cuda.is_available():
        print("--tune: not measured (no CUDA device)")
        return 0
    if options.tune:
        deadline = Deadline(options.minutes)
        compile_in_parallel(cases, 0.5 * deadline.seconds_left)
        return tune(cases, options.tune, deadline.end - CLOSING_SECONDS, torch.device("cuda"))
    return benchmark(cases, options)


if __name__ == "__main__":
    sys.exit(run_command(main))
