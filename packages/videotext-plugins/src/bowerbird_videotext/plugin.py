"""The records of ``bowerbird-videotext``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="videotext:dual-encoder",
        target="bowerbird_videotext.dual_encoder:DualEncoder",
        config="bowerbird_videotext.dual_encoder_config:DualEncoderConfig",
        summary="Clips and captions in one space: space-time transformer and text transformer, searched by cosine.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        inputs=("video", "image", "text"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="videotext:frozen",
        target="bowerbird_videotext.frozen:FrozenObjective",
        config="bowerbird_videotext.frozen:FrozenConfig",
        summary="Contrastive training of a dual encoder on videos and captions; the baseline of MCQ, MILES and MAC.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        needs=("video", "text"),
    )
    yield ObjectiveRecord(
        name="videotext:mac",
        target="bowerbird_videotext.mac:MACObjective",
        config="bowerbird_videotext.mac:MACConfig",
        summary="Contrastive training on a part of the patches and masked captions: less than half the work of a step.",
        paper="Masked Contrastive Pre-Training for Efficient Video-Text Retrieval, arXiv:2212.00986",
        needs=("video", "text"),
    )
    yield ObjectiveRecord(
        name="videotext:mcq",
        target="bowerbird_videotext.mcq:MCQObjective",
        config="bowerbird_videotext.mcq:MCQConfig",
        summary="Contrastive training with questions: a noun or verb of the caption is erased and found in the clip.",
        paper="Bridging Video-text Retrieval with Multiple Choice Questions, CVPR 2022, arXiv:2201.04850",
        needs=("video", "text"),
    )
    yield ObjectiveRecord(
        name="videotext:miles",
        target="bowerbird_videotext.miles:MILESObjective",
        config="bowerbird_videotext.miles:MILESConfig",
        summary="Contrastive training with hidden patches, whose features follow a copy of the encoder.",
        paper="MILES: Visual BERT Pre-training with Injected Language Semantics for Video-text Retrieval, ECCV 2022, "
        "arXiv:2204.12408",
        needs=("video", "text"),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="videotext:moving",
        target="bowerbird_videotext.moving:Moving",
        config="bowerbird_videotext.data_configs:MovingConfig",
        summary="Short videos of real pictures that move, with captions, questions and boxes; made by a program.",
        presets={
            name: f"bowerbird_videotext.data_configs:{name}" for name in ("digits", "emoji", "rich", "single", "still")
        },
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="videotext:multiple-choice",
        target="bowerbird_videotext.evaluators:MultipleChoice",
        config="bowerbird_videotext.evaluator_configs:MultipleChoiceConfig",
        summary="Percent of videos whose right caption scores best among a few.",
        needs=("video",),
    )
    yield EvaluatorRecord(
        name="videotext:qa",
        target="bowerbird_videotext.evaluators:QuestionAnswering",
        config="bowerbird_videotext.evaluator_configs:QuestionsConfig",
        summary="Percent of open questions about videos that are answered rightly, by kind.",
        needs=("video",),
    )
    yield EvaluatorRecord(
        name="videotext:retrieval",
        target="bowerbird_videotext.evaluators:VideoRetrieval",
        config="bowerbird_videotext.evaluator_configs:VideoRetrievalConfig",
        summary="Recall and ranks of videos searched by texts, and of texts by videos; with a reranker and without.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        needs=("video", "text"),
    )
    yield EvaluatorRecord(
        name="videotext:zero-shot-actions",
        target="bowerbird_videotext.evaluators:ZeroShotActions",
        config="bowerbird_videotext.evaluator_configs:ZeroShotConfig",
        summary="Classification of videos by the nearest prompt of a class, without training on the classes.",
        needs=("video", "label"),
    )


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield RetrieverRecord(
        name="videotext:dual-softmax",
        target="bowerbird_videotext.video_retrieval:dual_softmax_reranker",
        config="bowerbird_videotext.evaluator_configs:DualSoftmaxConfig",
        summary="Scores times their softmax over all queries: what is near to every query loses its advantage.",
        paper="Improving Video-Text Retrieval by Multi-Stream Corpus Alignment and Dual Softmax Loss, arXiv:2109.04290",
        role="reranker",
    )
