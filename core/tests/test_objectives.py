"""The objectives of core against their equations, written out with numpy and plain loops."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import training_fixtures as tiny
from torch import nn

from bowerbird.errors import RecipeError
from bowerbird.objectives.configs import MarginConfig, SoftmaxConfig, SupConConfig
from bowerbird.objectives.margin import Margin
from bowerbird.objectives.softmax import Softmax
from bowerbird.objectives.supcon import SupCon
from bowerbird.protocols import BuildContext, Encoder, Features


class Table(Encoder):
    """Gives a table of vectors as embeddings, so that the loss can be computed by hand."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.embed_dim = dim
        self.rows = nn.Parameter(torch.randn(rows, dim, dtype=torch.float32))

    def forward(self, batch: dict[str, Any]) -> Features:
        return Features(pooled=self.rows)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def labels(*values: int) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(values)}


def cross_entropy(logits: np.ndarray, label: np.ndarray, smoothing: float = 0.0) -> float:
    log_p = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    target = np.full_like(logits, smoothing / logits.shape[1])
    target[np.arange(len(label)), label] += 1 - smoothing
    return float(-(target * log_p).sum(1).mean())


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def arrays(objective: Any) -> tuple[np.ndarray, np.ndarray]:
    state = {key: value.double().numpy() for key, value in objective.state_dict().items()}
    return state["encoder.rows"], state["classifier.weight"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_cross_entropy_of_a_linear_classifier(smoothing: float) -> None:
    objective = Softmax(Table(5, 4), 3, SoftmaxConfig(label_smoothing=smoothing))
    rows, weight = arrays(objective)
    bias = objective.state_dict()["classifier.bias"].double().numpy()
    y = np.array([0, 2, 1, 1, 0])
    expected = cross_entropy(rows @ weight.T + bias, y, smoothing)
    output = objective(labels(*y))
    assert output.total.item() == pytest.approx(expected, rel=1e-5)
    assert float(output.stats["accuracy"]) == pytest.approx(((rows @ weight.T + bias).argmax(1) == y).mean())


def test_cosine_softmax_does_not_see_the_length_of_features_or_class_vectors() -> None:
    objective = Softmax(Table(4, 6), 3, SoftmaxConfig(cosine=True, scale=10.0))
    rows, weight = arrays(objective)
    y = np.array([0, 1, 2, 0])
    expected = cross_entropy(10 * unit(rows) @ unit(weight).T, y)
    assert objective(labels(*y)).total.item() == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        next(objective.encoder.parameters()).mul_(3)
        objective.classifier.weight *= 0.5
    assert objective(labels(*y)).total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "margin"), [("arcface", 0.3), ("cosface", 0.2), ("arcface", 0.0)])
def test_margins_lower_only_the_target_logit(kind: Any, margin: float) -> None:
    objective = Margin(Table(6, 5), 4, MarginConfig(kind=kind, margin=margin, scale=8.0))
    rows, weight = arrays(objective)
    y = np.array([0, 1, 2, 3, 0, 1])
    cosines = unit(rows) @ unit(weight).T
    logits = cosines.copy()
    own = cosines[np.arange(6), y]
    # Past an angle of pi - margin the cosine would rise again; the library then uses a linear continuation. Not here:
    assert (np.arccos(own) < np.pi - margin).all()
    logits[np.arange(6), y] = np.cos(np.arccos(own) + margin) if kind == "arcface" else own - margin
    assert objective(labels(*y)).total.item() == pytest.approx(cross_entropy(8 * logits, y), rel=1e-4)


def test_the_margin_objective_trains_its_class_vectors_and_can_be_copied() -> None:
    objective = Margin(Table(3, 4), 3, MarginConfig())
    objective(labels(0, 1, 2)).total.backward()
    assert objective.classifier.weight.grad is not None
    assert objective.classifier.weight.grad.abs().sum() > 0
    assert {name for name, _ in objective.named_parameters()} == {"encoder.rows", "classifier.weight"}
    twin = copy.deepcopy(objective)
    assert float(twin(labels(0, 1, 2)).total.detach()) == float(objective(labels(0, 1, 2)).total.detach())


@pytest.mark.parametrize(
    "settings", [{"margin": 1.6}, {"kind": "cosface", "margin": 2.0}, {"margin": -0.1}, {"scale": 0}]
)
def test_margins_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"margin|scale"):
        MarginConfig(**settings)


def test_supcon_is_the_mean_log_probability_of_the_positives() -> None:
    y = np.array([0, 0, 1, 1, 1, 2])
    objective = SupCon(Table(6, 5), SupConConfig(temperature=0.5))
    rows = unit(objective.state_dict()["encoder.rows"].double().numpy())
    logits = rows @ rows.T / 0.5
    terms = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if y[j] == y[i]]
        if positives:  # an item alone in its class has no term
            denominator = np.log(sum(np.exp(logits[i, j]) for j in others))
            terms.append(-np.mean([logits[i, j] - denominator for j in positives]))
    output = objective(labels(*y))
    assert output.total.item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert float(output.stats["share_with_positives"]) == pytest.approx(5 / 6)


class OneClass(BuildContext):
    classes = ("only",)
    total_steps, seed = 1, 0

    def load_run(self, path: Any) -> Any:
        raise NotImplementedError

    def eval_batches(self, encoder: Any, keys: Any = ()) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(("objective", "config"), [(Softmax, SoftmaxConfig()), (Margin, MarginConfig())])
def test_a_classifier_of_one_class_is_refused(objective: Any, config: Any) -> None:
    with pytest.raises(RecipeError, match="at least 2 classes; the data set has 1"):
        objective.build(config, tiny.TinyEncoder(tiny.TinyConfig()), OneClass())
