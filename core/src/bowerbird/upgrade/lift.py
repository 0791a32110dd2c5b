"""``lift``: an upgrade that reads no image. Stored vectors are mapped towards the new space by a registered transform.

Made for galleries whose images are gone, and for those that want the new model's queries to work today: a forward
transform (BiCT, BT^2, an adapter; see docs/methods) rewrites 1M vectors in seconds. What comes out are not the new
encoder's vectors, so they have a space of their own, the *lifted space*: its identity is the transform and the new
space, its width that of the new space, and queries of the new encoder are registered as compatible with it. Where
images exist, an upgrade from the lifted space to the new one replaces them later by the real vectors.

Everything else is an upgrade like any other: leases, many workers, resume, exact rollback, verification at ``finish``.

N items, D width of a space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bowerbird.errors import SpaceError, UpgradeError
from bowerbird.gallery.routing import Route, find_route
from bowerbird.gallery.space import LIFTED, Space
from bowerbird.gallery.transform import VectorTransform, with_evidence
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.fitting import encoded_pairs
from bowerbird.upgrade.strategies import load_strategy

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.protocol import Snapshot
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Item

TASK_ITEMS = 65_536  # a transform is cheap: what costs is the commit
WORKER_LOADER = "bowerbird.upgrade.lift:lift_in_worker"


def lifted_space(transform: VectorTransform, new: Space) -> Space:
    """The space of vectors that ``transform`` makes: like ``new``, but with an identity of its own.

    Raises:
        SpaceError: If the transform does not lead to ``new``.
    """
    if (transform.target, transform.dim_out) != (new.fingerprint, new.dim):
        raise SpaceError(
            f"the transform {transform} makes {transform.dim_out}-d vectors for space {transform.target[:12]}, and "
            f"{new} is to be reached"
        )
    digest = hashlib.sha256(f"lifted {transform.fingerprint} {new.fingerprint}".encode()).hexdigest()
    return Space(digest, LIFTED + new.encoder, new.dim)


def refuse_lift_amid(gallery: Gallery, on_top: bool) -> None:
    """``UpgradeError`` where an upgrade is under way on which the lift is not to be begun."""
    snapshot = gallery.snapshot()
    if snapshot.upgrade is not None and not on_top:
        raise UpgradeError(
            f"an upgrade of {gallery.path} to {snapshot.write_space} is {snapshot.upgrade.state}; finish it or roll it "
            "back first, or lift on top of it (--on-top)"
        )


def begin_lift(
    gallery: Gallery,
    transform: VectorTransform,
    new: Space | ItemEncoder | None = None,
    *,
    strategy: str = "rank-merge",
    pairs: tuple[Any, Any] | None = None,
    task_items: int = TASK_ITEMS,
    on_top: bool = False,
    accept_poor: bool = False,
) -> UpgradeState:
    """Start to lift a gallery. Search results do not change by it.

    Registered with it: the transform, as leading to the lifted space, and ``compatible(new -> lifted)``. So queries of
    the new encoder search what is lifted, and queries and uploads of the old one can still be lifted when they come.

    Args:
        transform: From the space that the gallery is written in to the new one.
        new: The new space, or its encoder; then the direction is checked on items whose images can be read. Default:
            the space that the transform's file names.
        strategy: How the part that is not lifted yet is searched meanwhile (an ``upgrade`` record).
        pairs: ``(old vectors (N, Do), new vectors (N, Dn))`` of the same items, on which the direction is checked.
        on_top: Begin on top of an upgrade that is under way. Every part with items must be led to the transform's
            source by registered transforms.
        accept_poor: Also a transform that is not usable by its own verdict on held-out pairs, or that has none and is
            not measured here either; the evidence of its relation then says so.

    Raises:
        SpaceError: If the transform has the other direction, comes from another space, does not fit the pairs, or
            nothing shows its direction: no verdict in its evidence, no pairs, no items that the new encoder encodes.
        UpgradeError: If the transform is not usable by its own verdict, an upgrade is under way (without ``on_top``),
            or the strategy cannot serve this pair of spaces.
    """
    refuse_lift_amid(gallery, on_top)
    snapshot = gallery.snapshot()
    old = snapshot.write_space
    target = new.space if isinstance(new, ItemEncoder) else new or snapshot.spaces.get(transform.target)
    if target is None:
        target = Space(transform.target, str(transform.evidence.get("encoder", "unknown encoder")), transform.dim_out)
    if transform.source != old.fingerprint:
        if (transform.source, transform.target) == (target.fingerprint, old.fingerprint) or (
            transform.target == old.fingerprint
        ):
            raise SpaceError(
                f"the transform {transform} goes the other way: it maps to {old}, the space of the stored vectors, and "
                "a lift needs one from there. It can map queries instead (strategy reverse-transform or adapter)"
            )
        raise SpaceError(f"the transform {transform} takes vectors of another space than the stored ones, {old}")
    refuse_second_lift(gallery, target)
    lifted = lifted_space(transform, target)
    if transform.evidence.get("usable") is False and not accept_poor:
        verdict = str(transform.evidence.get("verdict", "not usable"))
        sentence = str(transform.evidence.get("sentence", "its evidence says so."))
        said = sentence.removeprefix(f"{verdict.capitalize()}: ")  # the sentence begins with the verdict
        raise UpgradeError(
            f"the transform {transform} is {verdict}: {said} Fit another one, or accept it "
            "(accept_poor=True, --accept-poor-transform)"
        )
    if pairs is None and isinstance(new, ItemEncoder):
        pairs = encoded_pairs(gallery, new)
    transform = with_evidence(
        transform,
        pairs,
        accept=accept_poor,
        ask="Give pairs of vectors of the same items (--old-pairs and --new-pairs, pairs=(old, new)) or an encoder "
        "that can encode stored items (--to), or accept it (--accept-poor-transform, accept_poor=True)",
    )
    name, chosen = load_strategy(strategy)
    gallery.register_space(target)
    gallery.register_space(lifted)
    own = replace(transform, target=lifted.fingerprint)
    gallery.register_transform(own)
    gallery.relate(target.fingerprint, lifted.fingerprint, evidence={**transform.evidence, "lifted": transform.method})
    chosen.check(gallery, old, lifted)
    _routes(gallery.snapshot(), lifted.fingerprint, snapshot.parts)
    return gallery.store.begin_upgrade(
        lifted,
        strategy=name,
        merger=chosen.merger,
        order_name="stored",
        task_items=task_items,
        settings={
            "lift": own.fingerprint,
            "task_items": task_items,
            "switches_at_end": bool(getattr(chosen, "switches_at_end", False)),
        },
        on_top=on_top,
    )


def lifter(gallery: Gallery) -> ItemEncoder:
    """The "encoder" of the lift under way: it maps the older vectors of items and never looks at their content.

    Give it to ``bowerbird.upgrade.run`` (which then works on the lift) and to ``finish``.

    Raises:
        UpgradeError: If the upgrade under way is no lift.
    """
    snapshot = gallery.snapshot()
    if snapshot.upgrade is None or not snapshot.write_space.lifted:
        what = "no upgrade is under way" if snapshot.upgrade is None else f"it moves items to {snapshot.write_space}"
        raise UpgradeError(
            f"the gallery {gallery.path} is not being lifted: {what}. `bowerbird upgrade lift {gallery.path} "
            "--transform FILE` begins a lift"
        )
    lifted = snapshot.write_space

    def lift_items(items: Sequence[Item]) -> np.ndarray:
        now = gallery.snapshot()
        if now.upgrade is None or now.upgrade.new != lifted.fingerprint:
            raise UpgradeError(f"the lift of {gallery.path} has ended")
        nums = np.array([item.num for item in items], np.int64)
        out = np.full((len(nums), lifted.dim), np.nan, np.float32)
        below = now.parts_below
        for part, route in zip(below, _routes(now, lifted.fingerprint, below), strict=True):
            chosen = part.contains(nums)
            if route is not None and chosen.any():
                out[chosen] = gallery.apply_route(route, part.vectors_of(nums[chosen]), now)
        return out

    return ItemEncoder(lift_items, space=lifted, batch_size=TASK_ITEMS)


def refuse_second_lift(gallery: Gallery, new: Space) -> None:
    """Raise ``UpgradeError`` where the stored vectors were lifted to the space ``new`` already."""
    now = gallery.snapshot().write_space
    if now.lifted and gallery.compatible(new.fingerprint, now.fingerprint):
        raise UpgradeError(
            f"the vectors of {gallery.path} were lifted to {new} already; a second map would only add its error. "
            f"`bowerbird upgrade run {gallery.path} --to ENCODER` replaces them by the encoder's own"
        )


def lift_in_worker(settings: Mapping[str, Any], gallery: Gallery, space: Space, index: int) -> ItemEncoder:
    """The encoder of a worker process (``Job.loader``)."""
    return lifter(gallery)


def refuse_without_images(gallery: Gallery, encoder: ItemEncoder) -> None:
    """Raise ``UpgradeError`` where an encoder reads images and the items have none; says what to do instead."""
    if not encoder.reads_images:
        return
    nums = np.sort(np.concatenate([part.nums for part in gallery.snapshot().parts]))
    if not len(nums):
        return
    chosen = nums[np.unique(np.linspace(0, len(nums) - 1, 1000).astype(np.int64))]
    if not any(item.uri for item in gallery.store.items(chosen).values()):
        raise UpgradeError(
            f"the items of {gallery.path} have no images (none of {len(chosen)} sampled ones has a uri), and the "
            f"encoder of {encoder.space} reads images. Lift the stored vectors instead (`bowerbird upgrade lift "
            f"{gallery.path} --transform FILE`), or give ready vectors of the new space in the place of the encoder "
            "(vectors:FILE)"
        )


def _routes(snapshot: Snapshot, lifted: str, parts: Sequence[Any]) -> list[Route | None]:
    """For each part the way of its vectors to the lifted space, by transforms alone; ``None`` for an empty part."""
    transforms = [relation for relation in snapshot.relations if relation.kind == "transform"]
    routes: list[Route | None] = []
    for part in parts:
        route = find_route([part.space.fingerprint], lifted, transforms, snapshot.spaces) if part.count else None
        if part.count and route is None:
            raise UpgradeError(
                f"{part.count} items are in space {part.space}, and no registered transform leads from there to the "
                "lifted space. Register one, or finish the upgrade under way first"
            )
        routes.append(route)
    return routes
