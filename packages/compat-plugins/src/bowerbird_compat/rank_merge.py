"""``compat:rank-merge``: the strategy of an upgrade that trains nothing.

Distance rank merge of Seo et al., "Online Backfilling with No Regret for Large-Scale Image Retrieval" (arXiv
2301.03767): the part of the gallery that still has old vectors is searched with the old encoder's query, the other
part with the new encoder's, and the two lists are joined by distance. Before the first item has moved that is exactly
the old system, after the last one exactly the new system. The price is a second encoder pass per query in between.

The two models' distances are compared as they are. Where they are not on one scale, the model with the smaller ones
crowds the other's items out, and quality may fall below the old system's on the way: the merger ``core:zscore`` is for
that (``--merger zscore``), and ``bowerbird upgrade plan`` forecasts every merger.

No torch here: a process that serves a gallery loads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from bowerbird.errors import SpaceError, UpgradeError

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Space


class RankMerge:
    """The old part is searched in the old space. Works for any two encoders, of any sizes."""

    needs_old_encoder = True
    merger = "core:distance"

    def check(self, gallery: Gallery, old: Space, new: Space) -> None:
        """Raises ``UpgradeError`` where the distances of the two spaces are of different kinds."""
        if old.metric != new.metric:
            raise UpgradeError(
                f"strategy 'compat:rank-merge' sorts the distances of both spaces in one list, but {old.encoder} uses "
                f"{old.metric} and {new.encoder} uses {new.metric}. Register the new space with {old.metric}."
            )

    def old_part_queries(self, queries: Mapping[str, np.ndarray], old: Space, new: Space) -> np.ndarray:
        """``(Q, old.dim)``: the old encoder's vectors of the queries. Raises ``SpaceError`` where they are missing."""
        if old.fingerprint not in queries:
            raise SpaceError(
                f"strategy 'compat:rank-merge' needs each query encoded by the old encoder {old.encoder} "
                f"(space {old.fingerprint[:12]}); got spaces {', '.join(f[:12] for f in queries) or 'none'}"
            )
        return queries[old.fingerprint]
