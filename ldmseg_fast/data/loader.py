"""Gives a rank its training batches: worker processes load ahead, a side stream copies ahead to the device.

The batches of a step depend on (seed, step) alone, not on ranks, accumulation, worker processes or resumes.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from ldmseg_fast.data.coco_panoptic import CocoPanoptic, collate
from ldmseg_fast.data.joined_sets import JoinedSets
from ldmseg_fast.data.reader import PatientReader, hang_error, without_traceback
from ldmseg_fast.data.worker_start import WorkerStart, without_main, worker_context
from ldmseg_fast.errors import DataError

ATTEMPTS = 20  # replacements tried for one item before the data set as a whole counts as unreadable


class _Items(Dataset):
    """Gives a data set's items for (epoch, index) keys. Another item takes the place of an unreadable one and says so.

    `reading`, int64 [workers, at least 1], tells the main process which item each worker is at, plus one.
    """

    def __init__(self, dataset: CocoPanoptic | JoinedSets, reading: Tensor) -> None:
        self.dataset, self.reading = dataset, reading

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, wanted = key
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        index, failures = wanted, []
        for attempt in range(ATTEMPTS):
            self.reading[worker] = index + 1
            try:
                item = self.dataset[epoch, index]
            except DataError as error:
                failures.append((index, str(error)))
                index = (wanted + 7919 * (attempt + 1) + epoch) % len(self.dataset)  # a prime: not the neighbours
                continue
            finally:
                self.reading[worker] = 0
            return item | {"sample": epoch * len(self.dataset) + wanted, "failures": failures}
        raise DataError(failures[0][1])


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collate(items)
    batch["sample"] = [item["sample"] for item in items]
    batch["failures"] = [failure for item in items for failure in item["failures"]]
    batch["segment_counts"] = [int(item["num_segments"]) for item in items]
    batch["segments"] = torch.tensor(
        [(place, number + 1) for place, count in enumerate(batch["segment_counts"]) for number in range(count)],
        dtype=torch.int64,
    ).view(-1, 2)
    return batch


class TrainingBatches:
    """Gives endless micro-batches to one rank.

    Each is what `collate` gives, and

    - sample: a list of B numbers that no other draw of the whole run has;
    - failures: (index, message) of unreadable items that others stand in for;
    - segment_counts: a list of B, how many segments each map has;
    - segments: int64 [M, 2], all of them as (place in the batch, number in `segment_ids`).

    Args:
        dataset: the training split, or several.
        batch_size: of one rank and micro-batch.
        first_item: how many items all ranks together have seen already.
        num_workers: processes; 0 loads in this one.
        timeout: seconds to wait for a batch.

    Raises:
        DataError: here, processes that cannot be started; on access, a read that hangs, whose file it names, or a data
            set of which nothing can be read.
    """

    def __init__(
        self,
        dataset: CocoPanoptic | JoinedSets,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        first_item: int = 0,
        num_workers: int = 0,
        timeout: float = 300.0,
    ) -> None:
        self.dataset, self.timeout = dataset, timeout
        self.reading = torch.zeros(max(num_workers, 1), dtype=torch.int64).share_memory_()
        joined = dataset if isinstance(dataset, JoinedSets) else JoinedSets([dataset], [""])
        self._sampler = joined.sampler(batch_size, rank, world_size, seed, first_item)
        self.waited = 0.0  # seconds spent here since the last look
        try:
            loader = DataLoader(
                _Items(dataset, self.reading),
                batch_sampler=self._sampler,
                num_workers=num_workers,
                collate_fn=_collate,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=WorkerStart(),
                timeout=timeout if num_workers else 0,
                generator=torch.Generator().manual_seed(seed),  # a start must not draw from the state that is resumed
                multiprocessing_context=worker_context() if num_workers else None,
            )
            with without_main():
                self._iterator: Any = iter(loader)
        except (OSError, EOFError) as error:  # no more processes, memory or descriptors
            raise DataError(
                f"data.num_workers={num_workers}: the loader processes cannot be started "
                f"({error or type(error).__name__}); lower data.num_workers, 0 reads in the training process itself"
            ) from None
        self._reader = None if num_workers else PatientReader(timeout, self._reading)

    def order(self, step: int) -> list[tuple[int, int]]:
        """Returns the (epoch, index) pairs of this rank's micro-batch number `step`."""
        return self._sampler.batch(step)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            if self._reader is not None:
                return self._reader.call(lambda: next(self._iterator))
            return next(self._iterator)
        except DataError as error:  # from a worker process it comes with that process's traceback as its text
            raise without_traceback(error) from None
        except RuntimeError as error:
            if "timed out" in str(error):
                hanging = hang_error(self.timeout, self._reading())  # before the workers are gone
                self._kill_workers()
                raise hanging from None
            if "exited unexpectedly" in str(error):
                raise DataError(f"a loader process died ({error}); too little memory? Lower data.num_workers") from None
            raise
        finally:
            self.waited += time.perf_counter() - start

    def close(self) -> None:
        """Ends the worker processes."""
        self._iterator = iter(())
        if self._reader is not None:
            self._reader.close()

    def _reading(self) -> str:
        """Names the files that the loading processes are at."""
        files = [
            f"process {worker} reads {' and '.join(map(str, self.dataset.paths(index - 1)))}"
            for worker, index in enumerate(self.reading.tolist())
            if index
        ]
        return "; ".join(files) or "no process is at a file"

    def _kill_workers(self) -> None:
        """Kills the worker processes, because hung ones do not end when they are asked to."""
        _remove_worker_pids(id(self._iterator))  # else their death raises an error wherever the program is then
        self._iterator._shutdown = True
        for worker in self._iterator._workers:
            os.kill(worker.pid, signal.SIGKILL)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies a batch's tensors to `device`. Copies from pinned memory do not wait."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


class Prefetcher:
    """Gives the `parts` micro-batches of a step on the device.

    To a GPU they are copied on a side stream while the step before is computed. Pictures and ids are bytes, so a step's
    batch is small beside its activations.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], device: torch.device, parts: int = 1) -> None:
        self.batches, self.device, self.parts = batches, device, parts
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: list[dict[str, Any]] | None = None

    def _load(self) -> list[dict[str, Any]]:
        if self.stream is None:
            return [to_device(next(self.batches), self.device) for _ in range(self.parts)]
        with torch.cuda.stream(self.stream):
            return [to_device(next(self.batches), self.device) for _ in range(self.parts)]

    def __next__(self) -> list[dict[str, Any]]:
        if self.stream is None:
            return self._load()
        step = self._next if self._next is not None else self._load()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for batch in step:
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.record_stream(current)  # or the allocator would hand its memory to the side stream's copies
        self._next = None
        return step

    def fetch(self) -> None:
        """Starts to copy the next step's batches. Call it once the present step's work is queued."""
        if self.stream is not None and self._next is None:
            self._next = self._load()
