"""The records of ``bowerbird-videotext``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="videotext:all-in-one",
        target="bowerbird_videotext.all_in_one_encoder:AllInOneEncoder",
        config="bowerbird_videotext.all_in_one_config:AllInOneConfig",
        summary="One transformer of frames and words: embeds, scores pairs, answers questions; rolls tokens in time.",
        presets={size: f"bowerbird_videotext.all_in_one_config:{size}" for size in ("base", "small", "tiny")},
        paper="All in One: Exploring Unified Video-Language Pre-training, CVPR 2023, arXiv:2203.07303",
        inputs=("video", "text"),
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="videotext:demovlp",
        target="bowerbird_videotext.demovlp_encoder:DemoVLPEncoder",
        config="bowerbird_videotext.demovlp_config:DemoVLPConfig",
        summary="Videos by the regions of few frames (grid, detector), captions by their words; finds and answers.",
        paper="Revitalize Region Feature for Democratizing Video-Language Pre-training, arXiv:2203.07720",
        inputs=("video", "text"),
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="videotext:dual-encoder",
        target="bowerbird_videotext.dual_encoder:DualEncoder",
        config="bowerbird_videotext.dual_encoder_config:DualEncoderConfig",
        summary="Clips and captions in one space: space-time transformer and text transformer, searched by cosine.",
        paper="Frozen in Time: A Joint Video and Image Encoder for End-to-End Retrieval, ICCV 2021, arXiv:2104.00650",
        inputs=("video", "text"),
    )
    yield EncoderRecord(
        name="videotext:mv-former",
        target="bowerbird_videotext.mv_former_encoder:MVFormerEncoder",
        config="bowerbird_videotext.mv_former_config:MVFormerConfig",
        summary="Embeds every frame of a video: entity tokens of a frozen image network, a transformer over frames.",
        presets={
            name: f"bowerbird_videotext.mv_former_config:{name}" for name in ("finegym", "penn", "pouring", "small")
        },
        paper="Multi-entity Video Transformers for Fine-Grained Video Representation Learning, arXiv:2311.10873",
        inputs=("video",),
        outputs=("pooled", "tokens"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="videotext:all-in-one",
        target="bowerbird_videotext.all_in_one_objective:AllInOneObjective",
        config="bowerbird_videotext.all_in_one_objective:AllInOneObjectiveConfig",
        summary="Hidden words, matching, contrast, questions and choices, all by one transformer of videos and texts.",
        paper="All in One: Exploring Unified Video-Language Pre-training, CVPR 2023, arXiv:2203.07303",
        needs=("video", "text"),
        encoder_needs=(),
    )
    yield ObjectiveRecord(
        name="videotext:demovlp",
        target="bowerbird_videotext.demovlp_objective:DemoVLPObjective",
        config="bowerbird_videotext.demovlp_config:DemoVLPObjectiveConfig",
        summary="Align videos with captions and regions with words, from regions that are extracted once; video QA.",
        paper="Revitalize Region Feature for Democratizing Video-Language Pre-training, arXiv:2203.07720",
        needs=("video", "text"),
        encoder_needs=("pooled", "tokens"),
    )
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
    yield ObjectiveRecord(
        name="videotext:mv-former",
        target="bowerbird_videotext.mv_former_objective:MVFormerObjective",
        config="bowerbird_videotext.mv_former_config:MVFormerObjectiveConfig",
        summary="Embeddings of frames without labels: those near in time in two views of a video become alike.",
        paper="Multi-entity Video Transformers for Fine-Grained Video Representation Learning, arXiv:2311.10873",
        needs=("video",),
        encoder_needs=("tokens",),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="videotext:didemo",
        target="bowerbird_videotext.annotations:DiDeMo",
        config="bowerbird_videotext.data_configs:DiDeMoConfig",
        summary="Your own copy of DiDeMo: descriptions joined, apart, or with their moments.",
        paper="Localizing Moments in Video with Natural Language, ICCV 2017, arXiv:1708.01641",
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )
    yield DatasetRecord(
        name="videotext:lsmdc",
        target="bowerbird_videotext.annotations:Lsmdc",
        config="bowerbird_videotext.data_configs:LsmdcConfig",
        summary="Your own copy of LSMDC 2016: clips of films with a sentence each.",
        paper="Movie Description, IJCV 2017, arXiv:1605.03705",
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )
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
    yield DatasetRecord(
        name="videotext:msr-vtt",
        target="bowerbird_videotext.annotations:MsrVtt",
        config="bowerbird_videotext.data_configs:MsrVttConfig",
        summary="Your own copy of MSR-VTT: splits 1k-A, 7k and full.",
        paper="MSR-VTT: A Large Video Description Dataset for Bridging Video and Language, CVPR 2016, "
        "doi:10.1109/CVPR.2016.571",
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )
    yield DatasetRecord(
        name="videotext:msvd",
        target="bowerbird_videotext.annotations:Msvd",
        config="bowerbird_videotext.data_configs:MsvdConfig",
        summary="Your own copy of MSVD: short clips with about forty descriptions each.",
        paper="Collecting Highly Parallel Data for Paraphrase Evaluation, ACL 2011, https://aclanthology.org/P11-1020",
        provides=("video", "text", "item_id"),
        splits=("train", "val", "test"),
    )
    yield DatasetRecord(
        name="videotext:table",
        target="bowerbird_videotext.video_table:VideoTable",
        config="bowerbird_videotext.data_configs:VideoTableConfig",
        summary="Your own videos and captions: a folder, or a table of CSV, JSON lines or Parquet.",
        provides=("video", "text", "item_id"),
    )
    yield DatasetRecord(
        name="videotext:phases",
        target="bowerbird_videotext.phases:Phases",
        config="bowerbird_videotext.mv_former_config:PhasesConfig",
        summary="Videos of two real pictures that change places, with the state of every frame; made by a program.",
        provides=("video", "text", "label", "item_id"),
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
    yield EvaluatorRecord(
        name="videotext:dense",
        target="bowerbird_videotext.dense_evaluator:DenseEvaluation",
        config="bowerbird_videotext.mv_former_config:DenseConfig",
        summary="Embeddings of frames: phase classification, progression, Kendall's tau, retrieval of frames.",
        paper="Multi-entity Video Transformers for Fine-Grained Video Representation Learning, arXiv:2311.10873",
        needs=("video",),
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
