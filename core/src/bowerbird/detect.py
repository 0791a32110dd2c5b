"""Finding the objects of many pictures with a trained detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bowerbird.data.images import OnError, open_image
from bowerbird.encoders import load_encoder
from bowerbird.encoders.bundle import LoadedEncoder
from bowerbird.errors import DataError, InputError, UnknownNameError, did_you_mean
from bowerbird.protocols import Detector, Objects


@dataclass(frozen=True)
class Found:
    """The objects of one picture: its ``position``, the picture as it was read (RGB, upright), and ``objects``."""

    position: int
    image: Image.Image
    objects: Objects


class ObjectFinder:
    """A trained detector, and which of its objects count.

    Args:
        ref: What ``bowerbird.encoders.load_encoder`` takes: a run or an exported folder.
        threshold: Least score, 0..1.
        classes: Names of the classes that count; none: all.
        max_per_image: Most objects of a picture, the surest ones.
        device: ``auto``, ``cpu``, ``cuda``, ...

    Raises:
        InputError: ``ref`` is no detector or has no classes, or a number is out of its range.
        UnknownNameError: The detector has no such class.
    """

    def __init__(
        self,
        ref: str | Path,
        *,
        threshold: float = 0.5,
        classes: Sequence[str] = (),
        max_per_image: int = 100,
        device: str = "auto",
    ) -> None:
        if not 0 <= threshold <= 1 or max_per_image < 1:
            raise InputError(
                f"threshold = {threshold}, max_per_image = {max_per_image}: expected 0 to 1, and at least 1"
            )
        self.loaded = load_encoder(ref, device=device)
        self.detector = _detector_of(self.loaded)
        self.threshold, self.max_per_image = threshold, max_per_image
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise UnknownNameError(
                f"{self.loaded.name} finds no {unknown[0]!r}.{did_you_mean(unknown[0], self.classes)} "
                f"It finds: {', '.join(self.classes)}"
            )
        self.chosen = tuple(dict.fromkeys(classes))

    @property
    def classes(self) -> Sequence[str]:
        return self.detector.classes

    @property
    def identity(self) -> str:
        """Changes where other objects could be found in the same picture."""
        parts = [self.loaded.fingerprint[:12], f"threshold={self.threshold:g}", f"max={self.max_per_image}"]
        return " ".join([*parts, *([f"classes={','.join(sorted(self.chosen))}"] if self.chosen else [])])

    def find(self, sources: Sequence[Any], *, batch_size: int = 8, on_error: OnError = "raise") -> Iterator[Found]:
        """The objects of every picture, in order. Pictures of the next batch are read while one is looked at.

        Args:
            sources: What ``bowerbird.data.images.open_image`` takes; ``sources[i]`` is read in a worker thread.
            batch_size: Pictures at once.
            on_error: ``raise`` the ``DataError`` of an unreadable picture, ``skip`` it, or a function that is told
                ``(position, error)``.
        """
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: expected at least 1")

        def read(position: int) -> Image.Image | DataError:
            source = sources[position]
            name = str(source) if isinstance(source, str | Path) else f"number {position}"
            try:
                return open_image(source, name=name)
            except DataError as error:
                return error

        pool = ThreadPoolExecutor(4, thread_name_prefix="bowerbird-read")
        starts = range(0, len(sources), batch_size)

        def submit(start: int) -> list[Future[Image.Image | DataError]]:
            return [pool.submit(read, i) for i in range(start, min(start + batch_size, len(sources)))]

        try:
            waiting = submit(0) if len(starts) else []
            for start in starts:
                current = waiting
                waiting = submit(start + batch_size) if start + batch_size < len(sources) else []
                good: list[tuple[int, Image.Image]] = []
                for position, future in enumerate(current, start):
                    image = future.result()
                    if not isinstance(image, DataError):
                        good.append((position, image))
                    elif on_error == "raise":
                        yield from self._objects(good)
                        raise image
                    elif callable(on_error):
                        on_error(position, image)
                yield from self._objects(good)
        finally:  # also where the caller stops early
            pool.shutdown(wait=True, cancel_futures=True)

    def _objects(self, pictures: Sequence[tuple[int, Image.Image]]) -> Iterator[Found]:
        if not pictures:
            return
        tensors = [_pixels(image).to(self.loaded.device) for _, image in pictures]
        with torch.inference_mode():
            results = self.detector.detect(tensors)
        for (position, image), objects in zip(pictures, results, strict=True):
            yield Found(position, image, self._that_count(objects))

    def _that_count(self, objects: Objects) -> Objects:
        assert objects.scores is not None
        kept = objects.scores >= self.threshold
        if self.chosen:
            wanted = torch.tensor([list(self.classes).index(name) for name in self.chosen])
            kept &= torch.isin(objects.labels, wanted)
        return rows_of(objects, kept.nonzero()[: self.max_per_image, 0])


def rows_of(objects: Objects, rows: Tensor) -> Objects:
    """Some of the objects; ``presence`` is of the picture and stays."""
    per_object = [field.name for field in fields(Objects) if field.name != "presence"]
    values = {name: getattr(objects, name) for name in per_object}
    return replace(objects, **{name: value[rows] for name, value in values.items() if value is not None})


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _detector_of(loaded: LoadedEncoder) -> Detector:
    module = loaded.module
    if not isinstance(module, Detector):
        raise InputError(
            f"{loaded.name} is an encoder ({loaded.spec.use}) that finds no objects; choose a run or an export of a "
            "detector, as `bowerbird train` makes with the objective detection:detector"
        )
    if not module.classes:
        raise InputError(f"the detector {loaded.name} has no classes yet: train it first")
    return module
