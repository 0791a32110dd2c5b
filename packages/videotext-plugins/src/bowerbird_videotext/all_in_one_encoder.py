"""``videotext:all-in-one``: one transformer that embeds videos and texts, scores pairs of them, and answers questions.

Wang et al.: All in One: Exploring Unified Video-Language Pre-training, CVPR 2023 (arXiv 2203.07303).

B batch, T frames, N patches of a frame, L words, D width, P width of the projections, Q texts, G videos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from bowerbird.batch import Batch
from bowerbird.encoders.bundle import TOKENIZER, WEIGHTS, read_manifest
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import Features
from bowerbird_videotext.all_in_one import TextEmbeddings, UnifiedOutput, UnifiedVideoTextTransformer
from bowerbird_videotext.all_in_one_config import AllInOneConfig
from bowerbird_videotext.all_in_one_heads import MultipleChoiceScorer, OpenEndedQAHead, VideoTextMatchingHead
from bowerbird_videotext.dual_encoder import TextTower
from bowerbird_videotext.dual_encoder_config import TextConfig
from bowerbird_videotext.space_time import inflate_temporal_embedding

PAIRS_AT_ONCE = 64  # in one forward pass of pair_scores: bounds its memory


class AllInOneEncoder(TextTower):
    """Videos and texts alone (a gallery), pairs of them (matching, choice), and videos with questions.

    Args:
        config: Its sizes; sources of weights and of a tokenizer are read by ``build``.

    Attributes:
        transformer: The blocks and everything of frames. ``text_encoder`` is the table of words.
        matching: Scores pairs.
        qa: Answers questions, ``None`` until ``open_answers`` was called; ``answers`` are what it can say.
        scorer: Scores pairs in the place of ``matching``, ``None`` until ``open_choice`` was called.
    """

    qa: OpenEndedQAHead | None
    scorer: MultipleChoiceScorer | None

    def __init__(self, config: AllInOneConfig) -> None:
        super().__init__()
        c = config
        self.preprocessing, self.frames, self.embed_dim = c.preprocessing(), c.frames, c.projection_dim
        self.config = c
        self.transformer = UnifiedVideoTextTransformer(
            vocab_size=None,
            image_size=c.image_size,
            patch_size=c.patch_size,
            embed_dim=c.embed_dim,
            depth=c.depth,
            num_heads=c.num_heads,
            mlp_ratio=c.mlp_ratio,
            num_frames=c.frames,
            max_text_length=c.max_tokens,
            roll_divisor=c.roll_divisor if c.roll else None,
            temporal_embedding=c.temporal_embedding,
            shuffle_patches=c.shuffle_patches,
            projection_dim=c.projection_dim,
            dropout=c.dropout,
            drop_path=c.drop_path,
        )
        self.matching = VideoTextMatchingHead(c.embed_dim)
        self.qa, self.scorer = None, None
        self.answers: tuple[str, ...] = ()
        if c.answers:
            self.open_answers(c.answers)
        if c.chooses:
            self.open_choice()
        self.prepare_texts(
            TextConfig(
                tokenizer=c.tokenizer or c.text_weights,
                vocab_size=c.vocab_size,
                vocabulary=c.vocabulary,
                max_tokens=c.max_tokens,
            )
        )

    @classmethod
    def build(cls, config: AllInOneConfig) -> Self:
        """Raises ``InputError`` or ``DataError`` for folders and files that do not fit, naming what differs."""
        encoder = cls(config)
        if config.weights is not None:
            load_first_weights(encoder, Path(config.weights))
        if config.text_weights is not None:
            load_bert_embeddings(encoder, Path(config.text_weights))
        return encoder

    def _small_text_encoder(self, vocabulary: int) -> Any:
        c = self.config
        return TextEmbeddings(vocabulary, c.embed_dim, c.max_tokens, c.dropout)

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in super().stored_config(config).items() if key != "text_weights"}
        if self.answers:
            kept["answers"] = list(self.answers)
        if self.scorer is not None:
            kept["chooses"] = True
        return kept

    def open_answers(self, answers: Sequence[str], *, dropout: float = 0.5) -> None:
        """Make the head that chooses among ``answers``, unless it is there. Raises ``InputError`` for other answers."""
        if self.qa is not None:
            if tuple(answers) != self.answers:
                raise InputError(
                    f"this encoder answers with {len(self.answers)} answers already, and others are asked for"
                )
            return
        if len(set(answers)) != len(answers):
            raise InputError("an answer is there twice")
        self.answers = tuple(answers)
        self.qa = OpenEndedQAHead(self.config.embed_dim, len(answers), dropout).to(self.matching.fc.weight)

    def open_choice(self) -> None:
        """Make the scorer of options from the matching head, unless it is there."""
        if self.scorer is None:
            self.scorer = MultipleChoiceScorer.from_matching(self.matching)

    # ---------------------------------------------------------------------------------------------- passes

    def run(self, video: Tensor | None = None, text: Mapping[str, Tensor] | None = None) -> UnifiedOutput:
        """One pass of the transformer.

        Args:
            video: ``(B, T, 3, H, W)``.
            text: What ``tokenize`` gives, ``(B, L)`` each.

        Raises:
            InputError: Neither of them, shapes that do not fit, or there is no vocabulary yet.
        """
        if text is None:
            return self.transformer.run(video)
        if self.text_encoder is None:
            self.ready_tokenizer()  # says what to do
        mask = text.get("attention_mask")
        if mask is not None and mask.shape != text["input_ids"].shape:
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}; input_ids has {tuple(text['input_ids'].shape)}"
            )
        words = self.text_encoder(text["input_ids"])  # type: ignore[misc]
        return self.transformer.run(video, words, mask)

    def encode_video(self, video: Tensor) -> Tensor:
        """Vectors of clips alone ``(B, P)``, not normalised."""
        rows = self.run(video).video
        assert rows is not None
        return rows[:, 0]

    def encode_text(self, text: Mapping[str, Tensor]) -> Tensor:
        """Vectors of texts alone ``(B, P)``, not normalised."""
        rows = self.run(text=text).text
        assert rows is not None
        return rows[:, 0]

    def forward(self, batch: Batch) -> Features:
        """Features of ``video`` alone, else of ``image`` as videos of one frame, else of ``text`` alone."""
        if "video" in batch or "image" in batch:
            rows = self.run(batch["video"] if "video" in batch else batch["image"][:, None]).video
            assert rows is not None
            return Features(pooled=rows[:, 0], tokens=rows[:, 1:], grid=self.transformer.grid)
        if "text" in batch:
            rows = self.run(text=batch["text"]).text
            assert rows is not None
            mask = batch["text"].get("attention_mask")
            return Features(pooled=rows[:, 0], tokens=rows, mask=None if mask is None else mask.bool())
        raise InputError(f"the batch has none of video, image and text; it has {', '.join(batch) or 'nothing'}")

    def score(self, pooled: Tensor) -> Tensor:
        """``(..., D)`` to ``(...)``: how well pairs fit, by the scorer of options if there is one."""
        return self.matching.score(pooled) if self.scorer is None else self.scorer(pooled)

    def pair_scores(self, video: Batch, text: Batch) -> Tensor:
        """``(Q, G)``: every text with every video, one forward pass for each pair.

        Args:
            video: ``video`` of G clips, or ``image`` of G pictures.
            text: ``text`` of Q texts.
        """
        clips = video["video"] if "video" in video else video["image"][:, None]
        words = text["text"]
        texts = len(words["input_ids"])
        scores = []
        for pairs in torch.arange(texts * len(clips), device=clips.device).split(PAIRS_AT_ONCE):
            of_text, of_video = pairs // len(clips), pairs % len(clips)
            output = self.run(clips[of_video], {key: value[of_text] for key, value in words.items()})
            scores.append(self.score(output.pooled))
        return torch.cat(scores).view(texts, len(clips)) if scores else clips.new_zeros(texts, len(clips))

    def answer_logits(self, video: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """``(B, A)``. Raises ``InputError`` where the encoder was not trained to answer."""
        if self.qa is None:
            raise InputError(
                'this encoder answers no questions: train it with videotext:all-in-one and "qa" among objective.tasks'
            )
        return self.qa(self.run(video, text).pooled)

    def answer(self, video: Batch, questions: Sequence[str]) -> list[str]:
        """The most likely of the known answers to question i about video i.

        Args:
            video: ``video`` of B clips, or ``image`` of B pictures.
            questions: B of them.

        Raises:
            InputError: The encoder was not trained to answer, or there are not as many questions as videos.
        """
        clips = video["video"] if "video" in video else video["image"][:, None]
        if len(clips) != len(questions):
            raise InputError(f"{len(questions)} questions about {len(clips)} videos; expected one for each")
        text = {key: value.to(clips.device) for key, value in self.tokenize(questions).items()}
        return [self.answers[i] for i in self.answer_logits(clips, text).argmax(dim=1).tolist()]


# ------------------------------------------------------------------------------------------------ first weights


def load_first_weights(encoder: AllInOneEncoder, path: Path) -> None:
    """Fill ``encoder`` from a trained one, heads for answers and options left out, or its blocks from a timm ViT.

    Args:
        encoder: What is filled.
        path: A folder of a ``videotext:all-in-one`` or of its run, or a file of weights of a timm vision transformer.

    Raises:
        DataError: The files are missing, damaged or of another architecture; the message lists what differs.
    """
    for folder in (path, path / "encoder"):
        if (folder / "encoder.json").is_file():
            _load_all_in_one(encoder, folder)
            return
    own = encoder.transformer.state_dict()
    of_vit = ("blocks.", "cls_token", "norm.", "patch_embed.", "pos_embed")
    extra = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "mask_token")
    found = {key: value for key, value in read_weights(path).items() if not key.startswith(extra)}
    found |= {key: value for key, value in own.items() if not key.startswith(of_vit)}
    load_strictly(encoder.transformer, found, source=str(path))


def _load_all_in_one(encoder: AllInOneEncoder, folder: Path) -> None:
    use = read_manifest(folder)["use"]
    if use != "videotext:all-in-one":
        raise DataError(f"weights {str(folder)!r} are of {use}; expected a videotext:all-in-one, or a ViT's file")
    if encoder.tokenizer is None:
        encoder.load_tokenizer(folder / TOKENIZER)
    of_tasks = ("qa.", "scorer.")
    state = {key: value for key, value in read_weights(folder / WEIGHTS).items() if not key.startswith(of_tasks)}
    state |= {key: value for key, value in encoder.state_dict().items() if key.startswith(of_tasks)}
    frames = "transformer.temporal_embed"
    if frames in state:
        state[frames] = inflate_temporal_embedding(state[frames], encoder.transformer.num_frames)
    encoder.load_trained(state, folder)


def load_bert_embeddings(encoder: AllInOneEncoder, folder: Path) -> None:
    """Fill the table of words from a local BERT model; positions beyond ``max_tokens`` are left out.

    Raises:
        DataError: No weights in the folder, or of another width or vocabulary; the message says what differs.
    """
    assert encoder.text_encoder is not None
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not files:
        raise DataError(f"text_weights {str(folder)!r}: the folder has neither model.safetensors nor pytorch_model.bin")
    own = encoder.text_encoder.state_dict()
    prefixes = ("bert.embeddings.", "embeddings.")
    state: dict[str, Tensor] = {}
    for key, value in read_weights(files[0]).items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if prefix is not None:  # old files call the weights of a layer norm gamma and beta
            name = key.removeprefix(prefix).replace("gamma", "weight").replace("beta", "bias")
            if name in own:
                state[name] = value[: len(own[name])]
    load_strictly(encoder.text_encoder, state, source=str(files[0]))
