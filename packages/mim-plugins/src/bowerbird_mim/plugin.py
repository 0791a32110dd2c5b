"""The records of ``bowerbird-mim``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="mim:beit-vit",
        target="bowerbird_mim.beit_vit:BEiTEncoder",
        config="bowerbird_mim.beit_vit:BEiTViTConfig",
        summary="The vision transformer of BEiT: relative position bias and layer scale; reads and writes timm's beit.",
        presets={size: f"bowerbird_mim.vit:{size}" for size in ("tiny", "small", "base")}
        | {"large": "bowerbird_mim.beit_vit:large"},
        paper="BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, arXiv:2106.08254",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="mim:dvae",
        target="bowerbird_mim.tokenizer:DiscreteVAE",
        config="bowerbird_mim.tokenizer:DVAEConfig",
        summary="Image tokenizer: a discrete VAE; as an encoder, the share of every code in a picture.",
        paper="Zero-Shot Text-to-Image Generation, ICML 2021, arXiv:2102.12092",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="mim:part-vit",
        target="bowerbird_mim.part_vit:PartViTEncoder",
        config="bowerbird_mim.part_vit:PartViTConfig",
        summary="A vision transformer with part tokens beside the class token, for upright, aligned objects.",
        presets={size: f"bowerbird_mim.vit:{size}" for size in ("tiny", "small", "base", "large")},
        paper="PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification, ECCV 2022, arXiv:2203.03931",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="mim:vit",
        target="bowerbird_mim.vit:ViTEncoder",
        config="bowerbird_mim.vit:ViTConfig",
        summary="A plain vision transformer that can be shown a part of a picture; reads and writes timm weights.",
        presets={size: f"bowerbird_mim.vit:{size}" for size in ("tiny", "small", "base", "large")},
        paper="An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929",
        outputs=("pooled", "tokens"),
    )
    yield EncoderRecord(
        name="mim:vqvae",
        target="bowerbird_mim.tokenizer:VQVAE",
        config="bowerbird_mim.tokenizer:VQVAEConfig",
        summary="Image tokenizer: every cell to its nearest code; as an encoder, the share of every code in a picture.",
        paper="Neural Discrete Representation Learning, NeurIPS 2017, arXiv:1711.00937",
        outputs=("pooled", "tokens"),
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="mim:beit",
        target="bowerbird_mim.beit:BEiTObjective",
        config="bowerbird_mim.beit:BEiTConfig",
        summary="Name the visual token of every hidden patch, as a frozen tokenizer would. For fine-tuning.",
        paper="BEiT: BERT Pre-Training of Image Transformers, ICLR 2022, arXiv:2106.08254",
        needs=("image",),
        encoder_needs=("tokens",),
    )
    yield ObjectiveRecord(
        name="mim:dino",
        target="bowerbird_mim.dino:DINOObjective",
        config="bowerbird_mim.dino:DINOConfig",
        summary="Self-distillation: small crops must be seen as a moving average sees large ones. For k-NN and search.",
        paper="Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.14294",
        needs=("image",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:emae",
        target="bowerbird_mim.emae:EMAEObjective",
        config="bowerbird_mim.emae:EMAEConfig",
        summary="MAE on all parts of a picture at once, which must agree on what they restore. For few epochs.",
        paper="Efficient Masked Autoencoders with Self-Consistency, arXiv:2302.14431",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:mae",
        target="bowerbird_mim.mae:MAEObjective",
        config="bowerbird_mim.mae:MAEConfig",
        summary="Masked autoencoder: encode a quarter of the patches, restore the pixels of the rest. For fine-tuning.",
        paper="Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:mc-beit",
        target="bowerbird_mim.mc_beit:McBEiTObjective",
        config="bowerbird_mim.mc_beit:McBEiTConfig",
        summary="BEiT with soft targets that similar patches share: several visual tokens may be right.",
        paper="mc-BEiT: Multi-choice Discretization for Image BERT Pre-training, ECCV 2022, arXiv:2203.15371",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:mst",
        target="bowerbird_mim.mst:MSTObjective",
        config="bowerbird_mim.mst:MSTConfig",
        summary="DINO that hides patches its teacher does not look at, and restores the picture. Also for dense tasks.",
        paper="MST: Masked Self-Supervised Transformer for Visual Representation, NeurIPS 2021, arXiv:2106.05656",
        needs=("image",),
        encoder_needs=("tokens",),
    )
    yield ObjectiveRecord(
        name="mim:pass",
        target="bowerbird_mim.part_aware:PassObjective",
        config="bowerbird_mim.part_aware:PassConfig",
        summary="DINO with part tokens and crops of every part's area. For retrieval of people, upright objects.",
        paper="PASS: Part-Aware Self-Supervised Pre-Training for Person Re-Identification, ECCV 2022, arXiv:2203.03931",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:reid-finetune",
        target="bowerbird_mim.reid:FinetuneObjective",
        config="bowerbird_mim.reid:FinetuneConfig",
        summary="Fine-tune on identities: cross-entropy behind batch normalisation, batch-hard triplet before it.",
        paper="TransReID: Transformer-based Object Re-Identification, ICCV 2021, arXiv:2102.04378",
        needs=("image", "label"),
    )
    yield ObjectiveRecord(
        name="mim:saim",
        target="bowerbird_mim.saim:SAIMObjective",
        config="bowerbird_mim.saim:SAIMConfig",
        summary="Predict every patch from those before it in a random order (two streams): no mask token anywhere.",
        paper="Exploring Stochastic Autoregressive Image Modeling, AAAI 2023, arXiv:2212.01610",
        needs=("image",),
        encoder_needs=("tokens",),
        batch_additive=True,
    )
    yield ObjectiveRecord(
        name="mim:tokenizer",
        target="bowerbird_mim.tokenizer:TokenizerObjective",
        config="bowerbird_mim.tokenizer:TokenizerConfig",
        summary="Train an image tokenizer (mim:dvae, mim:vqvae) on your pictures, for mim:beit and mim:mc-beit.",
        paper="Zero-Shot Text-to-Image Generation, ICML 2021, arXiv:2102.12092",
        needs=("image",),
        encoder_needs=("tokens",),
    )
    yield ObjectiveRecord(
        name="mim:univip",
        target="bowerbird_mim.univip:UniVIPObjective",
        config="bowerbird_mim.univip:UniVIPConfig",
        summary="UniVIP, for pictures of many objects: crops that share them, scene and objects, transport. And BYOL.",
        presets={"byol": "bowerbird_mim.univip:byol"},
        paper="UniVIP: A Unified Framework for Self-Supervised Visual Pre-training, CVPR 2022, arXiv:2203.06965",
        needs=("image",),
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="mim:canvases",
        target="bowerbird_mim.data.canvases:Canvases",
        config="bowerbird_mim.data.canvases:CanvasesConfig",
        summary="Items of another data set on textured canvases, with their boxes, masks and classes.",
        provides=("image", "label", "item_id", "boxes", "masks", "box_labels"),
    )
    yield DatasetRecord(
        name="mim:composite-people",
        target="bowerbird_mim.data.people:CompositePeople",
        config="bowerbird_mim.data.people:PeopleConfig",
        summary="Stacks of three items of another data set as identities, seen by several cameras.",
        provides=("image", "label", "item_id", "domain"),
        splits=("train", "query", "gallery"),
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="mim:finetune",
        target="bowerbird_mim.evaluators:Finetune",
        config="bowerbird_mim.evaluators:FinetuneConfig",
        summary="Accuracy after all weights were trained with labels: layer decay, mixup, stochastic depth.",
        presets={
            name: f"bowerbird_mim.evaluators:{name.replace('-', '_')}_finetune"
            for name in ("mae-large", "mae-huge", "beit", "saim")
        },
        paper="Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377",
    )
    yield EvaluatorRecord(
        name="mim:knn",
        target="bowerbird_mim.evaluators:KNN",
        config="bowerbird_mim.evaluators:KNNConfig",
        summary="Accuracy of a weighted vote of the nearest training items on frozen features, for several k.",
        presets={"dino": "bowerbird_mim.evaluators:dino_knn"},
        paper="Emerging Properties in Self-Supervised Vision Transformers, ICCV 2021, arXiv:2104.14294",
    )
    yield EvaluatorRecord(
        name="mim:linear-probe",
        target="bowerbird_mim.evaluators:LinearProbe",
        config="bowerbird_mim.evaluators:LinearProbeConfig",
        summary="Accuracy of a linear layer on frozen features, trained by LARS or SGD.",
        presets={
            name: f"bowerbird_mim.evaluators:{name.replace('-', '_')}_linear" for name in ("dino", "dino-base", "saim")
        },
        paper="Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv:2111.06377",
    )
    yield EvaluatorRecord(
        name="mim:reid",
        target="bowerbird_mim.reid:ReidEvaluation",
        config="bowerbird_mim.reid:ReidConfig",
        summary="Re-identification: mAP and CMC without pictures of the same identity from the query's camera.",
        paper="Scalable Person Re-identification: A Benchmark, ICCV 2015",
    )
    yield EvaluatorRecord(
        name="mim:tokenizer-quality",
        target="bowerbird_mim.tokenizer_quality:TokenizerQuality",
        config="bowerbird_mim.tokenizer_quality:TokenizerQualityConfig",
        summary="Reconstruction error, used codes and perplexity of a tokenizer on a data set.",
        needs=("image",),
    )
