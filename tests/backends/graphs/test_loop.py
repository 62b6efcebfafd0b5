"""The loop that every backend shares: fixed buffers give the sampler's numbers, step for step."""

import threading

import pytest
import torch

from ldmseg_fast.backends.graphs.lanes import MAX_LOOPS, Lane, LanePool
from ldmseg_fast.backends.graphs.loop import RunnerSteps, SampleLoop, UNetSteps
from ldmseg_fast.backends.graphs.modules import DenoiserGraph, SamplerGraph
from ldmseg_fast.backends.graphs.specs import GraphOptions, denoiser, schedule
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.sampler import ddim
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError
from tests.backends.torch_runner import TorchRunner


@pytest.fixture(scope="module")
def backend(model_dir):
    return TorchBackend(read_model_info(model_dir), "cpu", torch.float32)


def make_inputs(batch, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, 16, 16), (batch, 8, 16, 16))
    return tuple(torch.randn(shape, generator=generator).to(device) for shape in shapes)


def make_runner(backend):
    module = DenoiserGraph(backend.unet, backend.info.scheduler.prediction_type)
    return TorchRunner(denoiser(backend.info, GraphOptions(image_size=64)), module)


def make_loop(backend, image_latents, steps, kind="graph"):
    args = backend.info, image_latents, steps
    if kind == "graph":
        return SampleLoop(RunnerSteps(make_runner(backend), *args))
    return SampleLoop(UNetSteps(backend.unet, backend.unet.denoise, *args))


@pytest.mark.parametrize("kind", ["graph", "unet"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_is_the_sampler(backend, steps, batch, kind):
    noise, image_latents = make_inputs(batch)
    loop = make_loop(backend, image_latents, steps, kind)
    expected = ddim(backend.denoise, noise, image_latents, Scheduler(backend.info.scheduler), steps)
    torch.testing.assert_close(loop(noise, image_latents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["graph", "unet"])
def test_a_loop_forgets_the_call_before(backend, kind):
    loop = make_loop(backend, make_inputs(2)[1], 3, kind)
    first = loop(*make_inputs(2, 0))
    kept = first.clone()
    loop(*make_inputs(2, 1))
    assert torch.equal(first, kept)  # results are no views of the buffers
    assert torch.equal(loop(*make_inputs(2, 0)), first)


def test_the_unrolled_sampler_is_the_sampler(backend):
    noise, image_latents = make_inputs(2)
    module = SamplerGraph(DenoiserGraph(backend.unet, backend.info.scheduler.prediction_type), 3, True)
    times, coefficients = schedule(backend.info, 3)
    expected = ddim(backend.denoise, noise, image_latents, Scheduler(backend.info.scheduler), 3)
    with torch.inference_mode():
        found = module(noise, image_latents, times, coefficients)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cuda_graph_for_the_whole_loop(model_dir, dtype):
    info = read_model_info(model_dir)
    eager = TorchBackend(info, "cuda", dtype, cuda_graph=False)
    captured = TorchBackend(info, "cuda", dtype)
    assert captured.cuda_graph
    scheduler = Scheduler(info.scheduler).to("cuda")
    for seed in range(3):
        noise, image_latents = make_inputs(2, seed, "cuda")
        expected = eager.sample(noise, image_latents.to(dtype), scheduler, 4)
        found = captured.sample(noise, image_latents.to(dtype), scheduler, 4)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_lanes_keep_a_few_loops(backend):
    lane = Lane({"denoiser": make_runner(backend)}, None, False)
    loops = [lane.loop(backend.info, make_inputs(1)[1], steps) for steps in range(1, MAX_LOOPS + 1)]
    assert lane.loop(backend.info, make_inputs(1)[1], 1) is loops[0]
    lane.loop(backend.info, make_inputs(2)[1], 1)  # a fifth: the least recently used goes
    assert lane.loop(backend.info, make_inputs(1)[1], 1) is loops[0]
    assert lane.loop(backend.info, make_inputs(1)[1], 2) is not loops[1]


def test_a_lane_that_cannot_be_made_leaves_its_place():
    attempts = []

    def make():
        attempts.append(1)
        if len(attempts) == 1:
            raise BackendError("the GPU's memory is full")
        return Lane({}, None, False)

    pool = LanePool(make, 1)
    with pytest.raises(BackendError, match="memory is full"), pool.lane():
        pass
    with pool.lane():
        pass
    with pytest.raises(ValueError, match="lanes=0: at least 1"):
        LanePool(make, 0)


def test_closing_waits_for_calls_under_way():
    pool = LanePool(lambda: Lane({}, None, False), 2)
    inside, leave, log = threading.Event(), threading.Event(), []

    def work():
        with pool.lane():
            inside.set()
            leave.wait(5)
            log.append("left")

    def close():
        pool.close()
        log.append("closed")

    threads = [threading.Thread(target=work), threading.Thread(target=close)]
    threads[0].start()
    inside.wait(5)
    threads[1].start()
    leave.set()
    for thread in threads:
        thread.join(5)
    assert log == ["left", "closed"]
    with pytest.raises(BackendError, match="closed"), pool.lane():
        pass
