"""``Control``: the upgrade of a service. What it is asked, and what it shows.

The gallery says what is so. A look at it a few times a second finds what workers, clients and commands have done; where
something changed, streams of events are told. What a client asks is done as a whole even where the client goes away
meanwhile, and one act at a time.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from bowerbird.errors import BowerbirdError, SpaceError, UnknownNameError, UpgradeError, did_you_mean
from bowerbird.serve.backfill import Backfill, Job
from bowerbird.serve.describe import gallery_info
from bowerbird.serve.planning import Planning
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Finish, PlanJob, Role, Rollback, StartPlan, StartUpgrade, UpgradeView
from bowerbird.serve.showing import Showing

if TYPE_CHECKING:
    from bowerbird.encoders import LoadedEncoder
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.snapshot import UpgradeState
    from bowerbird.gallery.space import Space
    from bowerbird.serve.encoders import Encoders
    from bowerbird.serve.metrics import Metrics
    from bowerbird.serve.settings import ServeSettings
    from bowerbird.upgrade.encoding import ItemEncoder

log = logging.getLogger("bowerbird.serve")

LOOK_SECONDS = 0.2
NEWS_SECONDS = 0.5  # between two events of a stream
MEASURED_SECONDS = 2.0  # a measurement is no commit: it is looked for while an upgrade runs
BATCH = 4  # pictures per call of the encoder in `finish` and `rollback`: searches wait for little, and memory stays
T = TypeVar("T")


class Control:
    """An async context manager; entering it goes on with the upgrade of the service before this one.

    Attributes:
        streams: How many streams of events are open.
    """

    def __init__(self, settings: ServeSettings, gallery: Gallery, encoders: Encoders, metrics: Metrics) -> None:
        self.settings, self.gallery, self.encoders = settings, gallery, encoders
        self.backfill = Backfill(settings, gallery, metrics)
        self.planning = Planning(settings, gallery)
        self.streams = 0
        self._acts: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._seen: tuple[int, ...] = ()
        self._measured_at = 0.0
        self._version = 0
        self._news = asyncio.Event()
        self._complete: tuple[tuple[int, ...], bool] = ((), False)  # (what was seen, whether the upgrade was complete)
        self._showing = Showing(settings, gallery)
        self._told: dict[Role, tuple[int, asyncio.Task[tuple[str, ...]]]] = {}

    async def __aenter__(self) -> Self:
        if not self.settings.read_only:
            await asyncio.to_thread(self.backfill.recall)
        self._follower = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.backfill.abandon()
        if self._acts:  # what was begun is ended, one way or the other
            await asyncio.wait(self._acts, timeout=30)
        if self._follower is not None:
            self._follower.cancel()
            with suppress(asyncio.CancelledError):
                await self._follower
        await self.planning.cancel()
        await self.backfill.stop()

    # ---------------------------------------------------------------------------------------------------- it follows

    async def _follow(self) -> None:
        broken = False
        while True:
            try:
                await self._look()
                broken = False
            except Exception:  # a store that is away comes back
                if not broken:
                    log.exception("the gallery cannot be looked at; trying again")
                broken = True
                await asyncio.sleep(1)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        epoch, state, complete = await asyncio.to_thread(self._where)
        self.planning.look()
        await self.backfill.look(state, complete)
        running = state is not None and self.backfill.job is not None
        if running and time.monotonic() - self._measured_at > MEASURED_SECONDS:
            self._measured_at = time.monotonic()
        seen = (epoch, self.backfill.version, self.planning.version, int(self._measured_at))
        if seen != self._seen:
            self._seen = seen
            self._version += 1
            self._news.set()
            self._news = asyncio.Event()

    def _where(self) -> tuple[int, UpgradeState | None, bool]:
        snapshot = self.gallery.snapshot()
        if snapshot.upgrade is None:
            return snapshot.epoch, None, False
        # A commit is an epoch, but for one of failures only: our worker tells of it, a command's is found in time.
        seen = (snapshot.epoch, self.backfill.version, int(time.monotonic() / MEASURED_SECONDS))
        if self._complete[0] != seen:
            try:
                self._complete = (seen, self.gallery.store.progress().complete)
            except UpgradeError:  # it ended in this moment
                return snapshot.epoch, None, False
        return snapshot.epoch, snapshot.upgrade, self._complete[1]

    async def changes(self, until: asyncio.Event, beat: float) -> AsyncGenerator[int | None, None]:
        """A number at once and whenever something changed, at most two a second; ``None`` after ``beat`` quiet seconds.

        It ends with ``until``. Nothing is kept for a client that reads slowly: it hears of the newest state next.
        """
        seen = -1
        ending = asyncio.ensure_future(until.wait())
        self.streams += 1
        try:
            while not ending.done():
                if self._version == seen:
                    news = asyncio.ensure_future(self._news.wait())
                    try:
                        await asyncio.wait((news, ending), timeout=beat, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        news.cancel()
                    if self._version == seen:
                        yield None
                        continue
                seen = self._version
                yield seen
                await asyncio.wait((ending,), timeout=NEWS_SECONDS)
        finally:
            self.streams -= 1
            ending.cancel()

    # --------------------------------------------------------------------------------------------------- what it shows

    async def view(self) -> UpgradeView:
        made = await asyncio.to_thread(self._showing.upgrade, self.backfill.job)
        left = 0 if made.state == "none" else made.items - made.new_items
        return made.model_copy(update={"worker": self.backfill.view(left)})

    async def plan_job(self) -> PlanJob:
        return self.planning.job(await asyncio.to_thread(self._showing.plan))

    async def events(self, role: Role, version: int) -> tuple[str, ...]:
        """The events of a number that ``changes`` gave, made once for all callers of a role."""
        known, made = self._told.get(role, (-1, None))
        if made is None or known < version:
            made = asyncio.create_task(self._events(role))
            self._told[role] = (version, made)
        return await asyncio.shield(made)  # one who goes away does not end it for the others

    async def _events(self, role: Role) -> tuple[str, ...]:
        try:
            view = await self.view()
            info = await asyncio.to_thread(gallery_info, self.settings, self.gallery, self.encoders.accepts(), role)
        except (BowerbirdError, ProblemError):  # a store that is away: the next change tells more
            return ()
        return (
            f"event: gallery\nid: {info.epoch}\ndata: {info.model_dump_json()}\n\n",
            f"event: upgrade\ndata: {view.model_dump_json()}\n\n",
        )

    # ---------------------------------------------------------------------------------------------------- what it does

    async def start_plan(self, asked: StartPlan) -> PlanJob:
        from bowerbird.upgrade.start import check_store

        async def act() -> None:
            ref = self._reference(asked.candidate)
            if (await asyncio.to_thread(self.gallery.snapshot)).upgrade is not None:
                raise UpgradeError("an upgrade is under way; a plan is made before one")
            check_store(self.gallery, also=("many-workers",))  # another process makes the plan
            label_key = asked.label_key or self.settings.label_key
            await asyncio.to_thread(self.planning.start, asked.candidate, ref, label_key, asked.sample)

        await self._do(act)
        return await self.plan_job()

    async def cancel_plan(self) -> PlanJob:
        await self._do(self.planning.cancel)
        return await self.plan_job()

    async def start(self, asked: StartUpgrade) -> UpgradeView:
        """Begin the upgrade to a candidate, or take part in the one to it that is under way.

        The new encoder is loaded here first: from the first moment of the upgrade, searches may need it.
        """
        await self._do(lambda: self._start(asked))
        return await self.view()

    async def _start(self, asked: StartUpgrade) -> None:
        from bowerbird.upgrade.start import check_store
        from bowerbird.upgrade.vectors_encoder import is_vectors_ref, load_vectors_encoder

        ref = self._reference(asked.candidate)
        check_store(self.gallery, also=("many-workers",))  # another process does the work
        if self.planning.running:
            raise UpgradeError("a plan is being made; wait for it, or cancel it")
        if is_vectors_ref(ref):  # known by a file of its vectors: searches give vectors, too
            space = (await asyncio.to_thread(load_vectors_encoder, ref)).space
        else:
            loaded = await self.encoders.load(ref)
            space = loaded.space()
            self.encoders.add(loaded)
        snapshot = await asyncio.to_thread(self.gallery.snapshot)
        state = snapshot.upgrade
        rates = [rate for rate in (asked.rate, self.settings.backfill_rate) if rate is not None]
        job = Job(
            ref=ref if is_vectors_ref(ref) else space.encoder,  # a service started from another folder finds it, too
            space=space.fingerprint,
            after=0,
            upgrade=None if state is None else state.id,
            rate=min(rates) if rates else None,
            watch_every=asked.watch_every,
            max_nfr=asked.max_nfr,
        )
        if state is not None:
            await self._take_part(asked, job, state)
            return
        if space.fingerprint == snapshot.serving:
            raise UpgradeError(f"the gallery is served by candidate {asked.candidate!r} already; nothing is to be done")
        ended = await asyncio.to_thread(self.gallery.store.history)
        names = ("strategy", "merger", "order")
        settings = {name: value for name in names if (value := getattr(asked, name)) is not None}
        label_key = asked.label_key or self.settings.label_key
        await self.backfill.begin(
            replace(job, after=ended[-1]["id"] if ended else 0),
            settings if label_key is None else {**settings, "label_key": label_key},
        )

    async def _take_part(self, asked: StartUpgrade, job: Job, state: UpgradeState) -> None:
        """In the upgrade under way. What it was begun with stays; of the worker changes what is asked for."""
        from bowerbird.upgrade.start import check_settings

        if state.new != job.space:
            raise UpgradeError(f"another upgrade is {state.state}; finish it or roll it back first")
        check_settings(state, asked.model_dump(include={"strategy", "merger", "order", "label_key"}))
        if state.state == "paused":
            raise UpgradeError("this upgrade is paused; resume it")
        watched = await asyncio.to_thread(self.gallery.storage.read_file, f"watch/{state.id}.npz")
        if asked.max_nfr is not None and watched is None:
            raise UpgradeError("this upgrade was begun without watched queries, so that no flips can be measured")
        known = self.backfill.job
        if known is not None and known.is_of(state):
            own = ("rate", "watch_every", "max_nfr")
            told = {n: getattr(job, n) for n in own if n in asked.model_fields_set and getattr(asked, n) is not None}
            job = replace(known, **told)
        await self.backfill.take(job)

    async def pause(self, upgrade: int) -> UpgradeView:
        await self._do(lambda: self._in_store(upgrade, lambda: self.gallery.store.pause()))
        return await self.view()

    async def resume(self, upgrade: int) -> UpgradeView:
        """Workers may go on, and the one of this service does, whoever began the upgrade."""

        async def act() -> None:
            await self._in_store(upgrade, lambda: self.gallery.store.resume())
            snapshot = await asyncio.to_thread(self.gallery.snapshot)
            state, job = snapshot.upgrade, self.backfill.job
            if state is None:
                return
            space = snapshot.spaces[state.new]
            if job is not None and not job.is_of(state):  # of an upgrade that ended in this moment
                job = None
            if job is None and not space.lifted:
                job = Job(space.encoder, space.fingerprint, 0, state.id, self.settings.backfill_rate, 0.05, None)
            if job is not None:
                await self.backfill.take(replace(job, resumed_at=time.time()))

        await self._do(act)
        return await self.view()

    async def finish(self, asked: Finish) -> UpgradeView:
        """Refused with the reason until everything is moved, every checksum holds and the encoder is the right one."""
        from bowerbird.upgrade.lift import lifter
        from bowerbird.upgrade.state import finish

        async def act() -> None:
            space = (await self._spaces(asked.id))[1]
            encoder = lifter(self.gallery) if space.lifted else await self._encoder(space)
            try:
                await self._in_store(
                    asked.id, lambda: finish(self.gallery, encoder=encoder, accept_failed=asked.accept_failed)
                )
            except SpaceError as exc:
                raise UpgradeError(str(exc)) from exc
            await self.backfill.forget()
            await asyncio.to_thread(_give_memory_back)

        await self._do(act)
        return await self.view()

    async def rollback(self, asked: Rollback) -> UpgradeView:
        """Back to the exact old state; items that came since are encoded by the old encoder."""
        from bowerbird.upgrade.state import rollback

        async def act() -> None:
            old = (await self._spaces(asked.id))[0]
            encoder = None
            if not asked.leave_pending and not old.lifted:
                with suppress(BowerbirdError):  # where items need it, the refusal says so
                    encoder = await self._encoder(old)
            await self._in_store(
                asked.id,
                lambda: rollback(self.gallery, encode_old=encoder, leave_pending=asked.leave_pending),
            )
            await self.backfill.forget()
            await asyncio.to_thread(_give_memory_back)

        await self._do(act)
        return await self.view()

    async def _do(self, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """One act at a time, to its end, whether or not somebody waits for it."""
        if self.settings.read_only:
            raise ProblemError(403, "this service was started read-only; nothing can be changed through it")

        async def whole() -> T:
            async with self._turn:
                return await act()

        task = asyncio.create_task(whole())
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)
        return await asyncio.shield(task)

    async def _in_store(self, upgrade: int, act: Callable[[], object]) -> None:
        """``act`` in a thread, on the upgrade that the caller has seen."""

        def checked() -> None:
            self._check(upgrade)
            act()

        await asyncio.to_thread(checked)

    def _check(self, upgrade: int) -> None:
        from bowerbird.upgrade.state import no_upgrade

        state = self.gallery.store.upgrade_state()
        if state is None:
            raise UpgradeError(no_upgrade(self.gallery).partition(";")[0])
        if state.id != upgrade:
            raise UpgradeError(f"upgrade {upgrade} is over; number {state.id} is under way by now. Look at it again")

    async def _spaces(self, upgrade: int) -> tuple[Space, Space]:
        await asyncio.to_thread(self._check, upgrade)
        snapshot = await asyncio.to_thread(self.gallery.snapshot)
        if snapshot.upgrade is None:
            raise UpgradeError("the upgrade has ended")
        return snapshot.spaces[snapshot.upgrade.old], snapshot.spaces[snapshot.upgrade.new]

    async def _encoder(self, space: Space) -> ItemEncoder:
        from bowerbird.upgrade.encoding import ItemEncoder
        from bowerbird.upgrade.vectors_encoder import is_vectors_ref, load_vectors_encoder

        if is_vectors_ref(space.encoder):
            made: ItemEncoder = await asyncio.to_thread(load_vectors_encoder, space.encoder, space=space)
            return made
        loaded: LoadedEncoder = await self.encoders.get(space)
        return ItemEncoder(loaded, space=space, batch_size=BATCH)

    def _reference(self, candidate: str) -> str:
        known = self.settings.candidates
        if candidate not in known:
            raise UnknownNameError(
                f"{candidate!r} is no candidate of this service; it was started with "
                f"{', '.join(sorted(known)) or 'none (--candidate NAME=ENCODER)'}.{did_you_mean(candidate, known)}"
            )
        return known[candidate]


def _give_memory_back() -> None:
    """What verifying and encoding took returns to the system, where the C library can do that (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
