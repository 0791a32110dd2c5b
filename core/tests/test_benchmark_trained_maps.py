"""The benchmark serves the maps that models were trained with, over all models between the old and the new one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional

from bowerbird.benchmark.cell import Cell
from bowerbird.benchmark.methods import Method
from bowerbird.benchmark.run import run_benchmark
from bowerbird.benchmark.scenarios import PROFILES
from bowerbird.benchmark.worlds import make_world
from bowerbird.gallery.transform import Step, VectorTransform
from bowerbird.hookspecs import hookimpl
from bowerbird.objectives.configs import SoftmaxConfig
from bowerbird.objectives.softmax import Softmax
from bowerbird.protocols import LossOutput, freeze
from bowerbird.records import ObjectiveRecord, RetrieverRecord
from bowerbird.registry import get_registry
from bowerbird.retrieval.metrics import RankedList, average_precision

BOWERBIRD_API = "1.0"


class MappedConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    old_run: str | None = None
    keeps: bool = True


class Mapped(Softmax):
    """Softmax, beside which a linear map into the old space is trained; the embedding itself knows nothing of it."""

    @classmethod
    def build(cls, config: Any, encoder: Any, context: Any) -> Any:
        self = super().build(SoftmaxConfig(), encoder, context)
        old = context.load_run(config.old_run)
        self.follow, self.space, self.keeps = freeze(old.encoder), old.fingerprint, config.keeps
        self.map = torch.nn.Linear(encoder.embed_dim, self.follow.embed_dim)
        return self

    def forward(self, batch: Any) -> LossOutput:
        new = functional.normalize(self.encoder(batch).pooled).detach()
        apart = 1 - functional.cosine_similarity(self.map(new), self.follow(batch).pooled).mean()
        return LossOutput(super().forward(batch).total + apart)

    def relations(self) -> list[dict[str, Any]]:
        step = Step("linear", self.map.weight.detach().numpy(), self.map.bias.detach().numpy())
        return [{"kind": "transform", "to": self.space, "steps": (step,), "evidence": {}}] if self.keeps else []


class Mapping:
    """Serves new queries through a map; one that it fits itself knows nothing."""

    needs_old_encoder = False
    merger = "core:distance"
    transform_direction = "query"
    uses_trained_transform = True

    def check(self, gallery: Any, old: Any, new: Any) -> None: ...

    def fit(self, pairs: Any, *, seed: int = 0) -> VectorTransform:
        weight = torch.randn(pairs.old_space.dim, pairs.new_space.dim, generator=torch.Generator().manual_seed(seed))
        return VectorTransform.linear(
            pairs.new_space.fingerprint, pairs.old_space.fingerprint, weight.numpy(), method="fitted"
        )

    def old_part_queries(self, queries: Any, old: Any, new: Any, transform: VectorTransform) -> Any:
        return transform(queries[new.fingerprint])


@hookimpl
def bowerbird_objectives() -> Iterator[ObjectiveRecord]:
    yield ObjectiveRecord(
        name="trained-maps:mapped", target="test_benchmark_trained_maps:Mapped", summary="A map.",
        config="test_benchmark_trained_maps:MappedConfig", needs=("image", "label"),
    )  # fmt: skip


@hookimpl
def bowerbird_retrievers() -> Iterator[RetrieverRecord]:
    yield RetrieverRecord(
        name="trained-maps:map", role="upgrade", target="test_benchmark_trained_maps:Mapping", summary="A map."
    )


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    get_registry().register_module("trained-maps", sys.modules[__name__])
    yield
    get_registry().unregister("trained-maps")


CONFIG = """
[[method]]
name = "mapped"
objective = "trained-maps:mapped"
serve = ["trained-maps:map", "core:compatible"]
[[method]]
name = "lost"
objective = "trained-maps:mapped"
settings = { keeps = false }
serve = ["trained-maps:map"]
"""


@pytest.mark.parametrize("scenario", ["new-architecture", "sequence"])
def test_a_model_is_served_by_the_maps_that_it_and_its_predecessors_were_trained_with(scenario: str) -> None:
    profile = PROFILES["digits"].quick()
    world = make_world("digits", 0, **profile.sizes)
    cell = Cell(world, {"pixels": (world.train, world.queries, world.gallery)}, scenario, profile, 0)
    models = cell.compatible(Method("mapped", "trained-maps:mapped"))
    row = cell.measure(models, "trained-maps:map")
    queries = cell.vectors(models[-1])[0]
    for model in models[:0:-1]:
        layer = model.objective.map
        queries = functional.normalize(layer(torch.from_numpy(queries))).detach().numpy()
    ranked = RankedList.from_scores(queries @ cell.vectors(models[0])[1].T)
    assert row["transform"] == "trained"
    assert row["start"][0] == pytest.approx(float(average_precision(ranked, world.relevance())), abs=1e-4)


def test_a_model_that_was_trained_without_a_map_is_served_by_one_that_is_fitted(tmp_path: Path) -> None:
    (tmp_path / "methods.toml").write_text(CONFIG)
    made = run_benchmark(
        tmp_path / "out", scenarios=["extended-data"], quick=True, config=tmp_path / "methods.toml",
        methods=["mapped", "lost", "trained-maps:map"],
    )  # fmt: skip
    used = {name: row.get("transform") for name, row in made["cells"][0]["rows"].items()}
    assert used == {
        "free / trained-maps:map": "fitted", "mapped / trained-maps:map": "trained",
        "mapped / core:compatible": None, "lost / trained-maps:map": "fitted",
    }  # fmt: skip
