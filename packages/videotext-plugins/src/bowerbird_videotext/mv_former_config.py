"""Settings of MV-Former: its encoder, its training, its data set and its evaluator. Imports pydantic only.

Numbers are those of arXiv 2311.10873 (configuration for Penn Action) where nothing else is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bowerbird_videotext.data_configs import SpritesConfig

Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=1)]


class MVFormerConfig(BaseModel):
    """``videotext:mv-former``, the encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    backbone: str = Field(
        description="Never trained: name of a timm model, folder of an exported encoder or finished run, or an encoder "
        "by name (core:efficientnet-lite?model=lite0). The paper takes vit_base_patch8_224.dino."
    )
    backbone_arguments: dict[str, Any] = Field(
        default={}, description="Other arguments of timm.create_model, of a timm model."
    )
    weights: str | None = Field(default=None, description="File of weights of a timm model (.safetensors or .pth).")
    pretrained: bool | str = Field(
        default=False,
        description="true: timm's default weights; a text: a hub repository.",
    )
    image_size: int | None = Field(default=None, ge=8, le=2048, description="Side of frames; none: the backbone's own.")
    blocks: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        default=(-1,),
        description="Blocks (of a convolutional network: stages) whose outputs are joined, from 0; -1 is the last. All "
        "must have maps of one size.",
    )
    chunk: int = Field(default=40, ge=1, description="Frames that go through the backbone at once.")
    frames: int = Field(default=80, ge=1, description="Frames of a clip in training and where a video is embedded.")
    pool: Literal["tokens", "max", "avg", "cls", "fixed-width"] = Field(
        default="tokens",
        description="tokens: learnt queries; the others are baselines: maximum or mean of the patches, the frame's "
        "global vector, or tokens cut from a linear map of that.",
    )
    num_static: int = Field(default=3, ge=0, description="Entity tokens of a frame; queries that all frames share.")
    num_dynamic: int = Field(default=0, ge=0, description="More of them, with queries made of the frame.")
    dynamic_control: Literal["separate", "first", "average"] = Field(
        default="separate", description="Of which frames: each its own, the first one, or their mean."
    )
    pool_channels: int = Field(default=384, ge=1, description="Width of keys, queries and tokens.")
    value_passthrough: bool = Field(default=False, description="Tokens are means of the patches as they are.")
    normalize_keys: bool = Field(default=False, description="Keys of norm 1.")
    disjoint: bool = Field(default=False, description="A patch counts only for the entity that attends to it most.")
    entity_one_hot: Literal["pool", "enc", "none"] = Field(
        default="pool", description="Where a token is told which entity it is: behind the pooling, before the "
        "transformer, or nowhere.",
    )  # fmt: skip
    reduction: Literal["one", "avg", "max", "lin"] = Field(
        default="one", description="From the tokens of a frame to its embedding: the first, mean, maximum, linear."
    )
    mlp_width: int = Field(default=512, ge=1, description="Of both hidden layers before the transformer.")
    hidden: int = Field(default=256, ge=2, description="Width of the transformer.")
    layers: int = Field(default=3, ge=1, description="Of the transformer.")
    heads: int = Field(default=8, ge=1, description="Of its attention.")
    ffn: int = Field(default=1024, ge=1, description="Width of its perceptrons.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="In perceptrons and transformer.")
    embed_dim: int = Field(default=128, ge=1, description="Width of the embedding of a frame.")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.weights is not None and self.pretrained:
            raise ValueError("weights and pretrained both name weights of the backbone: give one of them")
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} cannot be divided among heads = {self.heads}")
        if not self.blocks or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks = {list(self.blocks)}: expected one or more different blocks")
        if self.num_static + self.num_dynamic < 1:
            raise ValueError("num_static = 0 and num_dynamic = 0: a frame needs a token")
        return self


def penn() -> dict[str, Any]:
    """As published for Penn Action, and for pre-training on Kinetics-400."""
    return {"backbone": "vit_base_patch8_224", "blocks": [3, 7, 11], "frames": 80}


def pouring() -> dict[str, Any]:
    """As published for Pouring."""
    return {"backbone": "vit_base_patch8_224", "blocks": [11], "frames": 240}


def finegym() -> dict[str, Any]:
    """As published for FineGym."""
    return {
        "backbone": "vit_base_patch8_224", "blocks": [9, 10, 11], "frames": 240, "num_static": 6, "reduction": "avg",
        "mlp_width": 1536,
    }  # fmt: skip


def small() -> dict[str, Any]:
    """For small frames on a processor; name a backbone."""
    return {
        "frames": 20, "pool_channels": 32, "mlp_width": 64, "hidden": 64, "layers": 2, "heads": 4, "ffn": 128,
        "embed_dim": 32,
    }  # fmt: skip


class ViewsConfig(BaseModel):
    """How two views of a video are drawn. What is drawn for a view holds for all its frames."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    region: float = Field(
        default=1.5, ge=1, description="A view's frames come from a stretch of 1 to this many times its length."
    )
    region_of: Literal["video", "frames"] = Field(
        default="video", description="Times the video's length (Penn Action), or the clip's frames (FineGym)."
    )
    consistent_offset: Share = Field(
        default=0.2, description="The second view starts within (1 - this) clip lengths of the first one's first frame."
    )
    augment: bool = Field(default=True, description="Change the pictures as below; false: only sample frames.")
    crop: Annotated[tuple[float, float], Field(strict=False)] = Field(
        default=(0.8, 1.0), description="Smallest and largest share of a frame's area that a random crop keeps."
    )
    flip: Share = Field(default=0.5, description="Probability of mirroring left to right.")
    jitter_prob: Share = Field(default=0.8, description="Probability of changing the colours.")
    jitter: Annotated[tuple[float, float, float, float], Field(strict=False)] = Field(
        default=(0.8, 0.8, 0.8, 0.2), description="Largest change of brightness, contrast, saturation, hue."
    )
    blur: Share = Field(default=0.4, description="Probability of a blur.")
    grey: Share = Field(default=0.2, description="Probability of taking the colours away.")

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop = {[low, high]}: expected two shares, 0 < smaller <= larger <= 1")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter = {list(self.jitter)}: expected four numbers from 0, that of hue to 0.5")
        return self


class MVFormerObjectiveConfig(BaseModel):
    """``videotext:mv-former``, the training. The authors clip gradients at 10: ``train.clip_norm``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    loss: Literal["sequence", "cycle"] = Field(
        default="sequence",
        description="sequence: frames of the two views that are near in time are alike; cycle: from a frame to the "
        "other view and back (TCC).",
    )
    temperature: float = Field(default=0.1, gt=0, description="Divides the similarities.")
    variance: float = Field(default=10.0, gt=0, description="Of the target's Gaussian, in frames^2; of sequence.")
    negatives: Literal["single_noself", "single", "batch_noself", "batch"] = Field(
        default="single_noself",
        description="single: frames of the same video; batch: of all; noself: not those of the same view; of sequence.",
    )
    views: ViewsConfig = Field(default_factory=ViewsConfig, description="How the two views are drawn.")
    cache: bool = Field(
        default=False,
        description="Run the backbone once over every frame and keep its features; needs views.augment = false.",
    )
    cache_root: Annotated[Path | None, Field(strict=False)] = Field(
        default=None, description="Folder for that; by default mv-former in $BOWERBIRD_CACHE or ~/.cache/bowerbird."
    )

    @model_validator(mode="after")
    def _what_is_cached_does_not_change(self) -> Self:
        if self.cache and self.views.augment:
            raise ValueError("cache keeps features of pictures as they are: set views.augment = false or cache = false")
        return self


# ------------------------------------------------------------------------------------------------ videotext:phases

PHASE_SPLITS = ("train", "val", "test")
_COUNTS = {"train": 80, "val": 40, "test": 40}


def _with_defaults(value: Any) -> Any:
    return {**_COUNTS, **value} if isinstance(value, dict) else value


def _as_sprites(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


Pair = Annotated[tuple[str, str], Field(strict=False)]


class PhasesConfig(BaseModel):
    """Settings of ``videotext:phases``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    root: Annotated[Path | None, Field(strict=False)] = Field(
        default=None,
        description="Folder to write the videos to; by default phases in $BOWERBIRD_CACHE or ~/.cache/bowerbird.",
    )
    sprites: Annotated[SpritesConfig, BeforeValidator(_as_sprites)] = Field(
        default=SpritesConfig(), description="What moves: a data set, by name or with settings."
    )
    pairs: Annotated[tuple[Pair, ...], Field(strict=False, min_length=1)] = Field(
        default=(("bag", "boot"),), description="Nouns of the two sprites of a video; every pair is an action."
    )
    counts: Annotated[dict[str, int], BeforeValidator(_with_defaults)] = Field(
        default=_COUNTS, description="Videos of the splits train, val and test; the actions take turns."
    )
    size: int = Field(default=48, ge=16, le=1024, multiple_of=2, description="Side of the square video in pixels.")
    sprite_size: Annotated[tuple[int, int], Field(strict=False)] = Field(
        default=(16, 20), description="Smallest and largest longer side of a sprite in pixels."
    )
    frames: int = Field(default=40, ge=8, le=1024, description="Frames of a video.")
    rate: int = Field(default=8, ge=1, le=60, description="Frames per second.")
    seed: int = Field(default=0, ge=0, description="Of sprites, places, and the order and length of the states.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for split, count in self.counts.items():
            if split not in PHASE_SPLITS or count < 1:
                raise ValueError(f"counts: {split} = {count}; expected numbers from 1 of {', '.join(PHASE_SPLITS)}")
        same = [pair for pair in self.pairs if pair[0] == pair[1]]
        if same or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs = {[list(pair) for pair in self.pairs]}: expected different pairs of two nouns")
        low, high = self.sprite_size
        if not 4 <= low <= high or high > self.size // 2 - 2:
            raise ValueError(
                f"sprite_size = {[low, high]}: expected 4 <= smaller <= larger <= {self.size // 2 - 2}, so that a "
                "sprite fits into half of the frame"
            )
        return self


# ------------------------------------------------------------------------------------------------- videotext:dense

Measure = Literal["classification", "progression", "tau", "retrieval"]


class DenseConfig(BaseModel):
    """``videotext:dense``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dataset: str
    """Name of a data set of videos whose frames have phases, for example videotext:phases."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the data set."""
    train_split: str = "train"
    """Videos that the classifier and the regression are fitted on."""
    split: str = "test"
    """Videos that are measured."""
    measures: Annotated[tuple[Measure, ...], Field(min_length=1)] = (
        "classification",
        "progression",
        "tau",
        "retrieval",
    )
    """What is measured; classification and progression read train_split."""
    stride: int = Field(1, ge=1)
    """Every how many frames videos are compared, by tau and retrieval: 2 on Penn Action, 5 on Pouring and FineGym."""
    ks: Annotated[tuple[Whole, ...], Field(min_length=1)] = (5, 10, 15)
    """Numbers of neighbours of a frame, K of AP@K."""
    classifier: Literal["logistic", "sgd"] = "logistic"
    """Of classification. logistic: regression with an L2 penalty; sgd: a linear layer trained as on FineGym, with a
    momentum of 0.9 and a learning rate that falls to 0 along a cosine."""
    c: float = Field(1.0, gt=0)
    """Inverse strength of the penalty, of logistic."""
    epochs: int = Field(50, ge=1)
    """Of sgd."""
    lr: float = Field(1.0, gt=0)
    """Learning rate of the first epoch, of sgd."""
    weight_decay: float = Field(1e-6, ge=0)
    """Of sgd."""
    batch_videos: int = Field(10, ge=1)
    """Videos of a step, of sgd."""
    seed: int = Field(0, ge=0)
    """Of the order of the videos, of sgd."""
    chunk: int = Field(40, ge=1)
    """Frames that are decoded and encoded at once."""
