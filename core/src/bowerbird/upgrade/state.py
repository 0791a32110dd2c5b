"""How far an upgrade is, and what ends it: ``status``, ``pause``, ``resume``, ``finish``, ``rollback``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bowerbird.errors import UpgradeError
from bowerbird.upgrade.canary import check_canary

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.space import Item
    from bowerbird.upgrade.encoding import ItemEncoder


@dataclass(frozen=True)
class UpgradeStatus:
    """An upgrade in numbers.

    Attributes:
        id: Number of the upgrade in its gallery.
        state: ``running`` (workers may work; whether one does is not known) or ``paused``.
        old, new: The two spaces: fingerprint, encoder, dim.
        parts: Every space in which items are searched, the oldest first: fingerprint, encoder, dim, items. Two of them,
            more where upgrades stack.
        covered: How many upgrades this one is on top of.
        merger: What joins the hits of the parts.
        items: Live items; ``old_items`` of them are searched in older spaces, ``new_items`` in the newest.
        share: ``new_items / items``; 1 for an empty gallery.
        failures: ``(id, attempts, error)``; with three attempts an item is left on its old vector.
        tasks: Task state -> tasks.
        complete: Whether nothing is left to encode. Items that failed may still be old.
    """

    id: int
    state: str
    strategy: str
    order: str
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    items: int
    old_items: int
    new_items: int
    share: float
    failures: tuple[tuple[str, int, str], ...]
    tasks: Mapping[str, int]
    complete: bool
    started_at: float
    parts: tuple[Mapping[str, Any], ...] = ()
    covered: int = 0
    merger: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def status(gallery: Gallery) -> UpgradeStatus:
    """The upgrade under way.

    Raises:
        UpgradeError: If there is none; says what became of the last one.
    """
    state = gallery.store.upgrade_state()
    if state is None:
        raise UpgradeError(no_upgrade(gallery))
    snapshot = gallery.store.snapshot()
    progress = gallery.store.progress()
    new = progress.by_space.get(state.new, 0)
    old = sum(progress.by_space.values()) - new
    return UpgradeStatus(
        id=state.id,
        state=state.state,
        strategy=state.strategy,
        order=state.order,
        old=space_dict(snapshot.spaces[state.old]),
        new=space_dict(snapshot.spaces[state.new]),
        items=snapshot.live,
        old_items=old,
        new_items=new,
        share=new / (old + new) if old + new else 1.0,
        failures=tuple((str(item), int(attempts), str(error)) for item, attempts, error in progress.failures),
        tasks=dict(progress.tasks),
        complete=progress.complete,
        started_at=state.started_at,
        parts=tuple(
            {**space_dict(snapshot.spaces[name]), "items": progress.by_space.get(name, 0)} for name in snapshot.stack
        ),
        covered=max(0, len(snapshot.upgrades) - 1),
        merger=state.merger,
    )


def no_upgrade(gallery: Gallery) -> str:
    """The sentence for a gallery that is not being upgraded."""
    text = f"no upgrade is under way in {gallery.path}"
    history = gallery.store.history()
    if history:
        no_way_back = ", which cannot be undone" if history[-1]["state"] == "finished" else ""
        text += f" (the last one, number {history[-1]['id']}, was {history[-1]['state']}{no_way_back})"
    return f"{text}; `bowerbird upgrade run {gallery.path} --to ENCODER` begins one"


def pause(gallery: Gallery) -> UpgradeStatus:
    """Let no worker take another task. Serving goes on. Workers commit what they have in hand, then stop."""
    status(gallery)
    gallery.store.pause()
    return status(gallery)


def resume(gallery: Gallery) -> UpgradeStatus:
    """Let workers take tasks again; start one with ``run``."""
    status(gallery)
    gallery.store.resume()
    return status(gallery)


def finish(gallery: Gallery, *, encoder: ItemEncoder | None = None, accept_failed: bool = False) -> dict[str, Any]:
    """Serve the new space only and drop the old vectors. There is no way back.

    Where upgrades stack, the topmost one is finished, every older space is dropped, and the upgrades below end with it.

    Verified first: every item has a new vector, the checksums of the gallery hold, and, where ``encoder`` is given, it
    reproduces a sample of the new vectors.

    Args:
        encoder: Of the new space.
        accept_failed: Items that could not be encoded lose their old vector: they stay in the gallery and are not found
            by searches until they get a vector.

    Returns:
        ``{"items", "pending", "canary"}``: live items, those left without a vector, and the median cosine of
        the sample (``None`` without an encoder).

    Raises:
        UpgradeError: If items are still old, or verification fails; nothing is changed.
        SpaceError: If the encoder does not reproduce the new vectors.
    """
    now = status(gallery)
    given_up = [item for item, attempts, _ in now.failures if attempts >= 3]
    waiting = now.items - now.new_items
    if not now.complete or (waiting and waiting > len(given_up)):
        raise UpgradeError(
            f"{waiting} of {now.items} items are not in the new space yet; "
            f"`bowerbird upgrade run {gallery.path}` goes on with them"
        )
    if waiting and not accept_failed:
        first = next((item, error) for item, attempts, error in now.failures if attempts >= 3)
        raise UpgradeError(
            f"{waiting} items could not be encoded and are served by their old vectors; the first is {first[0]!r}: "
            f"{first[1]}. Repair them and `bowerbird upgrade run {gallery.path} --retry-failed`, delete them, or "
            "accept (--accept-failed) that searches will not find them"
        )
    if encoder is not None and encoder.space.fingerprint != now.new["fingerprint"]:
        raise UpgradeError(
            f"the upgrade under way leads to space {now.new['fingerprint'][:12]} ({now.new['encoder']}); the encoder "
            f"that was given makes vectors of {encoder.space}"
        )
    cosine = check_canary(gallery, encoder) if encoder is not None else None
    report = gallery.verify()
    if not report.ok:
        raise UpgradeError(f"the gallery does not pass its verification, so nothing is dropped: {report}")
    gallery.store.finish_upgrade(verified=True, leave_pending=accept_failed)
    return {"items": now.items, "pending": len(gallery.pending()), "canary": cosine}


def rollback(gallery: Gallery, *, encode_old: Any = None, leave_pending: bool = False) -> int:
    """Back to the exact old state, at any time before ``finish``. Old vectors were never touched.

    Where upgrades stack, the topmost one is rolled back; the one below is uncovered as it was, paused.

    Args:
        encode_old: The old encoder (``ItemEncoder``), or a function of a list of items; needed only for items that were
            added or edited during the upgrade.
        leave_pending: Keep such items without a vector instead.

    Returns:
        How many items were left without a vector.

    Raises:
        UpgradeError: If no upgrade is under way, or items need an old vector and neither argument is given.
    """
    now = status(gallery)
    if encode_old is None or not hasattr(encode_old, "items"):
        return gallery.store.rollback(encode_old=encode_old, leave_pending=leave_pending)
    if encode_old.space.fingerprint != now.old["fingerprint"]:
        raise UpgradeError(
            f"rollback needs the encoder of the old space {now.old['fingerprint'][:12]} ({now.old['encoder']}); "
            f"the one that was given makes vectors of {encode_old.space}"
        )

    def encode(items: list[Item]) -> Any:
        result = encode_old.items(items)
        if result.failures:
            position, error = next(iter(result.failures.items()))
            raise UpgradeError(
                f"{len(result.failures)} items that came during the upgrade cannot be encoded by the old encoder, the "
                f"first is {items[position].id!r}: {error}. Delete them, or leave them pending; nothing was changed"
            )
        return result.vectors

    return gallery.store.rollback(encode_old=encode, leave_pending=leave_pending)


def space_dict(space: Any) -> dict[str, Any]:
    return {"fingerprint": space.fingerprint, "encoder": space.encoder, "dim": space.dim}
