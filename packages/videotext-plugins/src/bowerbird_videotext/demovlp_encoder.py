"""``videotext:demovlp``: videos by the regions of their frames, and captions, in one space that their parts share.

Cai et al., arXiv 2203.07720. B videos, T frames, R regions of a frame, N = T R, L words, P width of the space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bowerbird.batch import Batch
from bowerbird.data.videos import frame_indices
from bowerbird.encoders.bundle import TOKENIZER, WEIGHTS, read_manifest
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.protocols import Features
from bowerbird_videotext.demovlp import RegionEncoder, RegionQAHead, region_word_scores
from bowerbird_videotext.demovlp_config import DemoVLPConfig
from bowerbird_videotext.dual_encoder import TextTower
from bowerbird_videotext.losses import cosine_similarity_matrix
from bowerbird_videotext.region_extractors import build_extractor
from bowerbird_videotext.regions import REGION_KEYS, RegionExtractor, video_regions
from bowerbird_videotext.space_time import inflate_temporal_embedding


class Parts(NamedTuple):
    """A batch of videos or of texts in the shared space, not normalised.

    Attributes:
        whole: ``(B, P)``.
        parts: ``(B, N, P)`` regions, or ``(B, L - 1, P)`` words: the pieces behind the class piece.
        valid: bool ``(B, N)`` or ``(B, L - 1)``.
    """

    whole: Tensor
    parts: Tensor
    valid: Tensor


class DemoVLPEncoder(TextTower):
    """A region encoder and a text encoder whose every output row is projected into one space.

    Takes the regions of videos (``regions``, ``region_geometry``, ``region_valid``; see
    ``bowerbird_videotext.regions``) or videos, whose regions its extractor then finds; pictures are videos of one
    frame. A gallery stores and searches the vectors of whole videos; ``pair_scores`` also compares regions and words.

    Args:
        config: Everything but the extractor.
        extractor: Finds regions; frozen.
    """

    def __init__(self, config: DemoVLPConfig, extractor: RegionExtractor) -> None:
        super().__init__()
        self.config = config
        self.preprocessing, self.frames = config.preprocessing(), config.frames
        self.embed_dim = config.projection_dim
        self.extractor = extractor
        self.region_encoder = RegionEncoder(
            extractor.feature_dim,
            config.embed_dim,
            config.depth,
            config.num_heads,
            config.frames,
            config.projection_dim,
            config.temporal_attention,
            mlp_ratio=config.mlp_ratio,
        )
        self.prepare_texts(config)
        width = config.text_dim if self.text_encoder is None else int(self.text_encoder.embed_dim)  # type: ignore[arg-type]
        self.text_proj = nn.Linear(width, config.projection_dim)
        self.answers: tuple[str, ...] = ()
        self.answer_head: RegionQAHead | None = None
        if config.answers:
            self.open_answers(config.answers)

    @classmethod
    def build(cls, config: DemoVLPConfig) -> Self:
        """Raises ``InputError`` or ``DataError`` for folders and files that do not fit, naming what differs."""
        extractor, stored = build_extractor(config.extractor)
        encoder = cls(config.model_copy(update={"extractor": stored}), extractor)
        if config.weights is not None:
            _load_first_weights(encoder, Path(config.weights), config.inflate)
        return encoder

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in super().stored_config(config).items() if key != "inflate"}
        extractor = self.config.extractor.model_dump(mode="json", exclude_defaults=True)
        if extractor:
            kept["extractor"] = extractor
        if self.answers:
            kept["answers"] = list(self.answers)
        return kept

    def extractor_identity(self) -> str:
        """The settings that decide which regions are found, besides the weights of the extractor."""
        return json.dumps(self.config.extractor.model_dump(mode="json"), sort_keys=True)

    # ---------------------------------------------------------------------------------------------- videos

    def region_entries(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Features, geometry and validity of at most ``frames`` frames: those of the batch, or found in its videos.

        Of more stored frames, the middle one of every part is taken. With boxes that come with the data, ``boxes`` of
        the batch are those of the frames of ``video``.

        Raises:
            InputError: The batch has neither, or shapes do not fit.
        """
        if REGION_KEYS[0] in batch:
            lacking = [key for key in REGION_KEYS if key not in batch]
            if lacking:
                raise InputError(f"the batch has regions, but no {', '.join(lacking)}")
            found = tuple(batch[key] for key in REGION_KEYS)
            if found[0].ndim == 4 and found[0].shape[1] > self.config.frames:
                chosen = torch.from_numpy(frame_indices(found[0].shape[1], self.config.frames)).to(found[0].device)
                found = tuple(value[:, chosen] for value in found)
            return found
        if "video" not in batch and "image" not in batch:
            raise InputError(
                f"the batch has none of regions, video, image and text; it has {', '.join(batch) or 'nothing'}"
            )
        video = batch["video"] if "video" in batch else batch["image"][:, None]
        if video.ndim != 5 or not 1 <= video.shape[1] <= self.config.frames:
            raise InputError(
                f"video has shape {tuple(video.shape)}; expected (B, T, 3, H, W) with T up to {self.config.frames}"
            )
        with torch.no_grad():
            regions = video_regions(self.extractor, video, self.config.regions_per_frame, batch.get("boxes"))
        return regions.features, regions.geometry, regions.valid

    def video_parts(self, batch: Batch) -> Parts:
        """The videos of a batch and their regions. See ``region_entries``."""
        features, geometry, valid = self.region_entries(batch)
        rows = self.region_encoder(features, geometry, valid)
        return Parts(rows[:, 0], rows[:, 1:], valid.flatten(1).bool())

    # ----------------------------------------------------------------------------------------------- texts

    def text_parts(self, text: Mapping[str, Tensor]) -> Parts:
        """Texts and their words. The pieces behind the class piece count as words, ``[SEP]`` among them."""
        if self.text_encoder is None:
            self.ready_tokenizer()  # says what to do
        states = self.text_encoder(text["input_ids"], text["attention_mask"])[-1]  # type: ignore[misc]
        rows = self.text_proj(relu(states))
        return Parts(rows[:, 0], rows[:, 1:], text["attention_mask"][:, 1:].bool())

    # ------------------------------------------------------------------------------------------ comparisons

    def forward(self, batch: Batch) -> Features:
        """Features of the regions, videos or pictures of a batch, else of its texts; ``tokens``: regions or words."""
        visual = any(key in batch for key in (REGION_KEYS[0], "video", "image"))
        found = self.text_parts(batch["text"]) if "text" in batch and not visual else self.video_parts(batch)
        return Features(pooled=found.whole, tokens=found.parts, mask=found.valid)

    def region_word_scores(self, video: Parts, text: Parts) -> Tensor:
        """``(videos, texts)``, see ``bowerbird_videotext.demovlp.region_word_scores``."""
        c = self.config
        return region_word_scores(
            video.parts, text.parts, video.valid, text.valid, c.scale, c.focal, ignore_padding=c.ignore_padding
        )

    def pair_scores(self, video: Batch, text: Batch, *, chunk: int = 8) -> Tensor:
        """Cosine of the wholes plus region-word score of every pair: ``(texts, videos)``, -3 to 3.

        Args:
            video: A batch with regions or videos.
            text: A batch with ``text``, or what ``tokenize`` gives.
            chunk: Videos and texts that are compared at once: memory only.
        """
        if chunk < 1:
            raise InputError(f"chunk = {chunk}: expected 1 or more")
        videos, texts = self.video_parts(video), self.text_parts(text.get("text", text))
        scores = cosine_similarity_matrix(texts.whole, videos.whole)
        columns = []
        for v in range(0, len(videos.whole), chunk):
            some = _rows(videos, v, chunk)
            starts = range(0, len(texts.whole), chunk)
            columns.append(torch.cat([self.region_word_scores(some, _rows(texts, t, chunk)).T for t in starts]))
        return scores + torch.cat(columns, dim=1)

    # -------------------------------------------------------------------------------------------- questions

    def open_answers(self, answers: Sequence[str]) -> None:
        """Make the answer head of a vocabulary. Raises ``RecipeError`` where there is another one already."""
        if self.answer_head is not None:
            if tuple(answers) != self.answers:
                raise RecipeError(
                    f"this encoder knows {len(self.answers)} answers, others than the {len(answers)} of the data; "
                    "leave out encoder.answers"
                )
            return
        if not answers or len(set(answers)) < len(answers):
            raise RecipeError("answers: expected one or more different answers")
        c = self.config
        self.answers = tuple(answers)
        head = RegionQAHead(c.projection_dim, c.projection_dim, len(answers), c.qa_hidden, c.qa_dropout)
        self.answer_head = head.to(self.text_proj.weight.device)

    def answer_logits(self, video: Batch, text: Mapping[str, Tensor]) -> Tensor:
        """``(B, answers)`` for one question about each video. Raises ``InputError`` without an answer head."""
        if self.answer_head is None:
            raise InputError("this encoder answers no questions: train it with the objective's task = 'qa'")
        found, asked = self.video_parts(video), self.text_parts(text)
        rows = torch.cat([asked.whole[:, None], asked.parts.masked_fill(~asked.valid[..., None], -torch.inf)], dim=1)
        logits: Tensor = self.answer_head(rows.amax(dim=1), found.parts, found.valid)
        return logits

    def answer(self, video: Batch, questions: Sequence[str]) -> list[str]:
        """The best answer of the vocabulary to question i about video i.

        Raises:
            InputError: Not as many questions as videos, or no answer head.
        """
        text = {key: value.to(self.text_proj.weight.device) for key, value in self.tokenize(list(questions)).items()}
        logits = self.answer_logits(video, text)
        if len(logits) != len(questions):
            raise InputError(f"{len(questions)} questions about {len(logits)} videos: expected one each")
        return [self.answers[i] for i in logits.argmax(dim=1).tolist()]


def _rows(parts: Parts, start: int, count: int) -> Parts:
    return Parts(*(values[start : start + count] for values in parts))


# ------------------------------------------------------------------------------------------------ first weights


def _load_first_weights(encoder: DemoVLPEncoder, path: Path, inflate: Any) -> None:
    """From a trained ``videotext:demovlp``, or the blocks of the region encoder from a timm ViT.

    Raises ``DataError`` where files are missing, damaged or of another architecture; the message lists what differs.
    """
    for folder in (path, path / "encoder"):
        if not (folder / "encoder.json").is_file():
            continue
        use = read_manifest(folder)["use"]
        if use != "videotext:demovlp":
            raise DataError(f"weights {str(folder)!r} are of {use}; expected a videotext:demovlp, or a ViT's file")
        if encoder.tokenizer is None:
            encoder.load_tokenizer(folder / TOKENIZER)
        state = read_weights(folder / WEIGHTS)
        key = "region_encoder.temporal_embed"
        if key in state:
            state[key] = inflate_temporal_embedding(state[key], encoder.config.frames, inflate)
        if encoder.answer_head is None:  # retrieval from an encoder that answers questions, and the other way round
            state = {name: value for name, value in state.items() if not name.startswith("answer_head.")}
        encoder.load_trained(state, folder)
        return
    load_vit_blocks(encoder.region_encoder, path)


def load_vit_blocks(encoder: RegionEncoder, path: str | Path) -> None:
    """Fill blocks, class token and its position with those of a timm ViT; what concerns regions and time stays.

    Raises:
        DataError: The file cannot be read, or its blocks do not fit; the message lists what differs.
    """
    found = read_weights(path)
    own = encoder.state_dict()
    of_vit = {key: value for key, value in found.items() if key.startswith("blocks.") or key == "cls_token"}
    if "pos_embed" in found:
        of_vit["cls_position"] = found["pos_embed"][:, :1]
    of_regions, of_time = ("temporal_embed", "object_embedding.", "pos_embedding.", "proj."), (".timeattn.", ".norm3.")
    kept = {
        key: value for key, value in own.items() if key.startswith(of_regions) or any(part in key for part in of_time)
    }
    load_strictly(encoder, {**kept, **of_vit}, source=str(path))
