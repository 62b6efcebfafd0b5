"""Between the first and the last step of the sampler the host waits for nothing and copies nothing.

Without a GPU the loop runs on the meta device, whose tensors have no values: whatever would read one is an error there,
and every tensor that the host takes part in shows up by its device.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmseg_fast.backends.graphs.loop import RunnerSteps, UNetSteps
from ldmseg_fast.backends.graphs.modules import DenoiserGraph
from ldmseg_fast.backends.graphs.specs import GraphOptions, denoiser
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.diffusion.sampler import ddim
from ldmseg_fast.diffusion.scheduler import Scheduler
from tests.backends.torch_runner import TorchRunner

STEPS = 4
READS_VALUES = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class HostTraffic(TorchDispatchMode):
    """Counts ops that read a tensor's value on the host, or that see a tensor in the host's memory, once `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.counting = False
        self.found: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.counting:
            self.ops += 1
            name = function.name()
            on_host = any(t.device.type == "cpu" for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
            if on_host or name.split(".")[0] in READS_VALUES:
                self.found.append(name)
        return result


def run_ddim(denoise: Callable[[Tensor, Tensor], Tensor], info) -> HostTraffic:
    """The loop from the first call of the network on, on the meta device."""
    traffic = HostTraffic()

    def watched(unet_input: Tensor, timesteps: Tensor) -> Tensor:
        traffic.counting = True
        return denoise(unet_input, timesteps)

    noise = torch.empty(2, *info.latent_shape, device="meta")
    image_latents = torch.empty(2, info.image_latent_channels, *info.latent_shape[1:], device="meta")
    with traffic:
        result = ddim(watched, noise, image_latents, Scheduler(info.scheduler).to("meta"), STEPS)
    assert result.shape == noise.shape
    return traffic


@pytest.fixture(scope="module")
def info(model_dir):
    return read_model_info(model_dir)


@pytest.fixture(scope="module")
def backend(info):
    return TorchBackend(info, "meta", torch.float32)


def test_ddim_stays_on_the_device(backend, info):
    traffic = run_ddim(backend.denoise, info)
    assert traffic.ops > 100 * STEPS
    assert traffic.found == []


@pytest.mark.parametrize("kind", ["graph", "unet"])
def test_the_loop_on_fixed_buffers_stays_on_the_device(backend, info, kind):
    module = DenoiserGraph(backend.unet, info.scheduler.prediction_type).to("meta")
    runner = TorchRunner(denoiser(info, GraphOptions(image_size=info.image_size)), module)
    noise = torch.empty(2, *info.latent_shape, device="meta")
    image_latents = torch.empty(2, info.image_latent_channels, *info.latent_shape[1:], device="meta")
    args = info, image_latents, STEPS
    steps = RunnerSteps(runner, *args) if kind == "graph" else UNetSteps(backend.unet, backend.unet.denoise, *args)
    with HostTraffic() as traffic, torch.inference_mode(False), torch.no_grad():
        traffic.counting = True
        steps.fill(noise, image_latents)
        steps.run()
    assert traffic.ops > 100 * STEPS
    assert traffic.found == []


def read_a_value(unet_input: Tensor, timesteps: Tensor) -> Tensor:
    return unet_input[:, :4] * float(unet_input.sum())


def copy_to_the_host(unet_input: Tensor, timesteps: Tensor) -> Tensor:
    return unet_input[:, :4].cpu().to(unet_input.device)


@pytest.mark.parametrize("denoise", [read_a_value, copy_to_the_host])
def test_a_wait_is_an_error(info, denoise):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_ddim(denoise, info)


def test_a_copy_from_the_host_is_counted(info):
    def denoise(unet_input: Tensor, timesteps: Tensor) -> Tensor:
        return unet_input[:, :4] + torch.arange(4.0).to(unet_input.device)[:, None, None]

    assert len(run_ddim(denoise, info).found) >= STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("captured", [False, True])
def test_no_synchronisation_on_a_gpu(info, captured):
    backend = TorchBackend(info, "cuda", torch.bfloat16, cuda_graph=captured)
    noise = torch.randn(2, *info.latent_shape, device="cuda")
    shape = (2, info.image_latent_channels, *info.latent_shape[1:])
    image_latents = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    scheduler = Scheduler(info.scheduler).to("cuda")
    for _ in range(2):  # compiles kernels, then captures the graph
        backend.sample(noise, image_latents, scheduler, STEPS)
    torch.cuda.synchronize()
    try:
        if captured:
            torch.cuda.set_sync_debug_mode("error")
            latents = backend.sample(noise, image_latents, scheduler, STEPS)
        else:

            def watched(unet_input: Tensor, timesteps: Tensor) -> Tensor:
                torch.cuda.set_sync_debug_mode("error")
                return backend.denoise(unet_input, timesteps)

            latents = ddim(watched, noise, image_latents, scheduler, STEPS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.shape == noise.shape  # it came to the end: in that mode a wait is an error
