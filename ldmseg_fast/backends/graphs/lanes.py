"""A thread-safe pool of execution contexts: each lane runs one call at a time, with its own buffers and stream."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.loop import Runner, SampleLoop, on_stream
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.errors import ArgumentError, BackendError

MAX_LOOPS = 4  # (batch, steps) pairs that keep their buffers and CUDA graph


class Lane:
    """Runners of every graph, a stream, and the loops made so far."""

    def __init__(self, runners: Mapping[str, Runner], stream: torch.cuda.Stream | None, capture: bool) -> None:
        self.runners = runners
        self.stream = stream
        self.capture = capture
        self._loops: OrderedDict[tuple, SampleLoop] = OrderedDict()

    def run(self, graph: str, inputs: Mapping[str, Tensor], output_sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """One call of a graph: its outputs, new tensors. `output_sizes`: axes that no input's shape tells."""
        runner = self.runners[graph]
        sizes = runner.spec.sizes(inputs) | dict(output_sizes)
        device = next(value.device for name, value in inputs.items() if not runner.spec.tensors[name].is_shape)
        outputs = {
            tensor.name: torch.empty(tensor.resolve(sizes), dtype=tensor.torch_dtype, device=device)
            for tensor in runner.spec.outputs
        }
        tensors = {name: value.contiguous() for name, value in inputs.items()} | outputs
        with on_stream(self.stream):
            runner.prepare(tensors)()
        return outputs

    def loop(self, info: ModelInfo, image_latents: Tensor, num_inference_steps: int) -> SampleLoop:
        """The loop for this shape and number of steps; the least recently used one makes room for a fifth."""
        key = (tuple(image_latents.shape), num_inference_steps)
        if key not in self._loops:
            while len(self._loops) >= MAX_LOOPS:
                self._loops.popitem(last=False)
            runner = self.runners["denoiser"]
            with on_stream(self.stream):  # contexts and buffers belong to the lane's device
                self._loops[key] = SampleLoop(
                    runner, info, image_latents, num_inference_steps, self.stream, self.capture
                )
        self._loops.move_to_end(key)
        return self._loops[key]

    def wait(self) -> None:
        """Until the GPU has done what was queued here."""
        if self.stream is not None:
            self.stream.synchronize()


class LanePool:
    """At most `size` lanes, made when needed. Callers beyond that wait for a free one."""

    def __init__(self, make_lane: Callable[[], Lane], size: int) -> None:
        if size < 1:
            raise ArgumentError(f"lanes={size}: at least 1")
        self._make_lane = make_lane
        self._size = size
        self._free: list[Lane] = []
        self._made = 0
        self._closed = False
        self._condition = threading.Condition()

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """A lane for the length of a `with` block. Raises BackendError once the pool is closed."""
        lane = self._take()
        try:
            yield lane
        finally:
            with self._condition:
                self._free.append(lane)
                self._condition.notify_all()

    def _take(self) -> Lane:
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._free or self._made < self._size)
            if self._closed:
                raise BackendError("this backend is closed; load it again")
            if self._free:
                return self._free.pop()
            self._made += 1
        try:
            return self._make_lane()
        except BaseException:
            with self._condition:
                self._made -= 1
                self._condition.notify_all()
            raise

    def close(self) -> None:
        """Refuse new callers, wait for those inside, and drop every lane. A second call does nothing."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: len(self._free) == self._made)
            for lane in self._free:
                lane.wait()
            self._free.clear()
            self._made = 0
