"""Run evaluators on an encoder and keep their numbers, those of single queries included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bowerbird.data.uris import parse_dataset
from bowerbird.encoders.bundle import LoadedEncoder, load_encoder
from bowerbird.errors import InputError, RecipeError
from bowerbird.files import atomic_folder, write_json
from bowerbird.protocols import Dataset, Encoder, EvalContext, Evaluator, freeze
from bowerbird.recipe import EvaluateComponent, build_config
from bowerbird.registry import get_registry


class Evaluation(EvalContext):
    """What an evaluator may ask for. Every data set is embedded once per encoder, whoever asks.

    Args:
        loaded: The encoder that is evaluated.
        training_set: The split that a run was trained on, where there is one.
    """

    def __init__(self, loaded: LoadedEncoder, *, training_set: Dataset | None = None) -> None:
        self.loaded = loaded
        self.encoder = loaded.module
        self.training_set = training_set
        self._datasets: dict[str, Dataset] = {}
        self._vectors: dict[tuple[int, int], tuple[Any, Any, NDArray[np.float32]]] = {}

    def dataset(self, use: str, *, split: str | None = None, **config: Any) -> Dataset:
        name, settings_in_name = parse_dataset(use)
        config = {**settings_in_name, **config}
        record = get_registry().get("dataset", name)
        key = json.dumps([record.name, split, config], sort_keys=True, default=str)
        if key not in self._datasets:
            settings = build_config(record, config, where=f"dataset {record.name!r}")
            self._datasets[key] = get_registry().load(record).build(settings, split)
        return self._datasets[key]

    def embed(self, dataset: Dataset, encoder: Encoder | None = None) -> NDArray[np.float32]:
        encoder = encoder or self.encoder
        key = (id(dataset), id(encoder))
        if key not in self._vectors:
            if encoder is self.encoder:
                loaded = self.loaded
            else:
                freeze(encoder).to(self.loaded.device)
                loaded = LoadedEncoder(spec=self.loaded.spec, module=encoder, fingerprint="", device=self.loaded.device)
            # Both objects are kept, so that their ids stay theirs.
            self._vectors[key] = (dataset, encoder, loaded.encode_dataset(dataset))
        return self._vectors[key][2]


def evaluate(
    ref: str | Path,
    components: Sequence[EvaluateComponent],
    *,
    device: str = "auto",
    training_set: Dataset | None = None,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Run evaluators and return their summaries as ``name/metric``.

    Args:
        ref: What ``load_encoder`` accepts.
        components: Evaluators and their settings.
        device: Where the encoder runs.
        training_set: Passed on to evaluators that fit something on the training split.
        out: Folder that receives ``metrics.json`` and ``per_query/<name>.npz``; by default the run's folder where
            ``ref`` is one, else nothing is written. Results of other evaluators that are already there stay.

    Raises:
        RecipeError: Two evaluators have the same name, or a setting is not accepted.
    """
    names = [component.name or component.use for component in components]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two evaluators are called {name!r}; give one of them another name = '...'")
    registry = get_registry()
    evaluators: list[Evaluator] = []
    for component in components:
        record = registry.get("evaluator", component.use)
        config = build_config(record, component.settings, where=f"evaluator {record.name!r}")
        evaluators.append(registry.load(record).build(config))
    context = Evaluation(load_encoder(ref, device=device), training_set=training_set)
    summary: dict[str, float] = {}
    per_query: dict[str, Mapping[str, Any]] = {}
    for name, evaluator in zip(names, evaluators, strict=True):
        metrics = evaluator.run(context)
        summary |= {f"{name}/{key}": float(value) for key, value in metrics.summary.items()}
        per_query[name] = metrics.per_query
    if out is None and (Path(ref) / "recipe.json").is_file():
        out = ref
    if out is not None:
        _write(Path(out), summary, per_query)
    return summary


def _write(folder: Path, summary: Mapping[str, float], per_query: Mapping[str, Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.json"
    kept: dict[str, float] = {}
    if file.is_file():
        try:
            kept = json.loads(file.read_text())
        except ValueError as error:
            raise InputError(
                f"{str(file)!r} is not valid JSON ({error}); remove it or choose another folder"
            ) from error
        kept = {
            key: value for key, value in kept.items() if not key.startswith(tuple(f"{name}/" for name in per_query))
        }
    old = folder / "per_query"
    with atomic_folder(old) as temporary:
        if old.is_dir():
            for other in old.glob("*.npz"):
                (temporary / other.name).write_bytes(other.read_bytes())
        for name, values in per_query.items():
            if values:
                arrays: Any = {key: np.asarray(value) for key, value in values.items()}
                np.savez_compressed(temporary / f"{_file_name(name)}.npz", **arrays)
    write_json(file, {**kept, **summary})


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
