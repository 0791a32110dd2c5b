"""Which queries reach which vectors: along registered relations, over several hops, and never otherwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_world import V1, V2, V3, V4, a_map, begin, brute_force, match_width, queries, stored, work

from bowerbird.errors import SpaceError
from bowerbird.gallery import Gallery, Relation, Space
from bowerbird.gallery.routing import find_route
from bowerbird.gallery.space import LIFTED

SPACES = {space.fingerprint: space for space in (V1, V2, V3, V4)}


def compatible(new: Space, old: Space) -> Relation:
    return Relation("compatible", new.fingerprint, old.fingerprint)


def transform(new: Space, old: Space) -> Relation:
    return Relation("transform", new.fingerprint, old.fingerprint)


def kinds(available, target, relations):
    route = find_route([space.fingerprint for space in available], target.fingerprint, relations, SPACES)
    return None if route is None else (SPACES[route.source].encoder, *route.kinds)


def test_the_own_space_comes_first_then_fewer_hops_then_transforms():
    related = [compatible(V3, V1), transform(V2, V1), transform(V3, V2), transform(V3, V1)]
    assert kinds([V3, V1], V1, related) == ("tests:v1",)
    assert kinds([V3], V1, related) == ("tests:v3", "transform")
    assert kinds([V3], V1, related[:3]) == ("tests:v3", "compatible")
    assert kinds([V3], V1, related[1:3]) == ("tests:v3", "transform", "transform")
    assert kinds([V2, V3], V1, [compatible(V3, V1), transform(V2, V1)]) == ("tests:v2", "transform")


def test_relations_have_a_direction_and_cycles_end():
    assert kinds([V1], V2, [compatible(V2, V1), transform(V2, V1)]) is None
    ring = [compatible(V1, V2), compatible(V2, V3), compatible(V3, V1)]
    assert kinds([V1], V3, ring) == ("tests:v1", "compatible", "compatible")
    assert kinds([V4], V1, ring) is None


def test_of_two_routes_that_are_alike_one_is_taken():
    diamond = [transform(V4, V2), transform(V4, V3), transform(V2, V1), transform(V3, V1)]
    assert kinds([V4], V1, diamond) == ("tests:v4", "transform", "transform")
    assert kinds([V4], V1, diamond[::-1]) == ("tests:v4", "transform", "transform")


def test_a_lifted_space_prefers_queries_of_the_space_that_it_stands_for():
    lifted = Space("lifted" * 4, LIFTED + V2.encoder, V2.dim)
    related = [transform(V1, lifted), compatible(V2, lifted)]
    route = find_route([V1.fingerprint, V2.fingerprint], lifted.fingerprint, related, {**SPACES, "lifted" * 4: lifted})
    assert route is not None and route.kinds == ("compatible",)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_route_is_found_exactly_where_one_exists_and_none_is_shorter(data):
    names = [f"s{n}" for n in range(6)]
    spaces = {name: Space(name, f"tests:{name}", 4) for name in names}
    kind, name = st.sampled_from(["transform", "compatible"]), st.sampled_from(names)
    edges = data.draw(st.lists(st.tuples(kind, name, name).filter(lambda edge: edge[1] != edge[2]), max_size=12))
    relations = [Relation(*edge) for edge in edges]
    available = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
    target = data.draw(st.sampled_from(names))
    reach, steps = set(available), 0
    while target not in reach and steps < len(names):
        reach |= {old for _, new, old in edges if new in reach}
        steps += 1
    route = find_route(available, target, relations, spaces)
    if target not in reach:
        assert route is None
        return
    assert route is not None and len(route.hops) == steps
    walk = [route.source, *(hop.old for hop in route.hops)]
    assert route.source in available and walk[-1] == target
    assert all(hop.new == here for hop, here in zip(route.hops, itertools.chain(walk), strict=False))


@pytest.fixture
def three(tmp_path):
    """A gallery with parts of three versions."""
    from gallery_world import vectors

    names = [f"id-{n}" for n in range(60)]
    with Gallery.create(tmp_path / "g", V1) as gallery:
        gallery.add(names, vectors(names, V1))
        begin(gallery, V2)
        work(gallery, 8)
        begin(gallery, V3)
        work(gallery, 4)
        assert all(part.count for part in gallery.snapshot().parts)
        yield gallery


def test_one_query_reaches_every_part_over_several_hops(three):
    mapped = a_map(V3, V2)
    three.register_transform(mapped, accept_unmeasured=True)
    three.relate(V2.fingerprint, V1.fingerprint)
    given = queries([V3])
    second = mapped(given[V3.fingerprint])
    by_space = {**given, V2.fingerprint: second, V1.fingerprint: match_width(second, V1.dim)}
    assert three.search(given, 9).ids == brute_force(three, by_space, 9)


def test_the_parts_and_spaces_of_a_result_say_where_each_hit_was_found(three):
    found = three.search(queries([V1, V2, V3]), 20)
    parts = three.snapshot().parts
    assert found.spaces == (V1.fingerprint, V2.fingerprint, V3.fingerprint)
    for number, part in enumerate(parts):
        assert np.array_equal(found.parts == number, np.isin(found.nums, part.nums))
    assert np.array_equal(found.sides == 1, found.parts == 2)


def test_an_unrelated_space_is_refused_also_where_widths_agree(three):
    three.register_space(V4)  # as wide as V1
    with pytest.raises(SpaceError, match=r"items are in space v1v1.*no registered relation"):
        three.search(queries([V2, V3, V4]), 3)
    three.register_transform(a_map(V1, V4), accept_unmeasured=True)  # the other direction
    with pytest.raises(SpaceError, match="no registered relation"):
        three.search(queries([V2, V3, V4]), 3)
    three.relate(V1.fingerprint, V4.fingerprint)
    with pytest.raises(SpaceError, match="no registered relation"):
        three.search(queries([V2, V3, V4]), 3)
    three.register_transform(a_map(V4, V1), accept_unmeasured=True)
    assert len(three.search(queries([V2, V3, V4]), 3)) == 3


def test_a_space_that_the_gallery_does_not_know_is_refused(three):
    with pytest.raises(SpaceError, match="does not know"):
        three.search({**queries([V1, V2, V3]), V4.fingerprint: np.ones((3, V4.dim))}, 3)
    assert stored(three)[V1.fingerprint]
