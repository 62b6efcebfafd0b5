"""Holds a thread-safe pool of lanes: each runs one call at a time, with its own buffers and stream."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from ldmseg_fast.backends.graphs.captured import CapturedCall, CaptureError, on_stream
from ldmseg_fast.backends.graphs.loop import Runner, RunnerSteps, SampleLoop, Steps
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.errors import ArgumentError, BackendError

MAX_LOOPS = 4  # (batch, steps) pairs that keep their buffers and CUDA graph, and calls that do
Result = TypeVar("Result")


class Lane:
    """Holds a runner of every graph, a stream, and the loops made so far.

    Args:
        runners: by the graph's name.
        stream: where they run; None on a CPU.
        capture: whether loops become CUDA graphs.
        make_steps: makes the steps of a loop for image latents [B, C_image, h, w] and a number of steps; default those
            of the runner `denoiser`.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        stream: torch.cuda.Stream | None,
        capture: bool,
        make_steps: Callable[[ModelInfo, Tensor, int], Steps] | None = None,
    ) -> None:
        self.runners = runners
        self.make_steps = make_steps or (lambda *args: RunnerSteps(runners["denoiser"], *args))
        self.stream = stream
        self.capture = capture
        self._loops: OrderedDict[tuple, SampleLoop] = OrderedDict()
        self._calls: OrderedDict[tuple, CapturedCall] = OrderedDict()
        self._last: tuple = ()  # what `is_repeated` was asked
        self._too_large: set[tuple] = set()  # whose graphs did not fit into memory

    def run(self, graph: str, inputs: Mapping[str, Tensor], output_sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Runs a graph once.

        Args:
            graph: its name.
            inputs: by name, of the shapes and dtypes in its spec, [B, ...].
            output_sizes: axes that no input's shape tells.

        Returns:
            The outputs by name, new tensors of the spec's shapes and dtypes.

        Raises:
            ArgumentError: an input that is missing or does not fit.
        """
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

    def sample(self, info: ModelInfo, noise: Tensor, image_latents: Tensor, num_inference_steps: int) -> Tensor:
        """Samples with the loop for this shape: noise and image latents [B, ., h, w] -> x_0 float32 [B, C, h, w].

        Where a loop cannot be captured as a CUDA graph, a warning says so, and this lane goes on without graphs. One
        that does not fit into memory runs without, and the others stay. Graphs of other sizes make room where a call
        needs their memory.
        """
        key = (tuple(image_latents.shape), num_inference_steps)
        return self._captured(
            "the sampling loop", key, lambda: self.loop(info, image_latents, num_inference_steps)(noise, image_latents)
        )

    def call(
        self, name: str, function: Callable[..., tuple[Tensor, ...]], *values: Tensor, settings: tuple = ()
    ) -> tuple[Tensor, ...]:
        """Calls a function of tensors, of any shape and dtype, as a CUDA graph for each of their shapes.

        Where it cannot be captured, a warning says so as in `sample`. The least recently used call makes room for a
        fifth.

        Args:
            name: of the function.
            function: gives tensors of any shape and dtype. Under one name and `settings` it always does the same.
            values: its arguments.
            settings: what it depends on beside them.
        """

        key = _key_of(name, values, settings)

        def run() -> tuple[Tensor, ...]:
            if key not in self._calls:
                while len(self._calls) >= MAX_LOOPS:
                    self._calls.popitem(last=False)
                self._calls[key] = CapturedCall(function, self.stream, self._captures(key))
            self._calls.move_to_end(key)
            return self._calls[key](*values)

        return self._captured(name, key, run)

    def is_repeated(self, name: str, *values: Tensor, settings: tuple = ()) -> bool:
        """Whether a call of `call`, with tensors of any shape and dtype like these, is worth a graph of its own.

        It is where it has one already, or the last such question was the same.
        """
        key = _key_of(name, values, settings)
        repeated = key in self._calls or key == self._last
        self._last = key
        return repeated and self._captures(key)

    def _captures(self, key: tuple) -> bool:
        return self.capture and key not in self._too_large

    def _captured(self, name: str, key: tuple, run: Callable[[], Result]) -> Result:
        try:
            return self._with_room(key, run)
        except CaptureError as error:
            text = f"cuda_graph: {name} cannot be captured ({error})"
            memory = error.is_memory
        if memory:
            self._too_large.add(key)
            self._drop(key)
            text += "; at this size it runs step by step from here on, with the same results"
        else:
            self.capture = False
            self._loops.clear()  # with the memory of their graphs
            self._calls.clear()
            text += "; it runs step by step from here on, with the same results"
        warnings.warn(f"{text}; cuda_graph=False or --no-cuda-graph does so from the start", stacklevel=3)
        return self._with_room(key, run)

    def _with_room(self, key: tuple, run: Callable[[], Result]) -> Result:
        """Runs what `key` names, and again without the graphs of all else where memory runs out."""
        try:
            return run()
        except torch.OutOfMemoryError:
            if not self._drop_others(key):
                raise
        return run()  # outside the block above, whose error holds memory

    def _drop_others(self, key: tuple) -> bool:
        others = [each for each in (*self._loops, *self._calls) if each != key]
        for each in others:
            self._drop(each)
        return bool(others)

    def _drop(self, key: tuple) -> None:
        self._loops.pop(key, None)
        self._calls.pop(key, None)

    def loop(self, info: ModelInfo, image_latents: Tensor, num_inference_steps: int) -> SampleLoop:
        """Returns the loop for image latents of this shape, float [B, C_image, h, w], and this number of steps.

        The least recently used loop makes room for a fifth.
        """
        key = (tuple(image_latents.shape), num_inference_steps)
        if key not in self._loops:
            while len(self._loops) >= MAX_LOOPS:
                self._loops.popitem(last=False)
            with on_stream(self.stream):  # contexts and buffers belong to the lane's device
                steps = self.make_steps(info, image_latents, num_inference_steps)
                self._loops[key] = SampleLoop(steps, self.stream, self._captures(key))
        self._loops.move_to_end(key)
        return self._loops[key]

    def wait(self) -> None:
        """Waits until the GPU has done what was queued here."""
        if self.stream is not None:
            self.stream.synchronize()


def _key_of(name: str, values: tuple[Tensor, ...], settings: tuple) -> tuple:
    return (name, settings, *((tuple(value.shape), value.dtype) for value in values))


class LanePool:
    """Hands out at most `size` lanes, made when needed. Callers beyond that wait for a free one.

    Raises:
        ArgumentError: a size below 1.
    """

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
        """Lends a lane for the length of a `with` block. Raises BackendError once the pool is closed."""
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
        """Refuses new callers, waits for those inside, and drops every lane. A second call does nothing."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: len(self._free) == self._made)
            for lane in self._free:
                lane.wait()
            self._free.clear()
            self._made = 0
