"""``Upgrade``: the five verbs on one object. Each is a function of its own module; this only remembers the encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bowerbird.errors import InputError, UpgradeError
from bowerbird.gallery.gallery import Gallery
from bowerbird.gallery.open import open_gallery
from bowerbird.upgrade import lift as _lift
from bowerbird.upgrade import plan as _plan
from bowerbird.upgrade import run as _run
from bowerbird.upgrade import serve as _serve
from bowerbird.upgrade import start as _start
from bowerbird.upgrade import state as _state
from bowerbird.upgrade import watch as _watch
from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.fitting import fit_transform, needs_transform
from bowerbird.upgrade.plan_record import Plan
from bowerbird.upgrade.queries import QuerySet, watch_set

if TYPE_CHECKING:
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Space
    from bowerbird.gallery.transform import VectorTransform


class Upgrade:
    """Moves a gallery to another encoder while it serves.

    Args:
        gallery: Open, or the path or URL of one (then closed by ``close`` or at the end of a ``with`` block).
        new: The new encoder: a ``LoadedEncoder``, or a function of a list of items that returns ``(N, D)``.
        old: The old encoder, where it is at hand; needed to serve images under ``rank-merge``.
        space: Of the new vectors, where ``new`` is a function.
        old_space: Of the old vectors, where ``old`` is a function; default: what the gallery serves.
        batch_size: Items per call of an encoder.
    """

    def __init__(
        self,
        gallery: Gallery | str | Path,
        new: Any = None,
        *,
        old: Any = None,
        space: Space | None = None,
        old_space: Space | None = None,
        batch_size: int = 64,
    ) -> None:
        self._owns = not isinstance(gallery, Gallery)
        self.gallery = gallery if isinstance(gallery, Gallery) else open_gallery(gallery)
        self.new = None if new is None else _wrap(new, space, batch_size)
        self.old = None if old is None else _wrap(old, old_space or self._old_space(old), batch_size)

    def _old_space(self, old: Any) -> Space | None:
        if isinstance(old, ItemEncoder) or hasattr(old, "fingerprint"):
            return None
        snapshot = self.gallery.snapshot()
        return snapshot.spaces[snapshot.upgrade.old if snapshot.upgrade else snapshot.serving]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._owns:
            self.gallery.close()

    def plan(self, **settings: Any) -> Plan:
        """Whether to upgrade, by which strategy, and what it costs; see ``bowerbird.upgrade.plan``."""
        return _plan.plan(self.gallery, self.new, old_encoder=self.old, **settings)

    def begin(self, **settings: Any) -> UpgradeState:
        """Start the upgrade without moving an item; see ``bowerbird.upgrade.start.begin``."""
        return _start.begin(self.gallery, self._needs_new("begin"), **self._begin_settings(settings))

    def run(self, **settings: Any) -> _run.RunReport:
        """Work on the upgrade; begins it where none is under way; see ``bowerbird.upgrade.run``.

        Besides its arguments: ``queries`` (a ``QuerySet``). The call that begins the upgrade freezes them as the watch
        set; without them, sampled items of the gallery where ``label_key``, ``watch_every`` or ``max_nfr`` is given.
        """
        encoder = self._needs_new("run")
        wants_watch = any(settings.get(name) is not None for name in ("label_key", "watch_every", "max_nfr"))
        if self._begins(encoder, settings):
            settings = self._begin_settings(settings, watch=wants_watch)
        else:
            settings.pop("queries", None)
        return _run.run(self.gallery, encoder, **settings)

    def join(self, *, watch: bool = False, **begin_settings: Any) -> UpgradeState:
        """Begin the upgrade, or check that the one under way is this one, for workers that something else starts.

        Args:
            watch: Freeze queries where this call begins it.
        """
        encoder = self._needs_new("run")
        if self._begins(encoder, begin_settings):
            begin_settings = self._begin_settings(begin_settings, watch=watch)
        else:
            begin_settings.pop("queries", None)
        return _start.join(self.gallery, encoder, **begin_settings)

    def serve(self, *, loader: _serve.EncoderLoader | None = None) -> _serve.SearchService:
        """A search object valid at every moment; see ``bowerbird.upgrade.serve``."""
        return _serve.serve(self.gallery, [e for e in (self.old, self.new) if e is not None], loader=loader)

    def watch(self, *, max_nfr: float | None = None) -> _watch.WatchEntry:
        """Measure once on the frozen queries; see ``bowerbird.upgrade.watch``."""
        return _watch.watch(self.gallery, max_nfr=max_nfr)

    def history(self) -> list[dict[str, Any]]:
        return _watch.history(self.gallery)

    def finish(self, *, accept_failed: bool = False) -> dict[str, Any]:
        """Drop the old side, after verification; see ``bowerbird.upgrade.state.finish``."""
        lifting = self.gallery.store.upgrade_state() is not None and self.gallery.snapshot().write_space.lifted
        encoder = _lift.lifter(self.gallery) if lifting else self.new
        return _state.finish(self.gallery, encoder=encoder, accept_failed=accept_failed)

    def rollback(self, *, leave_pending: bool = False) -> int:
        """Back to the exact old state; see ``bowerbird.upgrade.state.rollback``."""
        return _state.rollback(self.gallery, encode_old=self.old, leave_pending=leave_pending)

    def status(self) -> _state.UpgradeStatus:
        return _state.status(self.gallery)

    def pause(self) -> _state.UpgradeStatus:
        return _state.pause(self.gallery)

    def resume(self) -> _state.UpgradeStatus:
        return _state.resume(self.gallery)

    def lift(self, transform: VectorTransform | None = None, *, stop_after: int | None = None,
             stop_at_share: float | None = None, **begin_settings: Any) -> _run.RunReport:  # fmt: skip
        """Map the stored vectors towards the new space without an image; see ``bowerbird.upgrade.lift``.

        Args:
            transform: Begins the lift, with ``begin_settings`` (those of ``begin_lift``). ``None``: goes on with it.
        """
        if transform is not None:
            _lift.begin_lift(self.gallery, transform, self.new, **begin_settings)
        encoder = _lift.lifter(self.gallery)
        return _run.run(self.gallery, encoder, stop_after=stop_after, stop_at_share=stop_at_share)

    def _begins(self, encoder: ItemEncoder, settings: Mapping[str, Any]) -> bool:
        state = self.gallery.store.upgrade_state()
        return state is None or bool(settings.get("on_top") and state.new != encoder.space.fingerprint)

    def _needs_new(self, verb: str) -> ItemEncoder:
        if self.new is None:
            raise InputError(f"{verb} needs the new encoder: Upgrade(gallery, new=load_encoder(...))")
        return self.new

    def _begin_settings(self, settings: dict[str, Any], *, watch: bool = False) -> dict[str, Any]:
        out = {"old_encoder": self.old, **settings}
        strategy = out.get("strategy", "rank-merge")
        new = self._needs_new("begin")
        if out.get("transform") is None and needs_transform(self.gallery, strategy, new):
            out["transform"] = fit_transform(
                self.gallery, new, strategy, label_key=out.get("label_key"), seed=out.get("seed") or 0
            )
        queries, label_key = out.pop("queries", None), out.get("label_key")
        if watch or queries is not None or out.get("watch_set") is not None:
            self._refuse_several_old_systems()
        if queries is None and watch and out.get("watch_set") is None:
            queries = QuerySet.from_gallery(self.gallery, label_key, seed=out.get("seed", 0))
        if queries is not None:
            out["watch_set"] = watch_set(
                self.gallery, queries, self._needs_new("watch"), old_encoder=self.old, label_key=label_key
            )
        return out

    def _refuse_several_old_systems(self) -> None:
        parts = [part for part in self.gallery.snapshot().parts if part.count]
        if len(parts) > 1:
            raise UpgradeError(
                f"queries are watched against the results of one old encoder, and the items of {self.gallery.path} are "
                f"in {len(parts)} spaces: run the upgrade under way to its end first, or begin this one unwatched"
            )


def _wrap(encoder: Any, space: Space | None, batch_size: int) -> ItemEncoder:
    if isinstance(encoder, ItemEncoder):
        return encoder
    return ItemEncoder(encoder, space=space, batch_size=batch_size)
