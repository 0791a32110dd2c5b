"""How an upgrade begins: what is checked, what is fixed from then on, and how a worker joins one that is under way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bowerbird.errors import UpgradeError
from bowerbird.registry import get_registry
from bowerbird.upgrade.backfill import backfill_plan
from bowerbird.upgrade.canary import check_canary
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.fitting import use_transform
from bowerbird.upgrade.lift import refuse_without_images
from bowerbird.upgrade.strategies import load_strategy
from bowerbird.upgrade.watch import WatchSet, freeze_watch

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Space
    from bowerbird.gallery.transform import VectorTransform

TASK_ITEMS = 512
LARGEST_TASK = 8192


def begin(
    gallery: Gallery,
    new: Space | ItemEncoder,
    *,
    strategy: str = "rank-merge",
    order: str = "core:random",
    order_settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    centers: Any = None,
    label_key: str | None = None,
    task_items: int | None = None,
    old_encoder: ItemEncoder | None = None,
    watch_set: WatchSet | None = None,
    on_top: bool = False,
    merger: str | None = None,
    transform: VectorTransform | str | Path | None = None,
    accept_poor_transform: bool = False,
) -> UpgradeState:
    """Start an upgrade. Search results do not change by it.

    Args:
        new: The new space, or its encoder; then a transform's direction is also measured, on items that it encodes.
        strategy: Name of an ``upgrade`` record.
        merger: Name of a ``merger`` record that joins the hits of the parts. Default: the strategy's.
        transform: For a strategy that maps queries (adapter, reverse-transform): its map, or the file of one. It is
            registered with the gallery. Default: for reverse-transform the one that was trained together with the
            encoder, or else the one that is registered.
        accept_poor_transform: Also one that is not usable by its own verdict on held-out pairs, or that has none and
            cannot be measured here; the evidence of its relation then says so.
        order: Name of an ``order`` record.
        order_settings: Its settings, checked against its config model.
        seed: Of the order.
        centers: ``(C, D)`` class centres in the old space, for orders that use them.
        label_key: Metadata key with the items' class; class means of the old vectors are the centres then.
        task_items: Items that a worker leases and commits at once. Default: 512; fewer in a small gallery, so that a
            share at which a run stops is met within two percent, but at least 4; up to 8192 above a million items.
        old_encoder: Where given, it must reproduce stored old vectors (a swapped model of the same size is caught).
        watch_set: Queries whose old results are frozen now; see ``bowerbird.upgrade.watch``.
        on_top: Where an upgrade is under way, begin this one on top of it: from its new space, which with this becomes
            one of the older ones, to ``new``.

    Raises:
        UpgradeError: If an upgrade is under way (without ``on_top``), or the strategy cannot serve this pair of spaces.
        UnknownNameError: If there is no such strategy or order; suggests close names.
    """
    encoder, new = (new, new.space) if isinstance(new, ItemEncoder) else (None, new)
    check_store(gallery, new)
    snapshot = gallery.snapshot()
    if snapshot.upgrade is not None:
        if not on_top:
            raise UpgradeError(
                f"an upgrade of {gallery.path} to {snapshot.spaces[snapshot.upgrade.new]} is {snapshot.upgrade.state}; "
                "finish it or roll it back before another one, or begin this one on top of it (--on-top)"
            )
        check_store(gallery, also=("sequences",))
    old = snapshot.write_space
    name, chosen = load_strategy(strategy)
    chosen.check(gallery, old, new)
    joined_by = get_registry().get("retriever", merger or chosen.merger, role="merger").name
    if old_encoder is not None:
        check_canary(gallery, old_encoder)
    plan = backfill_plan(gallery, order, settings=order_settings, seed=seed, centers=centers, label_key=label_key)
    order_name = get_registry().get("retriever", order, role="order").name
    frozen = freeze_watch(gallery, watch_set, old, new) if watch_set is not None else None
    use_transform(gallery, name, chosen, old, new, transform, encoder=encoder, accept_poor=accept_poor_transform)
    # A commit costs a pass over the numbers of all items: tasks of a very large gallery are larger.
    largest = min(max(TASK_ITEMS, len(plan) // 2000), LARGEST_TASK)
    items_per_task = task_items or min(largest, max(4, -(-len(plan) // 50)))
    state = gallery.store.begin_upgrade(
        new,
        strategy=name,
        merger=joined_by,
        order_name=order_name,
        order=plan,
        task_items=items_per_task,
        settings={
            "seed": seed,
            "order_settings": dict(order_settings or {}),
            "label_key": label_key,
            "task_items": items_per_task,
            "switches_at_end": bool(getattr(chosen, "switches_at_end", False)),
        },
        on_top=on_top,
    )
    try:
        if state.old != old.fingerprint:  # another process ended or began one since: all of this was checked for `old`
            raise UpgradeError(f"{gallery.path} was changed while this upgrade was begun; nothing was begun, try again")
        if frozen is not None:
            frozen.save(gallery, state.id)
    except BaseException:
        gallery.store.rollback()  # nothing has moved; an upgrade that was to be watched is watched, or not begun
        raise
    return state


def join(gallery: Gallery, encoder: ItemEncoder, *, upgrade: int | None = None, **begin_settings: Any) -> UpgradeState:
    """Begin the upgrade to the encoder's space, or check that it is the one under way and that workers may work on it.

    Args:
        upgrade: Begin none; the upgrade under way must be the one of this number.

    Raises:
        UpgradeError: If another upgrade is under way (without ``on_top``), or this one is paused, or the encoder reads
            images and the gallery has none.
        SpaceError: If the encoder does not reproduce the vectors that are new already.
    """
    state = gallery.store.upgrade_state()
    if upgrade is not None and (state is None or state.id != upgrade):
        raise UpgradeError(f"upgrade {upgrade} of {gallery.path} is over")
    another = state is not None and state.new != encoder.space.fingerprint
    if state is None or (another and begin_settings.get("on_top")):
        refuse_without_images(gallery, encoder)
        try:
            return begin(gallery, encoder, **begin_settings)
        except UpgradeError:
            state = gallery.store.upgrade_state()
            if state is None or state.new != encoder.space.fingerprint:
                raise
        # The same command was started elsewhere at the same moment and was the first: this one is another worker of it,
        # and what only the beginning can fix (queries, a map) is the first one's.
        begin_settings = {k: v for k, v in begin_settings.items() if k not in ("watch_set", "transform", "centers")}
    _check_same_upgrade(gallery, state, encoder, begin_settings)
    check_canary(gallery, encoder)
    return state


def check_store(gallery: Gallery, new: Space | None = None, *, also: Sequence[str] = ()) -> None:
    """Refuse early what the store cannot do: an upgrade that could not be taken back is not begun.

    Args:
        new: The space that the upgrade leads to; its vectors must be such as the store can keep.
        also: Further features that are needed, of ``bowerbird.gallery.protocol.FEATURES``.

    Raises:
        UpgradeError: Names the features that are missing.
        SpaceError: If vectors of the new space cannot be kept.
    """
    from bowerbird.gallery.protocol import FEATURES

    if new is not None:
        gallery.storage.check_space(new)

    missing = [name for name in ("rollback", *also) if name not in gallery.features]
    if missing:
        raise UpgradeError(
            f"the store of {gallery.path} cannot run this upgrade. It lacks "
            + ", ".join(f"{name!r} ({FEATURES[name]})" for name in missing)
            + ". Copy the gallery to another store first: `bowerbird gallery copy`"
            + (", or let one process do the work (--workers 1)" if missing == ["many-workers"] else "")
        )


def _check_same_upgrade(
    gallery: Gallery, state: UpgradeState, encoder: ItemEncoder, begin_settings: Mapping[str, Any]
) -> None:
    if state.new != encoder.space.fingerprint:
        target = gallery.snapshot().spaces[state.new]
        raise UpgradeError(
            f"an upgrade of {gallery.path} to {target} is {state.state}, and this encoder makes vectors of "
            f"{encoder.space}. Run it with its own encoder, or finish it or roll it back first, or begin this one "
            "on top of it (--on-top)"
        )
    check_settings(state, begin_settings)
    if state.state == "paused":
        raise UpgradeError(
            f"the upgrade of {gallery.path} is paused; `bowerbird upgrade resume {gallery.path}` lets workers go on"
        )


def check_settings(state: UpgradeState, asked: Mapping[str, Any]) -> None:
    """Settings that are fixed when an upgrade begins are never ignored: they agree, or ``UpgradeError`` names one."""
    registry = get_registry()
    resolve: dict[str, Callable[[Any], Any]] = {
        "strategy": lambda name: load_strategy(name)[0],
        "order": lambda name: registry.get("retriever", name, role="order").name,
        "merger": lambda name: registry.get("retriever", name, role="merger").name,
        "order_settings": dict,
    }
    begun = {"strategy": state.strategy, "order": state.order, "merger": state.merger, **state.settings}
    for name in ("strategy", "order", "merger", "seed", "label_key", "task_items", "order_settings"):
        value = asked.get(name)
        if value is None or value == {}:
            continue
        wanted = resolve.get(name, lambda given: given)(value)
        if name in begun and wanted != begun[name]:
            raise UpgradeError(
                f"the upgrade under way has {name} {begun[name]!r}; {wanted!r} cannot replace it. Leave it out, or "
                "roll the upgrade back first"
            )
    late = [name for name in ("transform", "centers", "watch_set") if asked.get(name) is not None]
    if late:
        raise UpgradeError(f"{late[0]} is fixed when an upgrade begins, and one is under way; leave it out")
