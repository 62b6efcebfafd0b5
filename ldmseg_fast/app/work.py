"""Does what a visitor of the app asks for: segment, complete, compare, score. Nothing here knows of web pages."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from ldmseg_fast.app.results import VIEW_SIDE, Comparison, Segmented, Settings, Stop
from ldmseg_fast.app.scoring import Score, of_few_segments, read_truth, score
from ldmseg_fast.backends.load import BACKENDS
from ldmseg_fast.backends.model_info import ModelInfo
from ldmseg_fast.backends.torch_backend import TorchBackend
from ldmseg_fast.config import PostprocessConfig
from ldmseg_fast.data.pictures import MAX_PIXELS, Picture, read_picture, rgb_of_image
from ldmseg_fast.errors import ArgumentError, BackendError
from ldmseg_fast.inference.ensemble import combine, iou_matrix, mutual_quality
from ldmseg_fast.panoptic.format import check_ids, read_panoptic_png
from ldmseg_fast.panoptic.results import PanopticResult
from ldmseg_fast.pipeline import LDMSegPipeline

OF_GRAPHS = ("onnxruntime", "tensorrt")  # backends that run exported graphs
OF_ENGINES = ("profile", "kernel_specialization", "graph_strategy")  # options of the last
_TAKE = 0.05  # seconds between two looks at `stop` while another visitor's work runs


@dataclass
class _Loaded:
    """A backend's pipelines: the model's own size, and the last other one that a visitor asked for."""

    own: LDMSegPipeline
    other: LDMSegPipeline | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Worker:
    """Runs one model for all visitors, one piece of work at a time on each backend.

    Args:
        model: MODEL_DIR or the name of a model, as `LDMSegPipeline.from_pretrained` takes it.
        backends: names of those that visitors may choose; the first is the default. The others load on first use.
        engine_dir: exported graphs or engines, for "onnxruntime" and "tensorrt".
        speed: `cuda_graph`, `fused`, `precision`, `attention` and OF_ENGINES of `LDMSegPipeline.from_pretrained`;
            graphs take the first and the last only, and beside them torch does without the last.
        max_pixels: of a picture; larger ones are refused before they are decoded.

    Attributes:
        info: of the model.
        keep: is given the work's name, picture and result of everything that is done; see `keep.Keeper`.

    Raises:
        BackendError: an unknown backend, or one that cannot run here.
        CheckpointError: no model.
    """

    def __init__(
        self,
        model: str | Path = "tiny",
        backends: Sequence[str] = ("torch",),
        engine_dir: str | Path | None = None,
        *,
        speed: Mapping[str, Any] = MappingProxyType({}),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.speed = dict(speed)
        self.model, self.backends, self.engine_dir = model, tuple(dict.fromkeys(backends)), engine_dir
        self.max_pixels = max_pixels
        if not self.backends or (unknown := [name for name in self.backends if name not in BACKENDS]):
            name = unknown[0] if self.backends else ""
            raise BackendError(f"backend={name!r}: one of {', '.join(BACKENDS)} expected")
        self.keep: Callable[[str, Any, Segmented], None] | None = None
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()
        self.info = self._load_info()

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The model's categories as COCO entries with `id`, `name` and `isthing`; one, "object", where it has none."""
        table = self.info.categories
        if table is None:
            return [{"id": 1, "name": "object", "isthing": 1}]
        return [{"id": each.id, "name": each.name, "isthing": int(each.isthing)} for each in table.categories]

    def filled(self, settings: Settings | None = None) -> Settings:
        """Returns settings with the model's own values in the place of None.

        Raises:
            ArgumentError: a backend that this worker does not have.
        """
        settings = settings or Settings()
        backend = settings.backend or self.backends[0]
        if backend not in self.backends:
            raise ArgumentError(f"backend={backend!r:.80}: this app has {', '.join(self.backends)}")
        own = self.info.postprocess
        values: dict[str, Any] = {
            "steps": self.info.num_inference_steps,
            "size": self.info.image_size,
            "mask_threshold": own.mask_threshold,
            "count_threshold": own.count_threshold,
            "overlap_threshold": own.overlap_threshold,
        }
        chosen = {name: value for name, value in values.items() if getattr(settings, name) is None}
        return replace(settings, backend=backend, **chosen)

    def read(self, picture: Any, name: str = "picture") -> Picture:
        """Decodes a picture and turns it as its EXIF orientation says.

        Args:
            picture: a file's path, Pillow's image, or uint8 RGB [H, W, 3].
            name: of a picture without a path, for errors.

        Raises:
            DataError: no readable picture, or over `max_pixels`.
            ArgumentError: an array of another kind.
        """
        if isinstance(picture, Picture):
            return picture
        if isinstance(picture, str | Path):
            return read_picture(picture, max_pixels=self.max_pixels)
        if isinstance(picture, np.ndarray):
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise ArgumentError(f"{name}: {picture.dtype} {list(picture.shape)}; uint8 [H, W, 3] expected")
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise ArgumentError(f"{name}: {type(picture).__name__}; give a picture")
        rgb = rgb_of_image(picture, name, max_pixels=self.max_pixels)
        return Picture(rgb, (rgb.height, rgb.width))

    def read_map(self, segmentation: Any) -> np.ndarray:
        """Reads a map, int32 [H, W]: an array of ids, or the path of a panoptic PNG (id = R + 256 G + 65536 B).

        Raises:
            PanopticFormatError: no such map.
            DataError: a file of over `scoring.MAX_SEGMENTS` segments.
        """
        if isinstance(segmentation, str | Path):
            return of_few_segments(read_panoptic_png(segmentation, max_pixels=self.max_pixels), segmentation)
        return np.ascontiguousarray(check_ids(np.asarray(segmentation)), np.int32)

    def segment(self, picture: Any, settings: Settings | None = None, stop: Stop | None = None) -> Segmented:
        """Segments one picture.

        Args:
            picture: see `read`.
            settings: default the model's own.
            stop: called before the work, between sampling steps and after them; what it raises ends the work.

        Raises:
            ArgumentError, ConfigError, BackendError: a setting that is out of range; it is named.
            DataError: see `read`.
        """
        settings = self.filled(settings)
        read = self.read(picture)
        with self._pipeline(settings, stop) as pipe:
            start = time.perf_counter()
            results: list[Any] = list(
                pipe(
                    read,
                    settings.steps,
                    seed=settings.seed,
                    solver=settings.solver,
                    thresholds=_thresholds(settings),
                    callback=_callback(stop),
                )
            )
            seconds = time.perf_counter() - start
        done = Segmented(results[0], view_of(read), seconds, settings, read.orientation)
        self._keep("segment", picture, done)
        return done

    def complete(
        self,
        picture: Any,
        segmentation: Any,
        known: np.ndarray,
        settings: Settings | None = None,
        stop: Stop | None = None,
        *,
        segments_info: Sequence[Mapping[str, Any]] | None = None,
    ) -> Segmented:
        """Completes a map: given pixels stay as they are, bit for bit; the model finds the rest.

        Args:
            picture: see `read`.
            segmentation: see `read_map`; of the picture's size as it is shown.
            known: bool [H, W], True where the map is given.
            settings, stop: as in `segment`.
            segments_info: of models with categories: what given segments are, entries with `id` and `category_id`.

        Returns:
            The whole map; entries of its `segments_info` have "given".

        Raises:
            ArgumentError: a map or mask of another size than the picture, nothing given, or nothing to complete.
            PanopticFormatError: see `read_map`.
            DataError: see `read`.
        """
        settings = self.filled(settings)
        read, ids, known = self.read(picture), self.read_map(segmentation), np.asarray(known)
        for what, shape in (("map", ids.shape), ("mask", known.shape)):
            if shape != read.size:
                raise ArgumentError(
                    f"the {what} has {' x '.join(map(str, shape[::-1]))} pixels, the picture {read.size[1]} x "
                    f"{read.size[0]}: give a {what} of the picture's size"
                )
        known = known.astype(bool)
        if known.all():
            raise ArgumentError("every pixel of the map is given: brush away the part that is to be completed")
        if not ids[known].any():
            raise ArgumentError("nothing of the map is given: keep a segment of it, or segment the picture instead")
        numbers = None
        if self.info.categories is not None and segments_info is not None:
            numbers = [[entry for entry in segments_info if "category_id" in entry]]
        with self._pipeline(settings, stop) as pipe:
            start = time.perf_counter()
            result = pipe.inpaint(
                read,
                ids,
                known,
                settings.steps,
                seed=settings.seed,
                solver=settings.solver,
                thresholds=_thresholds(settings),
                callback=_callback(stop),
                segments_info=numbers,
            )[0]
            seconds = time.perf_counter() - start
        done = Segmented(result, view_of(read), seconds, settings, read.orientation)
        self._keep("complete", picture, done)
        return done

    def compare(
        self, picture: Any, first: Settings | None, second: Settings | None, stop: Stop | None = None
    ) -> Comparison:
        """Segments one picture by two settings, or on two backends, and tells where the maps agree.

        Raises:
            ArgumentError, ConfigError, BackendError, DataError: as in `segment`.
        """
        one, other = self.segment(picture, first, stop), self.segment(picture, second, stop)
        agreement = combine([one.result, other.result]).agreement == 1
        ids, places = zip(*(np.unique(each.result.segmentation, return_inverse=True) for each in (one, other)))
        iou = iou_matrix(ids[0], places[0].ravel(), ids[1], places[1].ravel())
        return Comparison(one, other, agreement, float(agreement.mean()), mutual_quality(iou, ids[0], ids[1]))

    def score(self, predicted: PanopticResult | np.ndarray, truth: Any, view: np.ndarray | None = None) -> Score:
        """Scores a map against the truth: panoptic quality without categories, and the picture of its errors.

        Args:
            predicted: a result, or ids [H, W].
            truth: see `scoring.read_truth`.
            view: the picture, uint8 [h, w, 3], below the errors.

        Raises:
            ArgumentError: a truth of another size.
            DataError, PanopticFormatError: a truth that cannot be read.
        """
        return score(predicted, read_truth(truth, max_pixels=self.max_pixels), view)

    def close(self) -> None:
        """Frees what the backends hold; the worker cannot be used afterwards."""
        for loaded in self._loaded.values():
            close = getattr(loaded.own.backend, "close", None)
            if close is not None:
                close()
        self._loaded.clear()

    def _load_info(self) -> ModelInfo:
        return self._backend(self.backends[0]).own.info

    def _keep(self, work: str, picture: Any, done: Segmented) -> None:
        if self.keep is not None:
            self.keep(work, picture, done)

    def _backend(self, name: str) -> _Loaded:
        with self._loading:
            if name not in self._loaded:
                graphs, speed = self.engine_dir if name in OF_GRAPHS else None, self.speed
                if len(self.backends) > 1:  # the others are for torch, which visitors may choose; see `left_out`
                    used = ("cuda_graph", *OF_ENGINES) if name in OF_GRAPHS else speed.keys() - {*OF_ENGINES}
                    speed = {key: value for key, value in speed.items() if key in used}
                pipe = LDMSegPipeline.from_pretrained(self.model, name, graphs, **speed)
                pipe.max_pixels = self.max_pixels
                self._loaded[name] = _Loaded(pipe)
            return self._loaded[name]

    @contextmanager
    def _pipeline(self, settings: Settings, stop: Stop | None) -> Iterator[LDMSegPipeline]:
        """Lends the pipeline of a backend and size to one caller; waits while another has it, or `stop` raises."""
        loaded = self._backend(settings.backend)
        take_turn(loaded.lock, stop)
        try:
            yield self._at_size(loaded, settings)
            if stop is not None:
                stop()
        finally:
            loaded.lock.release()

    def _at_size(self, loaded: _Loaded, settings: Settings) -> LDMSegPipeline:
        size, backend = settings.size, loaded.own.backend
        if isinstance(size, bool) or not isinstance(size, int):
            raise ArgumentError(f"size={size!r:.80}: a whole number of pixels expected")
        if size == loaded.own.info.image_size:
            return loaded.own
        if loaded.other is None or loaded.other.info.image_size != size:
            if not isinstance(backend, TorchBackend):
                raise BackendError(
                    f"size={size}: the graphs of backend={settings.backend} have {loaded.own.info.image_size} pixels"
                )
            other = copy.copy(backend)  # shares the networks, which take any size
            other.info = backend.info.at_size(size)
            loaded.other = LDMSegPipeline(other)
            loaded.other.max_pixels = self.max_pixels
        return loaded.other


def left_out(backend: str, speed: Mapping[str, Any]) -> list[str]:
    """Says which options of `Worker.speed` that were given the graphs of `backend` do without, one line for each."""
    if backend not in OF_GRAPHS:
        return []
    fused = "fused-epilogues" if speed.get("fused") == "epilogues" else "fused"
    given = {"precision": speed.get("precision"), fused: bool(speed.get("fused")) or None}
    given["attention"] = None if speed.get("attention") == "auto" else speed.get("attention")
    return [
        f"--{name}{'' if value is True else f' {value}'}: backend={backend} runs graphs, which have theirs from the "
        f"export; only visitors who choose backend=torch get it"
        for name, value in given.items()
        if value is not None
    ]


def take_turn(lock: threading.Lock, stop: Stop | None) -> None:
    """Takes a lock that others' work may hold, unless `stop` raises; the time of a request starts when it is taken."""
    restart = getattr(stop, "restart", lambda: None)
    taken = lock.acquire(blocking=False)
    try:
        while not taken:
            restart()
            if stop is not None:
                stop()
            taken = lock.acquire(timeout=_TAKE)
        restart()
        if stop is not None:
            stop()
    except BaseException:
        if taken:
            lock.release()
        raise


def view_of(picture: Picture) -> np.ndarray:
    """Scales a picture down to what is shown: uint8 [h, w, 3], sides of at most VIEW_SIDE pixels."""
    height, width = picture.size
    scale = min(1.0, VIEW_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels = picture.pixels
    if (pixels.size if isinstance(pixels, Image.Image) else pixels.shape[1::-1]) == size:
        return np.array(pixels)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return np.array(image.resize(size, Image.Resampling.BOX))


def _thresholds(settings: Settings) -> PostprocessConfig:
    return PostprocessConfig(settings.mask_threshold, settings.count_threshold, settings.overlap_threshold)  # type: ignore[arg-type]


def _callback(stop: Stop | None) -> Callable[..., None] | None:
    return None if stop is None else lambda *_: stop()
