"""Promise: an upgrade starts where the old system was and ends where the new one is. Bit for bit, list for list.

The quick version runs always; BOWERBIRD_PROMISES=full is the one whose result is in benchmarks/results/promises.json.
"""

from __future__ import annotations

import numpy as np
import pytest
import upgrade_world
from promises_world import FULL, promise  # noqa: F401  # a fixture
from upgrade_world import by_item, item_id, make_gallery, new_encoder, old_encoder, query_vectors

from bowerbird.gallery import Gallery
from bowerbird.registry import get_registry
from bowerbird.upgrade import begin, finish
from bowerbird.upgrade.run import run
from bowerbird.upgrade.serve import serve

ITEMS = 20_000 if FULL else 2_000
QUERIES = 1_000


@pytest.fixture(autouse=True)
def world():
    get_registry().register_module("world", upgrade_world)
    yield
    get_registry().unregister("world")


def changed(a, b) -> int:
    """How many of the lists differ, in an id or in a bit of a distance."""
    return sum(
        one != other or left.tobytes() != right.tobytes()
        for one, other, left, right in zip(a.ids, b.ids, a.distances, b.distances, strict=True)
    )


def test_no_top_10_list_of_1000_queries_changes_at_the_start_and_at_the_end_all_are_those_of_the_new_system(
    tmp_path,
    promise,  # noqa: F811
):
    old, new = old_encoder(), new_encoder()
    queries = query_vectors(first=100_000, count=QUERIES)
    with make_gallery(tmp_path / "g", ITEMS) as gallery:
        before = gallery.search(queries[old.fingerprint], 10)
        service = serve(gallery)
        begin(gallery, new.space(), strategy="world:two-queries")
        start = changed(service.search(vectors=queries, k=10), before)
        run(gallery, by_item(new), stop_at_share=0.5)
        middle = changed(service.search(vectors=queries, k=10), before)
        run(gallery, by_item(new))
        with Gallery.create(tmp_path / "new", new.space()) as fresh:
            fresh.add([item_id(n) for n in range(ITEMS)], new.vectors(range(ITEMS)))
            after = fresh.search(queries[new.fingerprint], 10)
        end = changed(service.search(vectors=queries, k=10), after)
        finish(gallery)
        finished = changed(service.search(vectors=queries, k=10), after)
        finished += changed(gallery.search(queries[new.fingerprint], 10), after)
        assert gallery.verify().ok
    promise.update(
        promise="service starts at the old system and ends at the new one", items=ITEMS, queries=QUERIES,
        changed_at_start=start, changed_half_way=middle, changed_at_end=end, changed_after_finish=finished,
    )  # fmt: skip
    assert (start, end, finished) == (0, 0, 0)
    assert middle > QUERIES // 2, "in between it is neither: the test can tell lists apart"
    assert np.all(np.isfinite(after.distances))
