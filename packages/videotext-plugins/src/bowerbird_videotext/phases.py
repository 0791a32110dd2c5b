"""``videotext:phases``: videos of two real pictures that change places, with the state of every frame.

A sprite is in the left or in the right half: two sprites have four states, which come in a random order, so that the
time of a frame does not say its state, and neither does where something is, but what is where. Made to study embeddings
of frames where no annotated videos are at hand. A program makes every video from the settings, the split and the
position (docs/methods/mv-former.md); what it makes for given settings never changes.

F frames of a video.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.compose import scaled_to
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird_videotext.mv_former_config import PHASE_SPLITS, PhasesConfig
from bowerbird_videotext.sprites import MadeVideos, cache_folder, write_once
from bowerbird_videotext.video_set import VideoTextSet

PROGRAM = 1  # part of the folder's name: another number where the program makes other videos
PHASES = ("both left", "left and right", "right and left", "both right")  # where the first and the second sprite are
_NOT_PICTURES = ("root", "counts")  # settings that change no pixel
_TRIES = 30  # places tried for a sprite that shall not cover the other


class Phases(MadeVideos):
    """Video i of a split is a function of the settings, the split and i. No picture moves in two splits.

    The class of a video is its action: which two things move.
    """

    phases = PHASES

    def __init__(self, config: PhasesConfig, split: str) -> None:
        kept = cache_folder("phases", config.root, config.sprites.source, _settings(config))
        super().__init__(config.sprites, kept / split, split, config.counts[split])
        self.config = config
        self.classes = tuple(" and ".join(pair) for pair in config.pairs)

    @classmethod
    def build(cls, config: PhasesConfig | None = None, split: str | None = None) -> Self:
        """The videos of ``split`` (default ``train``); none is written yet.

        Raises:
            UnknownNameError: There is no such split, or no sprite of a noun.
            DataError: The sprites cannot be had; the message says what to install or to set.
        """
        config = config or PhasesConfig()
        split = split or "train"
        if split not in PHASE_SPLITS:
            raise UnknownNameError(
                f"videotext:phases has no split {split!r}; it has {', '.join(PHASE_SPLITS)}."
                f"{did_you_mean(split, PHASE_SPLITS)}"
            )
        made = cls(config, split)
        nouns = made.sprites.nouns
        for noun in (noun for pair in config.pairs for noun in pair):
            if noun not in nouns:
                raise UnknownNameError(
                    f"videotext:phases: no sprite is called {noun!r} (pairs); there are {', '.join(nouns)}."
                    f"{did_you_mean(noun, nouns)}"
                )
        return made

    def labels(self) -> Sequence[int]:
        return [i % len(self.classes) for i in range(len(self))]

    def captions(self, index: int) -> list[str]:
        first, second = self._pair(index)
        return [f"a {first} and a {second} change places"]

    def video(self, index: int) -> str:
        """Path of video ``index``, which is written now if it is not there. Raises ``DataError`` where it cannot be."""
        path = self.folder / f"{index:06d}.mp4"
        write_once(path, lambda: self.pixels(index), _settings(self.config), self.config.rate, "videotext:phases")
        return str(path)

    def frame_labels(self, index: int) -> NDArray[np.int64]:
        """``(F,)``, position in ``phases`` of every frame: in which half the middles of the sprites are."""
        right = self._centres(index)[:, :, 0] >= self.config.size / 2
        return (2 * right[0] + right[1]).astype(np.int64)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """``(F, size, size, 3)``, the frames before they are compressed; the second sprite is in front."""
        sprites, centres = self._shown(index), self._centres(index)
        frames = np.empty((self.config.frames, self.config.size, self.config.size, 3), np.uint8)
        for f, frame in enumerate(frames):
            canvas = Image.new("RGB", (self.config.size, self.config.size))
            for sprite, way in zip(sprites, centres, strict=True):
                corner = np.rint(way[f] - np.array(sprite.size) / 2).astype(np.int64).tolist()
                canvas.paste(sprite, tuple(corner), sprite.getchannel("A"))
            frame[:] = np.asarray(canvas)
        return frames

    def _pair(self, index: int) -> tuple[str, str]:
        return self.config.pairs[index % len(self.config.pairs)]

    def _shown(self, index: int) -> list[Image.Image]:
        """The two sprites, RGBA."""
        generator = np.random.default_rng([*self._key(index), 0])
        low, high = self.config.sprite_size
        shown = []
        for noun in self._pair(index):
            sprite = self.sprites.picture(self.sprites.nouns.index(noun), "", generator)
            shown.append(scaled_to(sprite, int(generator.integers(low, high + 1))))
        return shown

    def _centres(self, index: int) -> NDArray[np.float64]:
        """``(2, F, 2)``, x and y of the middles of the sprites.

        Each of the four states lasts an eighth of the video or more. In its first frames the sprites glide to new
        places in the halves that it asks for.
        """
        generator = np.random.default_rng([*self._key(index), 1])
        sizes = np.array([sprite.size for sprite in self._shown(index)], np.float64)
        total = self.config.frames
        least = total // 8
        lengths = least + generator.multinomial(total - 4 * least, np.full(4, 0.25))
        centres = np.empty((2, total, 2))
        places, start = None, 0
        for state, length in zip(generator.permutation(4).tolist(), lengths.tolist(), strict=True):
            wanted = self._places(state, sizes, generator)
            # At least one frame of a state lies behind its glide.
            glide = int(generator.integers(0, max(1, min(total // 8, length - 1)) + 1)) if places is not None else 0
            origin = wanted if places is None else places
            share = np.minimum(np.arange(1, length + 1) / max(1, glide), 1.0)[None, :, None]
            centres[:, start : start + length] = origin[:, None] + share * (wanted - origin)[:, None]
            places, start = wanted, start + length
        return centres

    def _places(self, state: int, sizes: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        """``(2, 2)``: middles of sprites in the halves that ``state`` says; of random ones those that meet least."""
        middle = self.config.size / 2
        low, high = sizes / 2, self.config.size - sizes / 2
        for sprite, right in enumerate((state // 2, state % 2)):
            (low if right else high)[sprite, 0] = middle + (1 if right else -1)
        best, least = low, np.inf
        for _ in range(_TRIES):
            found = generator.uniform(low, high)
            meeting = (sizes.mean(axis=0) - np.abs(found[0] - found[1])).clip(0).prod()
            if meeting < least:
                best, least = found, meeting
            if not meeting:
                break
        return best

    def _key(self, index: int) -> list[int]:
        if not 0 <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        return [self.config.seed, zlib.crc32(self.split.encode()), index]


def frame_labels(dataset: VideoTextSet, index: int, asked_by: str) -> NDArray[np.int64]:
    """The phases of the frames of video ``index``. Raises ``InputError`` for data sets that do not have them."""
    found = getattr(dataset, "frame_labels", None)
    if found is None:
        raise InputError(
            f"{asked_by} needs videos whose frames have phases, a data set with frame_labels(index), such as "
            f"videotext:phases; {type(dataset).__name__} has none"
        )
    return np.asarray(found(index), np.int64)


def _settings(config: PhasesConfig) -> dict[str, Any]:
    """What decides the pixels of the videos."""
    return {"program": PROGRAM, **config.model_dump(mode="json", exclude=set(_NOT_PICTURES))}
