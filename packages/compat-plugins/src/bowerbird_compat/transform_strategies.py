"""Strategies of an upgrade that fit a map between the two spaces: adapter, reverse query transform, lift.

``compat:adapter`` and ``compat:reverse-transform`` bring each new query into the old space, so that one encoder pass
serves both parts of a gallery that is half old, half new. ``compat:lift`` brings the stored old vectors into the new
space, without their images.

All are fitted on a paired sample (``TrainingPairs``), a quarter of which is kept back; the transform's ``evidence``
holds the verdict on those (``adapter_verdict``). No torch here: a process that serves a gallery loads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bowerbird.errors import SpaceError, UpgradeError
from bowerbird.gallery.transform import VectorTransform
from bowerbird_compat.adapter_verdict import Direction, judge_transform
from bowerbird_compat.adapters import MIN_PAIRS, Kind, fit_adapter, pairs_wanted, split_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space
    from bowerbird.upgrade.strategies import TrainingPairs

MANY_WEIGHTS = 512**2  # of a map; a plan fits it on one core, and more weights get fewer steps


class Adapter:
    """New queries through a map fitted in seconds: orthogonal, affine, low-rank or a small network. No labels needed.

    For encoders that nobody can train. What the map loses is lost on the old part only; the new part is searched with
    new queries, so the upgrade ends exactly at the new system.
    """

    name = "compat:adapter"
    needs_old_encoder = False
    merger = "core:distance"
    transform_direction: Direction = "query"

    def check(self, gallery: Gallery, old: Space, new: Space) -> None:
        """Raises ``UpgradeError`` where there is nothing to map or the spaces measure different kinds of distance."""
        _check_spaces(self.name, old, new)

    def fit(self, pairs: TrainingPairs, *, seed: int = 0, kind: Kind = "auto", **settings: Any) -> VectorTransform:
        """From the new space to the old one; settings as in ``fit_adapter``."""
        return fit_adapter(
            pairs.new, pairs.old, kind=kind, source_space=pairs.new_space, target_space=pairs.old_space,
            direction="query", labels=pairs.labels, seed=seed, **settings,
        )  # fmt: skip

    def old_part_queries(
        self, queries: Mapping[str, np.ndarray], old: Space, new: Space, transform: VectorTransform | None = None
    ) -> np.ndarray:
        """``(Q, old.dim)`` unit rows: the new queries through ``transform``.

        Raises ``SpaceError`` for a transform of another direction and for missing queries of the new space,
        ``UpgradeError`` without a transform.
        """
        if transform is None:
            raise UpgradeError(
                f"strategy {self.name!r} needs its transform from {new} to {old}; fit one, or register the one you "
                "have with the gallery."
            )
        if (transform.source, transform.target) != (new.fingerprint, old.fingerprint):
            raise SpaceError(
                f"strategy {self.name!r} needs a transform {new.fingerprint[:12]} -> {old.fingerprint[:12]} (new to "
                f"old); {transform} goes another way."
            )
        if new.fingerprint not in queries:
            raise SpaceError(
                f"strategy {self.name!r} needs queries of the new space {new}; got spaces "
                f"{', '.join(f[:12] for f in queries) or 'none'}"
            )
        return transform(queries[new.fingerprint])


class ReverseTransform(Adapter):
    """New queries through the reverse query transform of online backfilling (Seo et al., arXiv 2301.03767).

    With labels it is trained so that the distances of both systems can be compared (metric-compatible contrastive
    learning), and can find more than the old system did. Without labels it is a regression.

    An encoder that was trained by ``compat:metric-compatible`` brings its own; then nothing is fitted.
    """

    name = "compat:reverse-transform"
    uses_trained_transform = True

    def fit(  # type: ignore[override]  # settings of its own
        self, pairs: TrainingPairs, *, seed: int = 0, hidden: int | None = None, steps: int | None = None,
        lr: float = 5e-3, batch_size: int = 128, temperature: float = 0.1,
    ) -> VectorTransform:  # fmt: skip
        """From the new space to the old one; settings as in ``fit_reverse_transform``, labels where there are any.

        ``steps``: default 600, or 200 for widths above 512.
        """
        from bowerbird_compat.online_backfilling import MetricCompatibleLoss, fit_reverse_transform
        from bowerbird_compat.vector_transforms import to_vector_transform

        if steps is None:
            steps = 600 if pairs.new.shape[1] * pairs.old.shape[1] <= MANY_WEIGHTS else 200
        judged, rows = split_pairs(pairs.new, pairs.old, seed=seed)
        rows, classes = _labelled(pairs, rows)
        loss = None if classes is None else MetricCompatibleLoss(temperature)
        psi = fit_reverse_transform(
            pairs.new[rows], pairs.old[rows], classes, hidden=hidden, loss=loss, steps=steps, lr=lr,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip
        made = to_vector_transform(
            psi, source=pairs.new_space.fingerprint, target=pairs.old_space.fingerprint, method=self.name
        )
        about = {"labels": classes is not None, "steps": steps, "lr": lr, "hidden": hidden}
        return _judged(made, pairs.take(judged), "query", len(rows), about, seed)


class Lift:
    """Stored old vectors through the forward transform of BiCT (arXiv 2204.13919): an upgrade without images.

    ``bowerbird.upgrade.lift`` rewrites the gallery; while it does, the part that is not lifted yet is searched with the
    old encoder's queries.
    """

    name = "compat:lift"
    needs_old_encoder = True
    merger = "core:distance"
    transform_direction: Direction = "gallery"

    def check(self, gallery: Gallery, old: Space, new: Space) -> None:
        """Raises ``UpgradeError`` where there is nothing to lift or the spaces measure different kinds of distance."""
        _check_spaces(self.name, old, new)

    def fit(
        self, pairs: TrainingPairs, *, seed: int = 0, kind: Literal["forward"] | Kind | None = None, **settings: Any
    ) -> VectorTransform:
        """From the old space to the new one.

        Args:
            pairs: A paired sample; labels are used where there are any.
            seed: Of every draw.
            kind: ``forward``: the network of BiCT; any other kind is one of ``fit_adapter``. Default: ``forward`` with
                ``pairs_wanted`` pairs or more; with fewer, a network has more weights than there are numbers to fit,
                and a map in closed form is chosen (``auto``).
            settings: Of ``fit_forward_transform``, or of ``fit_adapter``.
        """
        if kind is None:
            few = len(pairs) < pairs_wanted(pairs.old.shape[1], pairs.new.shape[1])
            kind = "auto" if few and len(pairs) >= MIN_PAIRS and not settings else "forward"
        if kind != "forward":
            made = fit_adapter(
                pairs.old, pairs.new, kind=kind, source_space=pairs.old_space, target_space=pairs.new_space,
                direction="gallery", labels=pairs.labels, seed=seed, **settings,
            )  # fmt: skip
            # The file says for whose queries it lifts, so that a gallery can be lifted without the encoder at hand.
            return replace(made, method=self.name, evidence={**made.evidence, "encoder": pairs.new_space.encoder})
        from bowerbird_compat.bict import fit_forward_transform
        from bowerbird_compat.vector_transforms import to_vector_transform

        judged, rows = split_pairs(pairs.old, pairs.new, seed=seed)
        rows, classes = _labelled(pairs, rows)
        # Some thousand vectors need few and large steps; the defaults of fit_forward_transform are for large sets.
        settings = ({"steps": 400, "lr": 3e-3} if len(rows) < 20_000 else {}) | settings
        # A plan fits this on a sample: 4 times a width of 1280 would take minutes.
        settings = {"hidden": min(4 * max(pairs.old.shape[1], pairs.new.shape[1]), 1024)} | settings
        psi = fit_forward_transform(pairs.old[rows], pairs.new[rows], classes, seed=seed, **settings)
        made = to_vector_transform(
            psi, source=pairs.old_space.fingerprint, target=pairs.new_space.fingerprint, method=self.name
        )
        about = {"labels": classes is not None, "kind": "forward", "encoder": pairs.new_space.encoder}
        return _judged(made, pairs.take(judged), "gallery", len(rows), about, seed)

    def old_part_queries(self, queries: Mapping[str, np.ndarray], old: Space, new: Space) -> np.ndarray:
        """``(Q, old.dim)``: the old encoder's vectors of the queries. Raises ``SpaceError`` where they are missing."""
        if old.fingerprint not in queries:
            raise SpaceError(
                f"strategy {self.name!r} searches what is not lifted yet with queries of the old space {old}; got "
                f"spaces {', '.join(f[:12] for f in queries) or 'none'}"
            )
        return queries[old.fingerprint]


def _check_spaces(name: str, old: Space, new: Space) -> None:
    if old.fingerprint == new.fingerprint:
        raise UpgradeError(f"strategy {name!r} maps between two spaces; old and new are both {old}.")
    if old.metric != new.metric:
        raise UpgradeError(
            f"strategy {name!r} sorts distances of both spaces in one list, but {old.encoder} uses {old.metric} "
            f"and {new.encoder} uses {new.metric}."
        )


def _labelled(pairs: TrainingPairs, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """The rows to fit on and their classes; where less than half have a label, all rows and no classes."""
    if pairs.labels is None:
        return rows, None
    known = np.array([pairs.labels[row] is not None for row in rows.tolist()])
    if known.mean() < 0.5:
        return rows, None
    rows = rows[known]
    _, classes = np.unique([str(pairs.labels[row]) for row in rows.tolist()], return_inverse=True)
    return rows, classes.astype(np.int64)


def _judged(
    made: VectorTransform, held_out: TrainingPairs, direction: Direction, fitted_on: int, about: Mapping[str, Any],
    seed: int,
) -> VectorTransform:  # fmt: skip
    ends = (held_out.new, held_out.old) if direction == "query" else (held_out.old, held_out.new)
    verdict = judge_transform(made, *ends, direction=direction, labels=held_out.labels, seed=seed)
    return replace(made, evidence={**about, "fitted_on": fitted_on, "seed": seed, **verdict.evidence()})
