"""``videotext:moving``: short videos of real pictures that move, with captions that say what moves where.

A program makes every video, its captions, questions and boxes from the settings, the split and the position:
docs/video-data.md describes it. The videos are MP4 files, written when they are first asked for and read back as every
other video. What the program makes for given settings never changes: measured results depend on it.

F frames of a video, K sprites of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.compose import free_place, scaled_to, texture
from bowerbird.errors import InputError, UnknownNameError, did_you_mean
from bowerbird_videotext.data_configs import SPLITS, MovingConfig
from bowerbird_videotext.sprites import MadeVideos, Sprites, cache_folder, performed, write_once
from bowerbird_videotext.video_set import Choice, Question

PROGRAM = 1  # part of the folder's name: another number where the program makes other videos
_MOVES = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
_NOT_PICTURES = ("root", "counts", "choices", "distractor_boxes")  # settings that change no pixel
_TRIES = 40  # places tried for a sprite that shall not cover the other


@dataclass(frozen=True)
class Actor:
    """What one sprite of a video is said to be and to do. ``colour`` and ``verb`` may be empty."""

    colour: str
    noun: str
    verb: str

    @property
    def named(self) -> str:
        words = f"{self.colour} {self.noun}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    @property
    def said(self) -> str:
        return f"{self.named} {self.verb}".strip()


def caption(actors: Sequence[Actor]) -> str:
    """``a red boot moves left while a white shirt stays still``; without verbs ``a red boot and a white shirt``."""
    return (" while " if actors[0].verb else " and ").join(actor.said for actor in actors)


class Moving(MadeVideos):
    """Video i of a split is a function of the settings, the split and i, whatever the number of videos.

    The sprites of a video have different nouns. No two videos of ``val``, and none of ``test``, say the same, in either
    order; ``train`` says the same again once everything was said. No picture moves in two splits. With one sprite a
    video its class is its verb.

    Attributes:
        nouns, colours, verbs: The words of the captions.
    """

    def __init__(self, config: MovingConfig, split: str, nouns: Sequence[str]) -> None:
        """``nouns``: of the classes of the sprites, in order."""
        kept = cache_folder("moving", config.root, config.sprites.source, _settings(config))
        super().__init__(config.sprites, kept / split, split, config.counts[split])
        self.config, self.nouns = config, tuple(nouns)
        self.colours, self.verbs = config.colours, config.verbs
        self.classes = config.verbs if config.objects == 1 else ()
        sayings = self._sayings()
        if split != "train" and len(self._ids) > sayings:
            raise InputError(
                f"videotext:moving: its words make {sayings} different captions, and {split} shall have "
                f"{len(self._ids)}: lower counts.{split}, or take more colours or verbs"
            )

    @classmethod
    def build(cls, config: MovingConfig | None = None, split: str | None = None) -> Self:
        """The videos of ``split`` (default ``train``); none is written yet.

        Raises:
            UnknownNameError: There is no such split.
            DataError: The sprites cannot be had; the message says what to install or to set.
            InputError: More captions are asked for than the words make.
        """
        config = config or MovingConfig()
        split = split or "train"
        if split not in SPLITS:
            raise UnknownNameError(
                f"videotext:moving has no split {split!r}; it has {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        sprites = Sprites(config.sprites, split)
        made = cls(config, split, sprites.nouns)
        made.__dict__["sprites"] = sprites
        return made

    def labels(self) -> Sequence[int]:
        if not self.classes:
            return super().labels()
        return [self.classes.index(self.actors(i)[0].verb) for i in range(len(self))]

    # ------------------------------------------------------------------------------------------------------- words

    def actors(self, index: int) -> list[Actor]:
        """The sprites of video ``index`` in the order of the caption."""
        return self._spoken[index]

    def captions(self, index: int) -> list[str]:
        return [caption(self.actors(index))]

    def multiple_choice(self, index: int) -> Choice | None:
        """``choices`` captions that differ in one word, the same word of all, so that none stands out.

        The word is a colour, a noun or a direction: one of which there are enough. ``None`` where there is none.
        """
        actors = self.actors(index)
        generator = np.random.default_rng([*self._key(index), 2])
        slots = [(i, name, values) for i in range(len(actors)) for name, values in self._others(actors, i).items()]
        slots = [slot for slot in slots if len(slot[2]) >= self.config.choices - 1]
        if not slots:
            return None
        position, name, values = slots[int(generator.integers(len(slots)))]
        chosen = generator.permutation(len(values))[: self.config.choices - 1]
        options = [caption(actors)]
        for value in (values[i] for i in chosen):
            changed = [*actors]
            changed[position] = Actor(**{**vars(actors[position]), name: value})
            options.append(caption(changed))
        order = generator.permutation(len(options)).tolist()
        return [options[i] for i in order], order.index(0)

    def question(self, index: int) -> list[Question]:
        """Of every sprite: ``what`` does this, if only one does; its ``colour``; its ``motion``."""
        asked: list[Question] = []
        actors = self.actors(index)
        verbs = [actor.verb for actor in actors]
        for actor in actors:
            if actor.verb and verbs.count(actor.verb) == 1:
                asked.append((f"what {actor.verb}?", actor.noun, "what"))
            if actor.colour:
                asked.append((f"which colour is the {actor.noun}?", actor.colour, "colour"))
            if actor.verb:
                asked.append((f"what does the {actor.noun} do?", actor.verb, "motion"))
        return asked

    def _others(self, actors: Sequence[Actor], position: int) -> dict[str, list[str]]:
        """What else could be said of a sprite, by changing its colour, its noun or the direction of its verb."""
        actor = actors[position]
        taken = {other.noun for other in actors}
        others = {
            "colour": [one for one in self.colours if one != actor.colour],
            "noun": [one for one in self.nouns if one not in taken],
        }
        if actor.verb in _MOVES:
            others["verb"] = [one for one in self.verbs if one in _MOVES and one != actor.verb]
        return others

    def _counts(self) -> tuple[int, int, int]:
        """Number of colours, verbs, and sets of nouns."""
        nouns = len(self.nouns) if self.config.objects == 1 else len(self.nouns) * (len(self.nouns) - 1) // 2
        return max(1, len(self.colours)), max(1, len(self.verbs)), nouns

    def _sayings(self) -> int:
        """How many different things can be said of a video, whatever the order of its sprites."""
        colours, verbs, nouns = self._counts()
        return nouns * (colours * verbs) ** self.config.objects

    @cached_property
    def _spoken(self) -> list[list[Actor]]:
        """The actors of every video. One stream of random numbers, so that more videos leave the first as they are."""
        generator = np.random.default_rng([self.config.seed, zlib.crc32(self.split.encode())])
        total, said = self._sayings(), set[int]()
        spoken: list[list[Actor]] = []
        while len(spoken) < len(self):
            code, swapped = int(generator.integers(total)), bool(generator.integers(2))
            if len(said) == total:
                said.clear()  # everything was said: from the beginning
            if code in said:
                continue
            said.add(code)
            actors = self._decoded(code)
            spoken.append(actors[::-1] if swapped else actors)
        return spoken

    def _decoded(self, code: int) -> list[Actor]:
        """What number ``code`` of all that can be said says."""
        colours, verbs, _ = self._counts()
        words = []
        for _ in range(self.config.objects):
            code, colour = divmod(code, colours)
            code, verb = divmod(code, verbs)
            words.append((self.colours[colour] if self.colours else "", self.verbs[verb] if self.verbs else ""))
        if self.config.objects == 1:
            chosen = [code]
        else:  # pair number `code` of (0, 1), (0, 2), (1, 2), (0, 3) ...
            second = int((1 + np.sqrt(1 + 8 * code)) // 2)
            second -= second * (second - 1) // 2 > code
            chosen = [code - second * (second - 1) // 2, second]
        return [Actor(colour, self.nouns[noun], verb) for (colour, verb), noun in zip(words, chosen, strict=True)]

    # ------------------------------------------------------------------------------------------------------ videos

    def video(self, index: int) -> str:
        """Path of video ``index``, which is written now if it is not there.

        Several processes may ask for the same: a file appears as a whole, and every process writes the same.

        Raises:
            DataError: It cannot be written.
        """
        path = self.folder / f"{index:06d}.mp4"
        write_once(path, lambda: self.pixels(index), _settings(self.config), self.config.rate, "videotext:moving")
        return str(path)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """``(F, size, size, 3)``, the frames before they are compressed."""
        size = (self.config.size, self.config.size)
        ground = Image.new("RGB", size)
        if self.config.ground == "textured":
            ground = texture(size, np.random.default_rng([*self._key(index), 1]))
        tracks = self._tracks(index)
        frames = np.empty((self.config.frames, *size, 3), np.uint8)
        for f, frame in enumerate(frames):
            canvas = ground.copy()
            for shown, boxes in tracks:
                canvas.paste(shown[f], tuple(boxes[f, :2].tolist()), shown[f].getchannel("A"))
            frame[:] = np.asarray(canvas)
        return frames

    def boxes(self, index: int) -> NDArray[np.float32]:
        """``(F, K + distractor_boxes, 4)``: the sprites in the order of the caption, then boxes that do not move.

        Where sprites meet, the later one hides part of the earlier one; boxes are of the whole. The other boxes are as
        large as sprites and cover little of them.
        """
        sprites = np.stack([boxes for _, boxes in self._tracks(index)], axis=1)
        generator = np.random.default_rng([*self._key(index), 3])
        taken = [(x1, y1, x2, y2) for x1, y1, x2, y2 in sprites.reshape(-1, 4).tolist()]
        side, others = self.config.size, []
        for _ in range(self.config.distractor_boxes):
            low, high = self.config.sprite_size
            width, height = generator.integers(low, high + 1, 2).tolist()
            left, top = free_place((side, side), (width, height), taken, generator)
            others.append((left, top, left + width, top + height))
            taken.append(others[-1])
        still = np.broadcast_to(np.reshape(others, (1, -1, 4)), (self.config.frames, len(others), 4))
        return np.concatenate([sprites, still], axis=1).astype(np.float32)

    def _tracks(self, index: int) -> list[tuple[list[Image.Image], NDArray[np.int64]]]:
        """Of every sprite its RGBA picture in each frame, and its boxes ``(F, 4)``; the last sprite is in front."""
        generator = np.random.default_rng([*self._key(index), 0])
        low, high = self.config.sprite_size
        tracks: list[tuple[list[Image.Image], NDArray[np.int64]]] = []
        for actor in self.actors(index):
            sprite = self.sprites.picture(self.nouns.index(actor.noun), actor.colour, generator)
            sprite = scaled_to(sprite, int(generator.integers(low, high + 1)))
            shown = performed(sprite, actor.verb, self.config.frames, self.config.size)
            tracks.append((shown, self._placed(shown, actor.verb, [boxes for _, boxes in tracks], generator)))
        return tracks

    def _placed(
        self,
        shown: Sequence[Image.Image],
        verb: str,
        taken: Sequence[NDArray[np.int64]],
        generator: np.random.Generator,
    ) -> NDArray[np.int64]:
        """The boxes ``(F, 4)`` of a random way across the canvas that covers the least of ``taken``."""
        sizes = np.array([picture.size for picture in shown])
        room = self.config.size - sizes.max(axis=0)  # places of the upper left corner of the largest
        direction = np.array(_MOVES.get(verb, (0, 0)))
        phase = np.linspace(0, 1, len(shown))[:, None]
        best, least = np.zeros((len(shown), 4), np.int64), np.inf
        for _ in range(_TRIES):
            far = room * np.abs(direction)
            way = direction * generator.uniform(far / 2, far)  # half of the room at least
            start = generator.uniform(np.maximum(0, -way), room - np.maximum(0, way))
            centre = start + way * phase + sizes.max(axis=0) / 2
            corner = np.rint(centre - sizes / 2).astype(np.int64).clip(0, self.config.size - sizes)
            boxes = np.concatenate([corner, corner + sizes], axis=1)
            covered = sum(_shared(boxes, others) for others in taken)
            if covered < least:
                best, least = boxes, covered
            if not covered:
                break
        return best

    def _key(self, index: int) -> list[int]:
        return [self.config.seed, zlib.crc32(self.split.encode()), index]


def _shared(boxes: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """Pixels of ``boxes`` ``(F, 4)`` that ``others`` cover in the same frames."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    return int(sides.clip(0).prod(axis=1).sum())


def _settings(config: MovingConfig) -> dict[str, Any]:
    """What decides the pixels of the videos."""
    plain = config.model_dump(mode="json", exclude=set(_NOT_PICTURES))
    return {"program": PROGRAM, **plain}
