"""The old model of an upgrade, as the objectives of this package need it, and what can be measured against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bowerbird.protocols import BuildContext, Encoder, freeze
from bowerbird.retrieval.metrics import RankedList, Relevance, average_precision, cmc
from bowerbird_compat.heads import match_dim
from bowerbird_compat.prototypes import evaluating


@dataclass(frozen=True)
class OldModel:
    """A frozen old encoder and what is left of its training.

    Attributes:
        path: Folder or reference that it was loaded from.
        encoder: Frozen, in eval mode.
        classes: Names of the classes it was trained with; may be empty.
        classifier: ``(C_old, d_old)`` weight it was trained with, or ``None``. A bias is left out, as in openBCT.
        space: Fingerprint of its space, where what loaded it said so.
    """

    path: str
    encoder: Encoder
    classes: Sequence[str]
    classifier: Tensor | None
    space: str = ""

    @classmethod
    def load(cls, run: str | None, reference: str | None, context: BuildContext) -> Self:
        """From the folder of a run or an exported encoder, or else from a reference such as ``core:timm?model=...``."""
        if run is not None:
            trained = context.load_run(run)
            weight = trained.objective_state.get("classifier.weight")
            return cls(run, _frozen(trained.encoder), trained.classes, weight, trained.fingerprint)
        from bowerbird.encoders import load_encoder  # image libraries: the losses alone do without

        assert reference is not None
        loaded = load_encoder(reference, device="cpu")
        return cls(reference, _frozen(loaded.module), loaded.spec.classes, None, loaded.fingerprint)

    def fingerprint(self) -> str:
        """Of the old space."""
        if self.space:
            return self.space
        from bowerbird.encoders import load_encoder

        return load_encoder(self.path, device="cpu").fingerprint


def _frozen(encoder: Encoder) -> Encoder:
    freeze(encoder)
    return encoder


def measured_compatibility(
    new: Encoder, old: Encoder, context: BuildContext, *, max_items: int = 2000
) -> dict[str, Any]:
    """How well new queries search old vectors of training items, beside old queries: the evidence for a relation.

    Every item is a query against all others. The items are those that the new encoder was trained on, so the numbers
    flatter it; ``bowerbird upgrade plan`` measures on the gallery itself.

    Args:
        new, old: Encoders.
        context: Gives the training split.
        max_items: Above that, whole classes are drawn with the context's seed.

    Returns:
        ``items``, ``map_old_old``, ``map_new_old``, ``recall_at_1_old_old``, ``recall_at_1_new_old``, and ``improves``:
        whether mAP new/old is above old/old, the criterion of Shen et al.
    """
    new_vectors, labels = _unit_vectors(new, context, size=old.embed_dim)
    old_vectors, _ = _unit_vectors(old, context)
    chosen = _whole_classes(labels, max_items, np.random.default_rng(context.seed))
    labels, old_vectors, new_vectors = labels[chosen], old_vectors[chosen], new_vectors[chosen]
    relevant = Relevance.from_labels(labels, labels, exclude_self=True)
    evidence: dict[str, Any] = {"measured_on": "training items", "items": len(labels)}
    for name, queries in (("old_old", old_vectors), ("new_old", new_vectors)):
        ranked = RankedList.from_scores(queries @ old_vectors.T)
        evidence[f"map_{name}"] = round(float(average_precision(ranked, relevant)), 4)
        evidence[f"recall_at_1_{name}"] = round(float(cmc(ranked, relevant, 1)), 4)
    return evidence | {"improves": evidence["map_new_old"] > evidence["map_old_old"]}


def _unit_vectors(
    encoder: Encoder, context: BuildContext, *, size: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Unit vectors ``(N, D)`` (cut or padded to ``size``) and labels of the training split."""
    vectors, labels = [], []
    with evaluating(encoder):
        for batch in context.eval_batches(encoder):
            pooled = encoder(batch).pooled.float()
            vectors.append(F.normalize(pooled if size is None else match_dim(pooled, size)).cpu())
            labels.append(batch["label"].cpu())
    return torch.cat(vectors).numpy(), torch.cat(labels).numpy()


def _whole_classes(labels: NDArray[np.int64], max_items: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of all items of randomly drawn classes, at most ``max_items`` unless one class alone has more."""
    names, counts = np.unique(labels, return_counts=True)
    order = rng.permutation(len(names))
    within = np.cumsum(counts[order]) <= max_items
    within[0] = True
    return np.flatnonzero(np.isin(labels, names[order[within]]))
