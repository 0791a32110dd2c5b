"""Settings of data sets with objects, of their augmentation and of their evaluators. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Pair = Annotated[tuple[int, int], Field(strict=False), BeforeValidator(_as_pair)]


def _as_source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class ItemSource(BaseModel):
    """A data set whose items are shown, and what their classes are."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(default="core:digits", description="Data set of the items, NAME or NAME?key=value.")
    splits: dict[str, str] = Field(
        default={}, description="Split of the canvases -> split of the source, where that has another name."
    )
    paper: Literal["dark", "light"] = Field(default="dark", description="What the source's items are drawn on.")
    class_key: str | None = Field(
        default=None, description="Take the class from this entry of the source's metadata instead of its label."
    )


class CanvasesConfig(BaseModel):
    """Settings of ``detection:canvases``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    sources: Annotated[
        tuple[Annotated[ItemSource, BeforeValidator(_as_source)], ...],
        Field(min_length=1, strict=False),
        BeforeValidator(_as_list),
    ] = Field(
        default=(ItemSource(),),
        description="Data sets of the items, by name or with settings; their classes are put one after the other.",
    )
    count: int = Field(default=200, ge=1, description="Canvases of every split.")
    counts: dict[str, int] = Field(default={}, description="Split -> canvases, where there shall be another number.")
    canvas_size: Pair = Field(
        default=(64, 64), description="Smallest and largest side in pixels; height and width are drawn for each canvas."
    )
    items: Pair = Field(default=(1, 4), description="Fewest and most objects on a canvas that is not empty.")
    item_size: Pair = Field(default=(12, 24), description="Smallest and largest longer side of an object in pixels.")
    tail: float = Field(
        default=1.0,
        ge=1,
        description="Objects of the most frequent class over those of the rarest; between them numbers fall "
        "geometrically in the order of the classes. 1: all classes alike.",
    )
    tail_order: Literal["index", "shuffled"] = Field(
        default="index", description="Which classes are frequent: the first ones, or (shuffled) chosen by the seed."
    )
    balanced_splits: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=("test",), description="Splits that have no long tail."
    )
    empty: float = Field(default=0.0, ge=0, lt=1, description="Share of canvases without objects.")
    distractors: Pair = Field(
        default=(0, 0), description="Fewest and most scrambled items on a canvas, which are no objects."
    )
    keypoints: bool = Field(default=True, description="Top, bottom, left and right end of every object.")
    seed: int = Field(default=0, ge=0, description="Of items, places, sizes and textures.")

    @model_validator(mode="after")
    def _items_fit(self) -> Self:
        for name, least in (("canvas_size", 8), ("items", 1), ("item_size", 1), ("distractors", 0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(f"{name} = {[low, high]}: expected two whole numbers, {least} <= smaller <= larger")
        small, most = self.canvas_size[0], self.items[1] + self.distractors[1]
        if self.item_size[1] > small or most * self.item_size[1] ** 2 > small**2:
            raise ValueError(
                f"items = {list(self.items)}, distractors = {list(self.distractors)}, item_size = "
                f"{list(self.item_size)}: {most} items of {self.item_size[1]} pixels do not fit on a canvas of "
                f"{small} pixels (canvas_size)"
            )
        return self


def fashion() -> dict[str, Any]:
    """Clothes of Fashion-MNIST, which must be installed."""
    return {"sources": [{"source": "core:fashion-mnist"}], "canvas_size": 96, "item_size": [20, 36]}


def emoji() -> dict[str, Any]:
    """Emoji in eight categories, other concepts in the test split. Needs ``bowerbird-emoji``."""
    return {
        "sources": [
            {
                "source": "emoji:styles", "splits": {"train": "seen", "test": "unseen"}, "paper": "light",
                "class_key": "category",
            }
        ],
        "canvas_size": 96,
        "item_size": [20, 40],
    }  # fmt: skip


def mixed() -> dict[str, Any]:
    """Digits, clothes and emoji together: 28 classes. Needs Fashion-MNIST and ``bowerbird-emoji``."""
    return {
        "sources": [{"source": "core:digits"}, *fashion()["sources"], *emoji()["sources"]],
        "canvas_size": 96,
        "item_size": [20, 36],
    }


Sides = Annotated[
    tuple[Annotated[int, Field(ge=1, le=8192)], ...],
    Field(strict=False),
    BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
]
Range = Annotated[tuple[float, float], Field(strict=False)]


class AugmentationConfig(BaseModel):
    """How pictures are changed, in this order. By default they are only mirrored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    iou_crop: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of pictures that are cropped so that an object stays in by a random part (SSD's crop).",
    )
    short_side: Sides = Field(
        default=(), description="Resize so that the shorter side has one of these numbers of pixels, at random."
    )
    max_side: int | None = Field(
        default=None, ge=1, le=8192, description="With short_side: the longer side has no more pixels than this."
    )
    scale_jitter: Range | None = Field(
        default=None,
        description="Smallest and largest factor: a picture is resized to fit in target_size times a random one.",
    )
    target_size: int | None = Field(
        default=None, ge=1, le=8192, description="With scale_jitter: side of a square; what is larger is cropped to it."
    )
    flip: float = Field(default=0.5, ge=0, le=1, description="Share of pictures that are mirrored left to right.")
    photometric: float = Field(
        default=0.0, ge=0, le=1, description="Share of pictures whose brightness, contrast, colours change."
    )
    min_side: float = Field(
        default=1.0, gt=0, description="Objects of fewer pixels than this on a side, after all this, are left out."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scale_jitter is not None:
            if not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
                raise ValueError(f"scale_jitter = {list(self.scale_jitter)}: expected 0 < smallest <= largest factor")
            if self.short_side:
                raise ValueError("short_side and scale_jitter both resize a picture: set one of them")
        if (self.scale_jitter is None) != (self.target_size is None):
            raise ValueError("scale_jitter and target_size belong together: set both or neither")
        if self.max_side is not None and (not self.short_side or self.max_side < max(self.short_side)):
            raise ValueError(
                f"max_side = {self.max_side} limits what short_side resizes: set short_side, none above it"
            )
        return self


class MultiLabelConfig(BaseModel):
    """Settings of ``detection:multi-label``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str = Field(description="Data set whose pictures have objects.")
    split: str | None = Field(default=None, description="Which part of it.")
    settings: dict[str, Any] = Field(default={}, description="Of the data set.")
    groups_split: str | None = Field(
        default=None, description="Also report by how frequent classes are in this split, such as train."
    )
    rare_up_to: int = Field(default=10, ge=0, description="Most pictures of a rare class.")
    common_up_to: int = Field(default=100, ge=0, description="Most pictures of a common class.")
    per_class: bool = Field(default=False, description="Also report every class.")
    batch_size: int = Field(default=8, ge=1, description="Pictures at once.")


class CocoAPConfig(MultiLabelConfig):
    """Settings of ``detection:coco-ap``."""

    kinds: Annotated[tuple[Literal["box", "mask", "keypoint"], ...], Field(strict=False)] | None = Field(
        default=None, description="What to measure; by default all that the data have and the detector finds."
    )
    max_detections: int = Field(default=100, ge=1, description="Best ones of a picture that count; LVIS has 300.")
    area_sides: Range = Field(
        default=(32.0, 96.0), description="Sides of the squares that divide small, medium and large objects, in pixels."
    )
    keypoint_sigmas: float | Annotated[tuple[float, ...], Field(strict=False)] = Field(
        default=0.05,
        description="Width of every keypoint, in parts of the object's size (square root of its area); one number for "
        "all, but COCO's own where there are 17 keypoints.",
    )
    lvis: bool = Field(
        default=False, description="Judge a picture by the classes that were verified in it, as LVIS annotates them."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not 0 < self.area_sides[0] <= self.area_sides[1]:
            raise ValueError(f"area_sides = {list(self.area_sides)}: expected 0 < small <= large")
        return self


class AnnotatedConfig(BaseModel):
    """What readers of annotation files do with what is wrong in them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path = Field(description="Folder that holds annotations and pictures.")
    classes: Annotated[tuple[str, ...] | None, BeforeValidator(_as_list)] = Field(
        default=None, min_length=1, description="Only these classes, in this order; by default all."
    )
    masks: bool = Field(default=True, description="Read the masks, where there are some.")
    bad: Literal["drop", "raise"] = Field(
        default="drop", description="A bad entry is left out and reported, or ends the reading."
    )
    empty: Literal["keep", "drop"] = Field(default="keep", description="Pictures without objects.")
    check: Literal["sizes", "files", "none"] = Field(
        default="sizes",
        description="Before the first picture is used: read the header of every picture and compare its size; only see "
        "that it is there; or trust the file.",
    )
    report: Path | None = Field(default=None, description="File to write everything bad to, one JSON object a line.")

    @model_validator(mode="after")
    def _classes_are_distinct(self) -> Self:
        if len(set(self.classes or ())) < len(self.classes or ()):
            raise ValueError(f"classes = {list(self.classes or ())}: a name is there more than once")
        return self


class CocoConfig(AnnotatedConfig):
    """Settings of ``detection:coco``."""

    annotations: str = Field(
        default="annotations/instances_{split}.json", description="The annotation file below root, by split."
    )
    images: str = Field(default="{split}", description="The folder of pictures below root, by split.")
    keypoints: bool = Field(default=True, description="Read the keypoints, where there are some.")


def lvis() -> dict[str, Any]:
    """LVIS v1 beside COCO's folders of pictures; splits ``train`` and ``val``."""
    return {"annotations": "lvis_v1_{split}.json", "images": ""}


def person_keypoints() -> dict[str, Any]:
    """COCO's persons with their 17 keypoints; splits ``train2017`` and ``val2017``."""
    return {"annotations": "annotations/person_keypoints_{split}.json"}


class VocConfig(AnnotatedConfig):
    """Settings of ``detection:voc``. ``root`` holds the folders Annotations, JPEGImages and ImageSets."""

    masks: bool = Field(default=False, description="Read the masks of SegmentationObject.")
    image_set: str = Field(
        default="ImageSets/Main/{split}.txt",
        description="The file of a split below root: one name of a picture a line.",
    )
    difficult: Literal["crowd", "keep", "drop"] = Field(
        default="crowd",
        description="Objects that are marked difficult: neither right nor wrong, as any other, or left out.",
    )
