"""The sampling loop as a CUDA graph: who gets one, when it is captured, and what a failed capture costs.

Without a GPU, a fake capture stands in for CUDA's: it holds the loop's steps, and its replay runs them.
"""

import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldmseg_fast import LDMSegPipeline
from ldmseg_fast.backends import torch_backend
from ldmseg_fast.backends.graphs import captured, lanes, loop
from ldmseg_fast.backends.graphs.captured import Captured
from ldmseg_fast.backends.graphs.loop import use_cuda_graph
from ldmseg_fast.backends.model_info import read_model_info
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.diffusion.sampler import ddim
from ldmseg_fast.diffusion.scheduler import Scheduler
from ldmseg_fast.errors import BackendError, NonFiniteError
from ldmseg_fast.models.epilogue_unet import EpilogueUNet
from ldmseg_fast.models.fused_unet import FusedUNet

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [(None, CUDA, True), (None, CPU, False), (True, CUDA, True), (False, CUDA, False), (False, CPU, False)],
)
def test_on_by_default_on_a_gpu(asked, device, expected):
    assert use_cuda_graph(asked, device) is expected


@pytest.mark.parametrize("backend", ["torch", "compile"])
def test_without_a_gpu_it_is_refused(model_dir, backend):
    assert not LDMSegPipeline.from_pretrained(model_dir, backend, device="cpu").backend.cuda_graph
    with pytest.raises(BackendError, match=r"cuda_graph=True: device=cpu has no CUDA graphs; leave cuda_graph out"):
        LDMSegPipeline.from_pretrained(model_dir, backend, device="cpu", cuda_graph=True)


class FakeCuda:
    """Stands in for `torch.cuda.CUDAGraph` and `torch.cuda.graph`, and counts. `error` is what a capture raises."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error: Exception | None = None

    def make_graph(self):
        return self

    def capture(self, graph, stream, capture_error_mode):
        assert graph is self and stream is not None and capture_error_mode == "thread_local"
        self.captures += 1
        if self.error is not None:
            raise self.error
        return nullcontext()

    def replay(self, run) -> None:
        self.replays += 1
        run()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    original = Captured._captured

    def capture(self):
        graph = original(self)
        return SimpleNamespace(replay=partial(fake.replay, self.run)) if graph is fake else graph

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.make_graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(Captured, "_captured", capture)
    for module in (captured, loop, lanes):
        monkeypatch.setattr(module, "on_stream", lambda stream: nullcontext())
    return fake


@pytest.fixture
def backend(model_dir, cuda):
    backend = TorchBackend(read_model_info(model_dir), "cpu", torch.float32)
    backend.cuda_graph = True
    return backend


def make_inputs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 16, 16, generator=generator), torch.randn(batch, 8, 16, 16, generator=generator)


def check_sample(backend, batch: int, steps: int, seed: int = 0) -> None:
    noise, image_latents = make_inputs(batch, seed)
    scheduler = Scheduler(backend.info.scheduler)
    found = backend.sample(noise, image_latents, scheduler, steps)
    expected = ddim(backend.denoise, noise, image_latents, scheduler, steps, backend.info.self_condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_second_call_captures_and_then_replays(backend, cuda):
    counts = []
    for seed in range(4):
        check_sample(backend, 2, 3, seed)
        counts.append((cuda.captures, cuda.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]
    check_sample(backend, 1, 3)
    check_sample(backend, 1, 3)
    assert cuda.captures == 2  # a batch of its own


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("operation not permitted when stream is capturing", 900),
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_capture_is_one_warning_and_right_results(backend, cuda, error):
    cuda.error = error
    check_sample(backend, 2, 3)
    with pytest.warns(UserWarning, match=r"cuda_graph: .* cannot be captured \(.*cuda_graph=False or --no-cuda-graph"):
        check_sample(backend, 2, 3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            check_sample(backend, 2, 3, seed)
            check_sample(backend, 1, 2, seed)
    assert (cuda.captures, cuda.replays) == (1, 0)


def test_a_graph_that_does_not_fit_leaves_the_others(backend, cuda):
    for seed in range(3):
        check_sample(backend, 1, 2, seed)  # captured, replayed twice

    class Failing:
        """A capture that ends in another error than the one that made it fail."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def capture(graph, stream, capture_error_mode):
        cuda.captures += 1
        return Failing()

    lane = backend._lanes._free[0]
    lane.make_steps = partial(loop.UNetSteps, backend._network, out_of_memory(backend, 3))  # in the capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "graph", capture)
        check_sample(backend, 4, 2)
        message = (
            r"sampling loop cannot be captured \(OutOfMemoryError: CUDA .* GiB\); at this size it runs step by step"
        )
        with pytest.warns(UserWarning, match=message):
            check_sample(backend, 4, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sample(backend, 4, 2, 2)
        check_sample(backend, 1, 2, 3)
    assert (cuda.captures, cuda.replays) == (2, 3)


def test_memory_of_other_graphs_is_taken_where_it_is_needed(backend, cuda):
    """A call that runs out of memory runs again without the graphs of other sizes; without any it fails as it did."""
    for seed in range(3):
        check_sample(backend, 1, 2, seed)
    lane = backend._lanes._free[0]
    lane.make_steps = partial(loop.UNetSteps, backend._network, out_of_memory(backend, 1))
    check_sample(backend, 4, 2)
    assert [key[0][0] for key in lane._loops] == [4]
    lane._drop(next(iter(lane._loops)))
    lane.make_steps = partial(loop.UNetSteps, backend._network, out_of_memory(backend, 1))
    with pytest.raises(torch.OutOfMemoryError):
        lane.sample(backend.info, *make_inputs(4), 2)


def out_of_memory(backend, call: int):
    """A UNet whose so many-th call finds no memory."""
    calls = []

    def denoise(*args):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand more")
        return backend._network.denoise(*args)

    return denoise


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: operation not permitted")], ids=["", "refused"])
def test_encoder_and_decoder_are_graphs_of_their_own(model_dir, backend, cuda, error):
    """One step of a picture is three replays and the head, and right where a capture is refused."""
    plain = TorchBackend(backend.info, "cpu", torch.float32)
    cuda.error = error
    size = backend.info.picture_size
    pictures = torch.randint(0, 256, (4, 1, 3, size, size), dtype=torch.uint8)
    latents, kept = make_inputs(1)[0], []
    with pytest.warns(UserWarning, match="cannot be captured") if error else nullcontext():
        for picture in pictures:
            kept.append((backend.encode_image(picture), backend.decode_mask(latents, (8, 8), "logits")))
    for picture, (encoded, logits) in zip(pictures, kept):  # later calls changed nothing of earlier ones
        torch.testing.assert_close(encoded, plain.encode_image(picture), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, plain.decode_mask(latents, (8, 8), "logits"), rtol=1e-5, atol=1e-5)
    assert (cuda.captures, cuda.replays) == ((1, 0) if error else (2, 6))
    before = cuda.captures
    for _ in range(3):
        backend.encode_image(pictures[0].expand(5, -1, -1, -1))  # a batch that keeps the GPU busy by itself
    assert cuda.captures == before


def make_pipe(folder, **options):
    return LDMSegPipeline.from_pretrained(folder, device="cpu", **options)


def check_same(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert np.array_equal(one.segmentation, other.segmentation)
        assert [s["id"] for s in one.segments_info] == [s["id"] for s in other.segments_info]
        for mine, theirs in zip(one.segments_info, other.segments_info):
            assert mine == theirs | {"score": pytest.approx(theirs["score"], abs=1e-5)}


@pytest.mark.parametrize("model", ["model_dir", "category_model"])
def test_few_steps_of_repeated_pictures_are_one_launch(request, cuda, model):
    """The first call finds nothing to repeat, the second runs it whole, the third captures that, all others replay."""
    folder = request.getfixturevalue(model)
    pipe, plain = make_pipe(folder), make_pipe(folder)
    pipe.backend.cuda_graph = True
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)
    low = {"thresholds": PostprocessConfig(mask_threshold=0.0, count_threshold=1, overlap_threshold=0.0)}
    counts, kept = [], []
    for seed, picture in enumerate(pictures):
        kept.append(pipe(picture, 1, seed=seed, **low))
        counts.append((cuda.captures, cuda.replays))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    for seed, picture in enumerate(pictures):  # later calls changed nothing of earlier results
        check_same(kept[seed], plain(picture, 1, seed=seed, **low))
    assert any(result.segments_info for results in kept for result in results)
    check_same(pipe(pictures[0], 1), plain(pictures[0], 1))  # other thresholds are another graph


def test_what_one_launch_cannot_do_goes_step_by_step(model_dir, cuda):
    pipe, plain = make_pipe(model_dir), make_pipe(model_dir)
    pipe.backend.cuda_graph = True
    pictures = np.random.default_rng(1).integers(0, 256, (2, 30, 50, 3), dtype=np.uint8)
    calls = []
    for each in (
        {"num_inference_steps": 5},
        {"num_inference_steps": 2, "solver": "heun"},
        {"num_inference_steps": 1, "callback": lambda *_: calls.append(1)},
    ):
        for _ in range(3):
            check_same(pipe(pictures[0], **each), plain(pictures[0], **each))
    mixed = [pictures[0], pictures[1][:20]]
    for _ in range(3):
        check_same(pipe(mixed, 1), plain(mixed, 1))
    lane = pipe.backend._lanes._free[0]
    assert calls and not any(key[0] == "a whole picture" for key in lane._calls)


def test_numbers_that_are_not_finite_name_their_network_in_one_launch_too(model_dir, cuda):
    pipe = make_pipe(model_dir)
    pipe.backend.cuda_graph = True
    picture = np.zeros((30, 50, 3), np.uint8)
    for _ in range(3):
        pipe(picture, 1)
    assert cuda.replays == 1
    for name, network, what in (
        ("decode_latents_both", pipe.backend.mask_vae, "mask_vae: slot logits"),
        ("denoise", pipe.backend.unet, "unet: sampled latents"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            spoilt = getattr(network, name)
            patch.setattr(network, name, lambda *args, spoilt=spoilt: spoil(spoilt(*args)))
            lane = pipe.backend._lanes._free[0]
            lane._calls.clear()
            lane.make_steps = partial(loop.UNetSteps, pipe.backend.unet, pipe.backend.unet.denoise)
            with pytest.raises(NonFiniteError, match=what):
                for _ in range(2):
                    pipe(picture, 1)


def spoil(result):
    return (result[0] * float("nan"), *result[1:]) if isinstance(result, tuple) else result * float("nan")


def test_a_fault_of_ours_is_no_failed_capture(backend, cuda):
    cuda.error = TypeError("a bug")
    check_sample(backend, 2, 3)
    with pytest.raises(TypeError, match="a bug"):
        check_sample(backend, 2, 3)


def test_what_a_graph_cannot_do_runs_without(backend, cuda):
    noise, image_latents = make_inputs(1)
    scheduler, seen = Scheduler(backend.info.scheduler), []
    for _ in range(2):
        backend.sample(noise, image_latents, scheduler, 2, lambda step, *_: seen.append(step))
    assert seen == [0, 1, 0, 1] and cuda.captures == 0
    backend.cuda_graph = False
    check_sample(backend, 1, 2)
    assert len(backend._lanes._free) == 0  # no lane was made


def test_a_compiled_network_is_captured_as_compiled(model_dir, cuda, monkeypatch):
    compiled = []

    def compile_and_count(network, name, device):
        compiled.append(network)
        return network

    monkeypatch.setattr(torch_backend, "compile_network", compile_and_count)
    backend = TorchBackend(read_model_info(model_dir), "cpu", torch.float32, compile_networks=True)
    backend.cuda_graph = True
    check_sample(backend, 1, 2)
    assert compiled[-1] == backend.unet.denoise


@pytest.mark.parametrize(("fused", "form"), [(True, FusedUNet), ("epilogues", EpilogueUNet)])
def test_the_fused_network_is_captured_as_fused(model_dir, cuda, fused, form):
    backend = TorchBackend(read_model_info(model_dir), "cpu", torch.float32, fused=fused)
    plain = TorchBackend(backend.info, "cpu", torch.float32)
    backend.cuda_graph = True
    noise, image_latents = make_inputs(2)
    scheduler = Scheduler(backend.info.scheduler)
    for _ in range(3):
        found = backend.sample(noise, image_latents, scheduler, 3)
        expected = ddim(plain.denoise, noise, image_latents, scheduler, 3, backend.info.self_condition)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert cuda.captures == 1 and type(backend._denoise) is form


def test_a_closed_backend_takes_no_calls(backend):
    check_sample(backend, 1, 2)
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        check_sample(backend, 1, 2)
