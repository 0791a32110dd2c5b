"""Settings of data sets of videos and of their augmentation. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class ClipAugmentation(BaseModel):
    """How a clip of a few frames is drawn from a video for training. What is drawn holds for all its frames."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sampling: Literal["random", "uniform"] = Field(
        default="random", description="A random frame of every part of the video, or the middle one."
    )
    crop: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(1.0, 1.0),
        description="Smallest and largest share of a frame's area that a random crop keeps; the papers take 0.5 to 1. "
        "1 and 1: no crop.",
    )
    crop_ratio: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(3 / 4, 4 / 3), description="Smallest and largest ratio of the sides of a crop."
    )
    flip: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Probability of mirroring left to right. The papers take 0.5; captions that say left or right "
        "become wrong by it.",
    )

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop = {[low, high]}: expected two shares, 0 < smaller <= larger <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {[low, high]}: expected two ratios, 0 < smaller <= larger")
        return self


# ---------------------------------------------------------------------------------------------------------- moving

SPLITS = ("train", "val", "test")
COLOURS = {
    "red": (255, 40, 40), "green": (40, 220, 60), "blue": (70, 100, 255), "white": (255, 255, 255),
    "yellow": (255, 230, 40), "pink": (255, 110, 210), "orange": (255, 150, 30), "cyan": (40, 230, 230),
}  # fmt: skip
VERBS = ("moves left", "moves right", "moves up", "moves down", "stays still", "grows", "shrinks", "spins")
_COUNTS = {"train": 3000, "val": 256, "test": 256}


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _as_sprites(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _with_defaults(value: Any) -> Any:
    return {**_COUNTS, **value} if isinstance(value, dict) else value


Names = Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(_as_list)]


class SpritesConfig(BaseModel):
    """The data set whose pictures move, and what they are called."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(default="core:fashion-mnist", description="Data set of pictures, NAME or NAME?key=value.")
    split: str | None = Field(default=None, description="Its split; by default the one it gives unasked.")
    paper: Literal["dark", "light"] = Field(default="dark", description="What its pictures are drawn on.")
    class_key: str | None = Field(
        default=None, description="Take the class from this entry of the source's metadata instead of its label."
    )
    names: dict[str, str] = Field(
        default={"t-shirt": "tee", "ankle-boot": "boot"},
        description="Class -> noun, where captions shall not say the name of the class.",
    )


class MovingConfig(BaseModel):
    """Settings of ``videotext:moving``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    root: Annotated[Path | None, Field(strict=False)] = Field(
        default=None,
        description="Folder to write the videos to; by default moving in $BOWERBIRD_CACHE or ~/.cache/bowerbird.",
    )
    sprites: Annotated[SpritesConfig, BeforeValidator(_as_sprites)] = Field(
        default=SpritesConfig(), description="What moves: a data set, by name or with settings."
    )
    counts: Annotated[dict[str, int], BeforeValidator(_with_defaults)] = Field(
        default=_COUNTS, description="Videos of the splits train, val and test."
    )
    objects: Literal[1, 2] = Field(default=2, description="Sprites of a video.")
    colours: Names = Field(
        default=("red", "green", "blue", "white"),
        description=f"Of {', '.join(COLOURS)}; none: sprites keep their own colours and captions name none.",
    )
    verbs: Names = Field(
        default=VERBS[:6],
        description=f"Of {', '.join(VERBS)}; none: nothing moves, and captions have no verb.",
    )
    size: int = Field(default=32, ge=16, le=1024, multiple_of=2, description="Side of the square video in pixels.")
    sprite_size: Annotated[tuple[int, int], Field(strict=False), BeforeValidator(_as_pair)] = Field(
        default=(12, 16), description="Smallest and largest longer side of a sprite in pixels."
    )
    frames: int = Field(default=8, ge=2, le=1024, description="Frames of a video.")
    rate: int = Field(default=8, ge=1, le=60, description="Frames per second.")
    ground: Literal["plain", "textured"] = Field(default="plain", description="Black, or another texture every time.")
    choices: int = Field(default=4, ge=2, description="Options of a multiple choice.")
    distractor_boxes: int = Field(
        default=0, ge=0, le=64, description="Boxes of every frame that show no sprite, after those of the sprites."
    )
    seed: int = Field(default=0, ge=0, description="Of words, sprites, places and sizes.")

    @model_validator(mode="after")
    def _words_are_known(self) -> Self:
        for name, known in (("colours", tuple(COLOURS)), ("verbs", VERBS)):
            values = getattr(self, name)
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"{name}: {unknown[0]!r} is not known; there are {', '.join(known)}")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} = {list(values)}: a word is there more than once")
        for split, count in self.counts.items():
            if split not in SPLITS or count < 1:
                raise ValueError(f"counts: {split} = {count}; expected numbers from 1 of {', '.join(SPLITS)}")
        low, high = self.sprite_size
        if not 4 <= low <= high or high > self.size * 3 // 4:
            raise ValueError(
                f"sprite_size = {[low, high]}: expected 4 <= smaller <= larger <= {self.size * 3 // 4}, three quarters "
                "of size, so that there is room to move"
            )
        return self


def digits() -> dict[str, Any]:
    """Handwritten digits of scikit-learn: nothing to install or download."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return {"sprites": {"source": "core:digits", "names": {str(i): name for i, name in enumerate(names)}}}


def emoji() -> dict[str, Any]:
    """Emoji of hundreds of concepts in their own colours; test shows a style that train does not. Needs
    ``bowerbird-emoji``."""
    return {
        "sprites": {"source": "emoji:styles", "paper": "light", "names": {}},
        "colours": [], "size": 64, "sprite_size": [20, 28],
    }  # fmt: skip


def single() -> dict[str, Any]:
    """One sprite a video, which has the class of its verb: for the recognition of actions."""
    return {"objects": 1, "counts": {"val": 128, "test": 128}}


def still() -> dict[str, Any]:
    """Nothing moves, captions have no verb, and four boxes a frame show no sprite: for methods that read regions."""
    return {"verbs": [], "distractor_boxes": 4}


def rich() -> dict[str, Any]:
    """Eight colours, eight verbs, textured grounds, 64 pixels."""
    return {
        "colours": list(COLOURS), "verbs": list(VERBS), "size": 64, "sprite_size": [20, 30], "ground": "textured",
    }  # fmt: skip


# --------------------------------------------------------------------------------------- the user's own videos


class _VideosConfig(BaseModel):
    """What data sets of the user's own videos share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: Literal["headers", "files"] = Field(
        default="headers",
        description="Before the first video is used: read the packets of every one, without decoding, or only see that "
        "it is there. Damage inside a frame is found where it is decoded.",
    )
    skip_unreadable: bool = Field(
        default=False, description="Leave bad rows and videos out, with a warning, instead of ending with the first."
    )
    report: Path | None = Field(
        default=None, description="File to write everything that was left out to, one JSON object a line."
    )


class VideoTableConfig(_VideosConfig):
    """Settings of ``videotext:table``."""

    root: Path = Field(description="Folder of the videos.")
    table: str | None = Field(
        default=None,
        description="Table below root with a row for every caption: .csv, .tsv, .jsonl or .parquet; {split} stands for "
        "the split. Without one the captions of NAME.mp4 are the lines of NAME.txt beside it.",
    )
    videos: str = Field(default="", description="Folder of the videos below root; {split} stands for the split.")
    video: str = Field(default="video", description="Column of the video's path; its ending may be left out.")
    caption: str = Field(default="caption", description="Column of the caption, or of a list of captions.")
    split_column: str = Field(default="split", description="Column of the split; needed where a split is asked for.")
    item_id: str | None = Field(default=None, description="Column of the id; by default the path, and the moment.")
    start: str | None = Field(default=None, description="Column of the second at which the moment starts.")
    end: str | None = Field(default=None, description="Column of the second at which it ends.")
    label: str | None = Field(default=None, description="Column of the class.")
    keep: Names = Field(default=(), description="Columns whose values the items shall have, under the same names.")
    captions: Literal["required", "optional"] = Field(
        default="required", description="Whether a video without a caption is an error."
    )


class _BenchmarkConfig(_VideosConfig):
    root: Path = Field(description="Folder of the annotations.")
    videos: Path | None = Field(
        default=None, description="Folder below which the videos are, in any folders; by default root."
    )


class MsrVttConfig(_BenchmarkConfig):
    """Settings of ``videotext:msr-vtt``."""

    protocol: Literal["1k-A", "7k", "full"] = Field(
        default="1k-A",
        description="1k-A: 9,000 videos for training, 1,000 for test with one caption each; 7k: the same test, 7,010 "
        "for training; full: 6,513, 497 and 2,990 videos with all captions.",
    )


class DiDeMoConfig(_BenchmarkConfig):
    """Settings of ``videotext:didemo``."""

    captions: Literal["concatenated", "separate", "moments"] = Field(
        default="concatenated",
        description="The descriptions of a video joined into one caption; several captions; or each description with "
        "its moment of the video.",
    )


class LsmdcConfig(_BenchmarkConfig):
    """Settings of ``videotext:lsmdc``."""


class MsvdConfig(_BenchmarkConfig):
    """Settings of ``videotext:msvd``."""

    language: str = Field(default="English", description="Of the descriptions, where the file has several.")
