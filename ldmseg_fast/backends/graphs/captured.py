"""Runs work on a stream of its own, on a GPU as one CUDA graph."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CaptureError(Exception):
    """Reports that work could not be captured as a CUDA graph. A `Lane` goes on without one.

    Attributes:
        is_memory: its memory did not fit, which says nothing of smaller work.
    """

    def __init__(self, error: BaseException, outer: BaseException | None = None) -> None:
        """Tells of `error`, and of what it hides: once work has failed, the end of its capture fails as well.

        outer: what the caller was handling already.
        """
        causes = [error]
        while (before := causes[-1].__cause__ or causes[-1].__context__) is not None and before is not outer:
            causes.append(before)
        super().__init__(f"{type(causes[-1]).__name__}: {str(causes[-1]).partition(chr(10))[0]}")
        self.is_memory = any(isinstance(cause, torch.OutOfMemoryError) for cause in causes)


class Captured:
    """Does the same work at every call, on tensors that lie where they lay in the call before.

    Args:
        run: the work.
        stream: where it runs; None on a CPU.
        capture: make it one CUDA graph. Needs a stream. A thread's first call runs it as it is, as lazy initialisation
            must not fall into a capture (cuDNN keeps what it chose by thread); the second call captures, so what runs
            once costs nothing more.
    """

    def __init__(self, run: Callable[[], None], stream: torch.cuda.Stream | None, capture: bool) -> None:
        self.run = run
        self.stream = stream
        self._capture = capture and stream is not None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._threads: set[int] = set()

    def __call__(self) -> None:
        """Does the work on the current stream, which is `stream`.

        Raises:
            CaptureError: it cannot be captured.
        """
        thread = threading.get_ident()
        if self._capture and thread in self._threads and self._graph is None:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.run()
        self._threads.add(thread)

    def _captured(self) -> torch.cuda.CUDAGraph:
        outer = sys.exc_info()[1]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.run()
        except RuntimeError as error:  # whatever CUDA refuses
            raise CaptureError(error, outer) from None  # a traceback would hold the memory of what it failed in
        return graph


class CapturedCall:
    """Calls a function of tensors, each of one shape and dtype, as a CUDA graph; see `Captured`.

    Args:
        function: from tensors to tensors of any shape and dtype.
        stream, capture: see `Captured`.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], stream: torch.cuda.Stream | None, capture: bool
    ) -> None:
        self.function = function
        self.stream = stream
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: tuple[Tensor, ...] = ()
        self._run = Captured(self._call, stream, capture)

    def _call(self) -> None:
        self._outputs = self.function(*self._inputs)

    @torch.inference_mode()
    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Returns what the function does of `values`, each of any shape and dtype, in new tensors.

        Raises:
            CaptureError: it cannot be captured.
        """
        with on_stream(self.stream):
            self._inputs = self._inputs or tuple(torch.empty_like(value) for value in values)
            for own, value in zip(self._inputs, values):
                own.copy_(value)
            self._run()
        results = tuple(torch.empty_like(each) for each in self._outputs)  # outside, see `on_stream`
        with on_stream(self.stream):
            for result, output in zip(results, self._outputs):
                result.copy_(output)
        return results


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Puts work on a stream: it follows what the current stream has queued, and the current stream waits for it.

    Results are to be allocated outside: then the allocator never hands memory to one stream that the other still uses.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(stream.device).wait_stream(stream)
