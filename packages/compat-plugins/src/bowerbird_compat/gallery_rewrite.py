"""Rewrite stored vectors with forward transforms: once per item, resumable, never in the wrong direction.

Su et al. 2022 (arXiv 2204.13919), see ``bict``. A version is the fingerprint of a space, or any name for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.protocols import Transform
from bowerbird_compat.prototypes import evaluating

MIN_DRIFT_ITEMS = 30  # below that, the spread of a mean hides any drift


class VectorStore(Protocol):
    """Where the vectors are kept. ``write`` must change vectors and versions together, or neither."""

    def versions(self) -> Sequence[Hashable]:
        """The version of every item."""

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """``(M, D)`` vectors of items of one version."""

    def write(self, positions: NDArray[np.int64], vectors: NDArray[np.float32], version: Hashable) -> None:
        """Replace ``(M, D')`` vectors, which then have ``version``."""


class VersionedVectors:
    """A ``VectorStore`` in memory. Vectors of different versions may have different sizes.

    Args:
        vectors: ``(N, D)``.
        version: Of all of them.
    """

    def __init__(self, vectors: ArrayLike, version: Hashable) -> None:
        self._rows: list[NDArray[np.float32]] = []
        self._versions: list[Hashable] = []
        self.add(vectors, version)

    def add(self, vectors: ArrayLike, version: Hashable) -> None:
        made = np.array(vectors, dtype=np.float32)
        if made.ndim != 2:
            raise InputError(f"Vectors have shape {made.shape}; (N, D) is needed.")
        self._rows += list(made)
        self._versions += [version] * len(made)

    def __len__(self) -> int:
        return len(self._rows)

    def versions(self) -> Sequence[Hashable]:
        return tuple(self._versions)

    def read(self, positions: ArrayLike) -> NDArray[np.float32]:
        rows = [self._rows[i] for i in np.asarray(positions, dtype=np.int64)]
        if len({len(row) for row in rows}) > 1:
            raise InputError("These items have vectors of different sizes; read items of one version.")
        return np.stack(rows)

    def write(self, positions: ArrayLike, vectors: ArrayLike, version: Hashable) -> None:
        for i, row in zip(np.asarray(positions, dtype=np.int64), np.array(vectors, dtype=np.float32), strict=True):
            self._rows[i], self._versions[i] = row, version


@dataclass(frozen=True)
class UpgradeReport:
    """What ``upgrade_gallery`` did.

    Attributes:
        transformed: Items that were lifted (with ``dry_run``: that would be).
        already: Items that had the target version before.
        skipped: Items of any other version, left as they are: version -> how many.
        mean_shift: Root mean square over the units before the first batch norm of ``(mean here - running mean) /
            running deviation``; ``None`` without batch norm or with fewer than 30 items.
        variance_ratio: Median over those units of the variance here by the running variance.
        warnings: What to look at.
    """

    transformed: int
    already: int
    skipped: Mapping[Hashable, int]
    mean_shift: float | None = None
    variance_ratio: float | None = None
    warnings: tuple[str, ...] = ()


def upgrade_gallery(
    store: VectorStore,
    transform: Transform,
    *,
    from_version: Hashable,
    to_version: Hashable,
    batch_size: int = 4096,
    resume: bool = True,
    dry_run: bool = False,
    normalize: bool = True,
) -> UpgradeReport:
    """Lift every item of ``from_version``; others are counted and left alone, so that running it again does nothing.

    Args:
        store: Where the vectors are.
        transform: psi from ``from_version`` to ``to_version``. Run in eval mode, so that an item's vector does not
            depend on the others.
        from_version, to_version: Different. Where the transform knows its source and target, they must be these.
        batch_size: Items per chunk; each is written when it is done.
        resume: Whether items of ``to_version`` may be there already, from an interrupted run or added since.
        dry_run: Do everything but write.
        normalize: Whether lifted vectors are written with norm 1.

    Raises:
        SpaceError: The transform is for another direction.
        InputError: (a ``ValueError``) Equal versions, no such setting, items of ``to_version`` without ``resume``, or
            vectors of a size that the transform does not take.
        DataError: A lifted vector is not finite, or zero where it must be normalised. Its chunk is not written.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    if from_version == to_version:
        raise InputError(f"from_version and to_version are both {from_version!r}; a second run would lift twice.")
    for end, known, asked in (("from", transform.source, from_version), ("to", transform.target, to_version)):
        if known and known != asked:
            raise SpaceError(f"The transform goes {end} {known!r}, and the gallery shall go {end} {asked!r}.")
    positions: list[int] = []
    already, skipped = 0, dict[Hashable, int]()
    for i, version in enumerate(store.versions()):
        if version == from_version:
            positions.append(i)
        elif version == to_version:
            already += 1
        else:
            skipped[version] = skipped.get(version, 0) + 1
    if already and not resume:
        raise InputError(f"{already} items already have version {to_version!r}; use resume=True to do the rest.")

    drift = _Drift(transform)
    with evaluating(transform):
        for start in range(0, len(positions), batch_size):
            chunk = np.array(positions[start : start + batch_size], dtype=np.int64)
            vectors = torch.from_numpy(np.ascontiguousarray(store.read(chunk)))
            parameter = next(transform.parameters(), None)
            lifted = transform(vectors if parameter is None else vectors.to(parameter.device))
            lifted = _usable(lifted, chunk, normalize)
            if not dry_run:
                store.write(chunk, lifted, to_version)
    mean_shift, variance_ratio = drift.close()
    warnings = []
    if mean_shift is not None and variance_ratio is not None and (mean_shift > 0.5 or not 0.5 < variance_ratio < 2):
        warnings.append(
            f"The gallery differs from what the transform was trained on: hidden means are off by {mean_shift:.2f} "
            f"deviations, variances by a factor of {variance_ratio:.2f}. Measure before serving."
        )
    return UpgradeReport(len(positions), already, skipped, mean_shift, variance_ratio, tuple(warnings))


def _usable(lifted: Tensor, positions: NDArray[np.int64], normalize: bool) -> NDArray[np.float32]:
    broken = ~torch.isfinite(lifted).all(dim=1)
    if normalize:
        broken |= ~lifted.any(dim=1)
        lifted = F.normalize(lifted)
    if broken.any():
        first = positions[int(broken.nonzero()[0])]
        raise DataError(
            f"{int(broken.sum())} lifted vectors are zero or not finite, the first that of item {first}; its chunk "
            "was not written. Check the stored vectors and the transform."
        )
    made: NDArray[np.float32] = lifted.float().cpu().numpy()
    return made


class _Drift:
    """Mean and variance of what goes into the first batch norm, over all chunks."""

    def __init__(self, transform: nn.Module) -> None:
        self.norm = next((m for m in transform.modules() if isinstance(m, nn.BatchNorm1d)), None)
        self.count, self.sum, self.squares = 0, torch.zeros(1), torch.zeros(1)
        self.handle = None if self.norm is None else self.norm.register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().double().cpu()
        self.count += len(values)
        self.sum, self.squares = self.sum + values.sum(0), self.squares + values.square().sum(0)

    def close(self) -> tuple[float | None, float | None]:
        if self.handle is not None:
            self.handle.remove()
        norm = self.norm
        if norm is None or self.count < MIN_DRIFT_ITEMS or norm.running_mean is None or norm.running_var is None:
            return None, None
        mean = self.sum / self.count
        variance = self.squares / self.count - mean.square()
        running = norm.running_var.double().cpu() + norm.eps
        shift = (mean - norm.running_mean.double().cpu()) / running.sqrt()
        return float(shift.square().mean().sqrt()), float((variance / running).median())


class TransformChain:
    """Transforms between successive versions, for a gallery that is some versions behind.

    Args:
        links: ``(from_version, to_version) -> transform``; or transforms that know their source and target.
    """

    def __init__(self, links: Mapping[tuple[Hashable, Hashable], Transform] | Iterable[Transform]) -> None:
        self._links: dict[tuple[Hashable, Hashable], Transform]
        if isinstance(links, Mapping):
            self._links = dict(links)
        else:
            transforms: Iterable[Transform] = links
            self._links = {(link.source, link.target): link for link in transforms}
        for (start, end), link in self._links.items():
            if (link.source and link.source != start) or (link.target and link.target != end):
                raise SpaceError(
                    f"The transform for {start!r} -> {end!r} was made for {link.source!r} -> {link.target!r}."
                )

    def compose(self, versions: Sequence[Hashable], *, normalize: bool = True) -> Transform:
        """One transform through ``versions``, the same as one call of ``upgrade_gallery`` after the other.

        Args:
            versions: At least two, the oldest first.
            normalize: Whether the vectors get norm 1 after each step.

        Raises:
            InputError: (a ``ValueError``) A step for which there is no transform; it and those there are are named.
        """
        if len(versions) < 2:
            raise InputError(f"versions are {list(versions)}; at least two are needed.")
        steps = []
        for step in pairwise(versions):
            if step not in self._links:
                known = ", ".join(f"{a!r} -> {b!r}" for a, b in self._links) or "none"
                raise InputError(f"No transform for {step[0]!r} -> {step[1]!r}; there are: {known}.")
            steps.append(self._links[step])
        return ComposedTransform(steps, normalize)


class ComposedTransform(Transform):
    """What ``TransformChain.compose`` returns: ``steps`` one after the other."""

    def __init__(self, steps: Sequence[Transform], normalize: bool) -> None:
        super().__init__()
        self.steps, self.normalize = nn.ModuleList(steps), normalize
        self.source, self.target = steps[0].source, steps[-1].target

    def forward(self, vectors: Tensor) -> Tensor:
        for step in self.steps:
            vectors = F.normalize(step(vectors)) if self.normalize else step(vectors)
        return vectors
