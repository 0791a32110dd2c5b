"""``videotext:demovlp``: align videos with captions and their regions with words, or answer questions about videos.

Cai et al., arXiv 2203.07720. The loss is that of one process's own batch, as in the released code.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bowerbird import dist
from bowerbird.batch import Batch
from bowerbird.cli.parts import progress_bar
from bowerbird.data.videos import frame_indices
from bowerbird.errors import InputError, RecipeError
from bowerbird.protocols import BuildContext, Encoder, ItemTransform, LossOutput, Objective
from bowerbird_videotext.contrastive import pair_accuracy
from bowerbird_videotext.data_configs import ClipAugmentation
from bowerbird_videotext.demovlp import region_word_alignment_loss
from bowerbird_videotext.demovlp_config import DemoVLPObjectiveConfig
from bowerbird_videotext.demovlp_encoder import DemoVLPEncoder
from bowerbird_videotext.losses import cosine_similarity_matrix, symmetric_info_nce
from bowerbird_videotext.region_cache import RegionCache, cache_regions
from bowerbird_videotext.transforms import ClipTransform
from bowerbird_videotext.video_set import video_text_set

UNKNOWN = -100  # label of an answer outside the vocabulary: it does not count


class DemoVLPObjective(Objective):
    """Contrastive loss of whole videos and captions plus the alignment loss of regions and words.

    With ``task = "qa"``: cross-entropy over the answers of the encoder.

    Args:
        encoder: With its tokenizer, and with answers for ``qa``.
        config: Temperatures, weights and task.
        views: What makes entries in the processes that read the data; ``None`` where only tensors come.
    """

    encoder: DemoVLPEncoder

    def __init__(
        self,
        encoder: DemoVLPEncoder,
        config: DemoVLPObjectiveConfig | None = None,
        *,
        views: ItemTransform | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.config, self.views = encoder, config or DemoVLPObjectiveConfig(), views
        if encoder.answer_head is not None:  # without questions it gets no gradient, for which DDP would wait
            encoder.answer_head.requires_grad_(self.config.task == "qa")

    @classmethod
    def build(cls, config: DemoVLPObjectiveConfig, encoder: Encoder, context: BuildContext) -> Self:
        """Extracts regions first where a cache is asked for.

        Raises:
            RecipeError: Another encoder, data without captions or questions, or settings that do not fit.
            DataError: A video cannot be read.
        """
        if not isinstance(encoder, DemoVLPEncoder):
            raise RecipeError(f"encoder: videotext:demovlp trains videotext:demovlp, not a {type(encoder).__name__}")
        if context.dataset is None:
            raise RecipeError("videotext:demovlp: there is no data set of videos with captions")
        if encoder.tokenizer is None:
            encoder.open(_texts(context))
        if config.task == "qa":
            encoder.open_answers(_answers(config, context))
        cache = None
        if config.region_cache is not None:
            cache = _cached(config, encoder, context)
        elif encoder.extractor.takes_boxes:
            raise RecipeError(
                "encoder.extractor.boxes = 'given': boxes come with whole videos, so training needs the regions of all "
                "frames beforehand; set objective.region_cache to a folder"
            )
        views = VideoEntries(encoder, config, context, cache)
        return cls(encoder, config, views=views)

    def item_transform(self) -> ItemTransform | None:
        return self.views

    def forward(self, batch: Batch) -> LossOutput:
        """Reads ``regions``, ``region_geometry`` and ``region_valid`` (or ``video``) and ``text``; for ``qa`` also
        ``answer``, int64 ``(B,)``, -100 where it is not in the vocabulary."""
        if "text" not in batch:
            raise InputError(f"the batch needs text; it has {', '.join(batch) or 'nothing'}")
        return self._answers(batch) if self.config.task == "qa" else self._pairs(batch)

    def _pairs(self, batch: Batch) -> LossOutput:
        c = self.config
        videos, texts = self.encoder.video_parts(batch), self.encoder.text_parts(batch["text"])
        if len(videos.whole) != len(texts.whole):
            raise InputError(f"{len(texts.whole)} texts and {len(videos.whole)} videos are no pairs")
        similarity = cosine_similarity_matrix(texts.whole, videos.whole)
        parts = {"global": symmetric_info_nce(similarity, c.temperature)}
        total = parts["global"]
        if c.alignment_weight > 0:
            scores = self.encoder.region_word_scores(videos, texts)
            parts["alignment"] = region_word_alignment_loss(scores, c.alignment_scale)
            total = total + c.alignment_weight * parts["alignment"]
        return LossOutput(total=total, parts=parts, stats={"batch_accuracy": pair_accuracy(similarity)})

    def _answers(self, batch: Batch) -> LossOutput:
        logits = self.encoder.answer_logits(batch, batch["text"])
        answer: Tensor = batch["answer"]
        known = answer != UNKNOWN
        # A sum, so that a batch without any known answer has a loss of 0, with gradients.
        total = cross_entropy(logits.float(), answer, ignore_index=UNKNOWN, reduction="sum") / known.sum().clamp(min=1)
        right = ((logits.argmax(dim=1) == answer) & known).float().mean()
        stats = {"batch_accuracy": right, "known_answers": known.float().mean()}
        return LossOutput(total=total, parts={"answer": total}, stats=stats)


class VideoEntries:
    """Entries of a training batch: regions of a cache or a clip, and a caption or a question with its answer.

    Args:
        encoder: Only its settings are kept.
        config: Of the objective.
        context: Whose data set knows the questions.
        cache: Of regions, if any.
    """

    def __init__(
        self, encoder: DemoVLPEncoder, config: DemoVLPObjectiveConfig, context: BuildContext, cache: RegionCache | None
    ) -> None:
        self.frames, self.cache, self.clips = encoder.config.frames, cache, config.clips
        self.clip = ClipTransform(encoder.preprocessing, encoder.frames, config.clips, captions=config.task != "qa")
        self.questions: list[list[tuple[str, int]]] | None = None
        if config.task == "qa":
            numbers = {answer: i for i, answer in enumerate(encoder.answers)}
            self.questions = [
                [(question, numbers.get(answer, UNKNOWN)) for question, answer, _ in asked]
                for asked in _questions(context)
            ]

    def __call__(self, item: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        if self.cache is None:
            entries = self.clip(item, generator)
        else:
            kept = ("item_id", "index", "label", "where")
            entries = {key: item[key] for key in kept if key in item}
            entries |= self._stored(self.cache, item["item_id"], generator)
            if self.questions is None:
                entries["text"] = entries["caption"] = self.clip.caption(item, generator)
        if self.questions is not None:
            asked = self.questions[item["index"]] or [("?", UNKNOWN)]  # about this video nothing is asked
            entries["text"], entries["answer"] = asked[int(generator.integers(len(asked)))]
        return entries

    def _stored(self, cache: RegionCache, item_id: str, generator: np.random.Generator) -> dict[str, Tensor]:
        """Regions of some of the stored frames, one of every part; frames that fill up a short video have none."""
        found = cache.read(item_id)
        there = found.valid[0].any(dim=1).nonzero()
        length = int(there.max()) + 1 if len(there) else 1  # a short video has fewer frames than are stored
        chosen = torch.from_numpy(frame_indices(length, self.frames, mode=self.clips.sampling, generator=generator))
        entries = {}
        for key, value in found.batch().items():
            filled = value.new_zeros((self.frames, *value.shape[2:]))
            filled[: len(chosen)] = value[0, chosen]
            entries[key] = filled
        return entries


def _cached(config: DemoVLPObjectiveConfig, encoder: DemoVLPEncoder, context: BuildContext) -> RegionCache:
    assert context.dataset is not None and config.region_cache is not None and encoder.preprocessing is not None
    if config.clips != ClipAugmentation(sampling=config.clips.sampling):
        raise RecipeError("objective.clips: stored regions cannot be cropped or mirrored; leave out crop and flip")
    if config.stored_frames < encoder.config.frames:
        raise RecipeError(
            f"objective.stored_frames = {config.stored_frames} is less than encoder.frames = {encoder.config.frames}"
        )
    extractor = encoder.extractor
    with progress_bar("regions", len(context.dataset), "videos", quiet=not dist.is_main()) as progress:
        return cache_regions(
            context.dataset,
            extractor,
            Path(config.region_cache),
            preprocessing=encoder.preprocessing,
            frames=config.stored_frames,
            regions_per_frame=encoder.config.regions_per_frame,
            identity=encoder.extractor_identity(),
            device=encoder.text_proj.weight.device,
            on_error="skip" if config.skip_unreadable else "raise",
            progress=progress,
        )


def _texts(context: BuildContext) -> list[str]:
    """What the vocabulary is made of: captions and questions, so that one run can start from another."""
    assert context.dataset is not None
    videos, positions = video_text_set(context.dataset, "videotext:demovlp")
    texts = [caption for position in positions for caption in videos.captions(position)]
    texts += [question for position in positions for question, _, _ in videos.question(position)]
    if not texts:
        raise RecipeError("videotext:demovlp: the data set has neither captions nor questions to make a vocabulary of")
    return texts


def _questions(context: BuildContext) -> list[list[tuple[str, str, str]]]:
    assert context.dataset is not None
    videos, positions = video_text_set(context.dataset, "videotext:demovlp")
    found = [videos.question(position) for position in positions]
    if not any(found):
        raise RecipeError("objective.task = 'qa': the data set has no questions about its videos")
    return found


def _answers(config: DemoVLPObjectiveConfig, context: BuildContext) -> list[str]:
    """The most frequent answers, in alphabetical order."""
    counts = Counter(answer for asked in _questions(context) for _, answer, _ in asked)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return sorted(answer for answer, _ in ranked[: config.max_answers])
