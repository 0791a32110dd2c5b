"""Vectors of a frozen encoder for all training items, so that the encoder need not run in every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird.errors import InputError
from bowerbird_compat.prototypes import evaluating


class FeatureCache:
    """Unit vectors of a frozen encoder, made once and looked up by the id of a sample.

    They are made without augmentation; the authors' code keeps one random augmentation of each image.
    """

    def __init__(self, vectors: Tensor, ids: Sequence[Any] | Tensor) -> None:
        self.vectors = vectors
        self._row = {sample: row for row, sample in enumerate(_plain(ids))}
        if len(self._row) != len(ids) or len(vectors) != len(ids):
            raise InputError(f"{len(ids)} ids, {len(self._row)} of them different, for {len(vectors)} vectors.")

    @classmethod
    def build(
        cls, encoder: Callable[[Any], Any], loader: Iterable[Any], *, key: str = "item_id", normalize: bool = True
    ) -> Self:
        """One pass over ``loader`` in eval mode and without gradients.

        Args:
            encoder: Gets a batch; returns ``(B, D)``, or an object with such a ``pooled``.
            loader: Yields batches with ``key``, or pairs ``(inputs, ids)``, of which the encoder gets the first.
            key: Batch key of the ids: ``item_id``, or ``index``.
            normalize: Whether the vectors get norm 1.

        Raises:
            InputError: No batch, a batch without ids, an id that comes twice, or vectors that are not finite.
        """
        vectors, ids = [], []
        with evaluating(encoder):
            for batch in loader:
                if isinstance(batch, dict) and key not in batch:
                    raise InputError(f"A batch has no {key!r}; it has {', '.join(map(repr, batch))}.")
                inputs, of_batch = (batch, batch[key]) if isinstance(batch, dict) else batch
                output = encoder(inputs)
                made = torch.as_tensor(getattr(output, "pooled", output)).detach().cpu()
                if not torch.isfinite(made).all():
                    raise InputError("The encoder gave vectors that are not finite (NaN or infinity).")
                vectors.append(F.normalize(made) if normalize else made)
                ids += _plain(of_batch)
        if not vectors:
            raise InputError("The loader gave no batch, so there is nothing to keep.")
        return cls(torch.cat(vectors), ids)

    def get(self, ids: Sequence[Any] | Tensor) -> Tensor:
        """``(len(ids), D)`` in the order of ``ids``. Raises ``KeyError`` with an id that is not there."""
        return self.vectors[[self._row[sample] for sample in _plain(ids)]]

    def __len__(self) -> int:
        return len(self.vectors)


def _plain(ids: Sequence[Any] | Tensor) -> list[Any]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
