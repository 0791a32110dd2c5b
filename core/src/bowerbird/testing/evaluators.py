"""The contract of evaluators, and a context to run them in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from bowerbird.errors import UnknownNameError, did_you_mean
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, Metrics
from bowerbird.testing.contract import Contract
from bowerbird.testing.datasets import SyntheticDataset
from bowerbird.testing.training import TinyEncoder


class SimpleEvalContext(EvalContext):
    """An encoder and data sets by name; ``default`` is what every other name gives (``None`` refuses it)."""

    def __init__(
        self,
        encoder: Encoder | None = None,
        datasets: Mapping[str, Dataset] | None = None,
        *,
        default: Dataset | None = None,
    ) -> None:
        if encoder is None:
            torch.manual_seed(0)
            encoder = TinyEncoder()
        self.encoder = encoder.eval()
        self._datasets = datasets or {}
        self._default = default

    def embed(self, dataset: Dataset, encoder: Encoder | None = None) -> np.ndarray:
        images = np.stack([np.asarray(dataset[i]["image"], np.float32) / 255 for i in range(len(dataset))])
        batch = {"image": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()}
        with torch.no_grad():
            pooled = (encoder or self.encoder)(batch).pooled
        return torch.nn.functional.normalize(pooled, dim=1).numpy().astype(np.float32)

    def dataset(self, use: str, *, split: str | None = None, **config: Any) -> Dataset:
        name = use if split is None else f"{use}/{split}"
        found = self._datasets.get(name) or self._datasets.get(use) or self._default
        if found is None:
            raise UnknownNameError(f"no data set {name!r}.{did_you_mean(name, self._datasets)}")
        return found


class EvaluatorContract(Contract):
    """Set ``name`` and ``config``; override ``make_context`` where the synthetic data set does not serve."""

    kind = "evaluator"

    def make_context(self) -> EvalContext:
        return SimpleEvalContext(default=SyntheticDataset())

    def run(self) -> Metrics:
        evaluator = self.target.build(self.make_config())
        assert isinstance(evaluator, Evaluator), f"{self.record.target} builds a {type(evaluator).__name__}"
        return evaluator.run(self.make_context())

    def test_it_returns_finite_named_numbers(self) -> None:
        """Fix: return ``Metrics`` whose summary maps names to finite floats; leave out what cannot be computed."""
        metrics = self.run()
        assert isinstance(metrics, Metrics), f"run returns {type(metrics).__name__}, not Metrics"
        assert metrics.summary, "the summary is empty"
        for name, value in metrics.summary.items():
            assert isinstance(name, str) and math.isfinite(float(value)), f"summary[{name!r}] is {value!r}"

    def test_values_per_query_are_one_dimensional_and_equally_long(self) -> None:
        """Fix: one value per query, NaN where a query is not valid; means alone cannot be compared pairwise."""
        lengths = {name: np.asarray(values).shape for name, values in self.run().per_query.items()}
        assert all(len(shape) == 1 for shape in lengths.values()), f"shapes {lengths}"
        assert len(set(lengths.values())) <= 1, f"lengths differ: {lengths}"

    def test_it_measures_the_same_twice(self) -> None:
        """Fix: take the seed from the settings."""
        assert self.run().summary == self.run().summary

    def test_the_encoder_is_left_as_it_was(self) -> None:
        """Fix: train a probe on vectors, not the encoder; put its mode back."""
        context = self.make_context()
        before = {name: value.clone() for name, value in context.encoder.state_dict().items()}
        training = context.encoder.training
        self.target.build(self.make_config()).run(context)
        assert context.encoder.training == training, "the encoder's mode has changed"
        assert all(torch.equal(value, before[name]) for name, value in context.encoder.state_dict().items())
