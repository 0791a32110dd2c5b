"""The evaluators core:knn, core:retrieval and core:upgrade."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bowerbird.encoders import save_encoder  # noqa: E402
from bowerbird.encoders.timm_encoder import TimmConfig, TimmEncoder  # noqa: E402
from bowerbird.errors import InputError  # noqa: E402
from bowerbird.protocols import Dataset, EvalContext  # noqa: E402
from bowerbird.retrieval import configs, evaluators  # noqa: E402
from bowerbird.testing import EvaluatorContract, SimpleEvalContext, SyntheticDataset  # noqa: E402


class Points(Dataset):
    """Labelled vectors in the place of images: what the context embeds is given."""

    def __init__(self, vectors, labels, classes, prefix):
        self.vectors = np.asarray(vectors, np.float32) / np.linalg.norm(vectors, axis=1, keepdims=True)
        self._labels, self.classes = list(labels), classes
        self._ids = [f"{prefix}/{i}" for i in range(len(self._labels))]

    @classmethod
    def build(cls, config, split):
        raise NotImplementedError

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return {"label": self._labels[index], "item_id": self._ids[index]}

    @property
    def item_ids(self):
        return self._ids

    def labels(self):
        return self._labels


class GivenVectors(EvalContext):
    def __init__(self, **splits):
        self.splits = splits

    def embed(self, dataset, encoder=None):
        return dataset.vectors

    def dataset(self, use, *, split=None, **config):
        return self.splits[split or "all"]


def knn(context, **values):
    return evaluators.KNN.build(configs.KNNConfig(dataset="points", **values)).run(context)


def retrieval(context, **values):
    return evaluators.Retrieval.build(configs.RetrievalConfig(dataset="points", **values)).run(context)


class TestKNNContract(EvaluatorContract):
    name = "core:knn"
    config = {"dataset": "synthetic", "k": 3, "samples": 50}


class TestRetrievalContract(EvaluatorContract):
    name = "core:retrieval"
    config = {"dataset": "synthetic", "samples": 50}


def test_near_neighbours_outvote_far_ones_and_the_temperature_says_how_much():
    train = Points([[1, 0], [0.6, 0.8], [0.6, 0.8]], [0, 1, 1], ["a", "b"], "train")
    test = Points([[1, 0.1]], [0], ["a", "b"], "test")
    context = GivenVectors(train=train, test=test)
    assert knn(context, k=3, temperature=0.07).summary["top1"] == 1
    assert knn(context, k=3, temperature=10.0).summary["top1"] == 0  # nearly one vote each
    assert knn(context, k=1, temperature=10.0).summary["top1"] == 1


def test_votes_are_the_sums_of_the_definition():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 12)
    neighbours = np.stack([rng.permutation(12)[:6] for _ in range(4)])
    cosines = -np.sort(-rng.random((4, 6)), axis=1)
    own = np.array([-1, neighbours[1, 0], neighbours[2, 5], -1])
    votes = evaluators.knn_votes(neighbours, cosines, classes, 3, 5, 0.1, own)
    for q in range(4):
        kept = [(i, c) for i, c in zip(neighbours[q], cosines[q], strict=True) if i != own[q]][:5]
        expected = [sum(np.exp((c - 1) / 0.1) for i, c in kept if classes[i] == label) for label in range(3)]
        assert votes[q] == pytest.approx(expected)


def test_an_item_has_no_vote_about_itself():
    points = Points([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], [0, 1, 0, 1], ["a", "b"], "p")
    context = GivenVectors(train=points)
    assert knn(context, train_split="train", test_split="train", k=1).summary["top1"] == 0


def test_labels_of_splits_are_compared_by_class_name():
    vectors = np.eye(3)
    train = Points(vectors, [0, 1, 2], ["a", "b", "c"], "train")
    test = Points(vectors[1:], [0, 1], ["b", "c"], "test")
    assert knn(GivenVectors(train=train, test=test), k=1).summary["top1"] == 1
    found = retrieval(GivenVectors(q=test, g=train), query_split="q", gallery_split="g")
    assert found.summary["mAP"] == 1
    with pytest.raises(InputError, match="no class in common"):
        knn(GivenVectors(train=train, test=Points(vectors, [0, 0, 0], ["z"], "t")), k=1)


def test_retrieval_of_a_set_in_itself_excludes_the_query_and_keeps_every_value():
    points = Points([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], [0, 0, 1, 2], ["a", "b", "c"], "p")
    found = retrieval(GivenVectors(all=points), ks=(1, 2))
    assert found.summary["num_valid"] == 2
    assert found.summary["R@1"] == found.summary["mAP"] == 1
    assert found.per_query["R@1"][:2].tolist() == [1, 1]
    assert np.isnan(found.per_query["mAP"][2:]).all()
    zero = retrieval(GivenVectors(all=points), no_positive="zero")
    assert zero.summary["mAP"] == 0.5
    assert zero.summary["mAP.low"] <= 0.5 <= zero.summary["mAP.high"]


def test_a_query_that_stands_in_the_gallery_is_excluded_by_its_id():
    queries = Points([[1, 0]], [0], ["a"], "p")
    gallery = Points([[1, 0], [0, 1], [1, 1]], [0, 0, 0], ["a"], "p")  # p/0 is the query
    found = retrieval(GivenVectors(q=queries, g=gallery), query_split="q", gallery_split="g", kind="at_k", ap_k=1)
    assert found.summary["mAP"] == 1
    assert found.per_query["R@1"].tolist() == [1]


@pytest.fixture(scope="module")
def old_encoder(tmp_path_factory):
    torch.manual_seed(3)
    config = {"model": "resnet10t"}
    encoder = TimmEncoder.build(TimmConfig(**config)).eval()
    path = tmp_path_factory.mktemp("old") / "encoder"
    save_encoder(encoder, path, use="core:timm", config=config)
    return encoder, str(path)


def test_an_upgrade_to_the_same_encoder_flips_nothing_and_is_not_compatible(old_encoder):
    encoder, path = old_encoder
    context = SimpleEvalContext(encoder, default=SyntheticDataset())
    config = configs.UpgradeConfig(dataset="synthetic", old=path, samples=50)
    found = evaluators.Upgrade.build(config).run(context)
    assert found.summary["new/old mAP"] == found.summary["old/old mAP"] == found.summary["new/new mAP"]
    assert found.summary["new/new vs_old nfr"] == 0
    assert found.summary["compatible mAP"] == 0
    assert found.per_query["new/new vs_start flip"].tolist() == [0] * 24
    assert len(found.per_query["new/old R@1"]) == 24


def test_an_upgrade_to_another_width_has_no_cross_test(old_encoder):
    context = SimpleEvalContext(default=SyntheticDataset())
    config = configs.UpgradeConfig(dataset="synthetic", old=old_encoder[1], star=old_encoder[1], samples=50)
    found = evaluators.Upgrade.build(config).run(context).summary
    assert "new/old mAP" not in found
    assert "star/star mAP" in found
    assert "new/new vs_old pfr" in found
