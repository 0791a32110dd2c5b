"""Upgrades: move a gallery to another encoder while it serves.

    upgrade = Upgrade(gallery, new=load_encoder("runs/new"), old=load_encoder("runs/old"))
    print(upgrade.plan(label_key="label").recommendation)
    service = upgrade.serve()                       # valid before, during and after
    upgrade.run(strategy="rank-merge", watch_every=0.05, max_nfr=0.02)
    upgrade.finish()                                # or upgrade.rollback()

The modules have the same verbs as functions on an open gallery (``bowerbird.upgrade.plan.plan``). Imports no torch.
"""

from __future__ import annotations

from bowerbird.upgrade.encoding import ItemEncoder
from bowerbird.upgrade.forecast import ForecastCurve, PairedVectors
from bowerbird.upgrade.orders import backfill_order
from bowerbird.upgrade.plan_record import Plan
from bowerbird.upgrade.queries import QuerySet
from bowerbird.upgrade.run import RunReport
from bowerbird.upgrade.serve import SearchService
from bowerbird.upgrade.start import begin
from bowerbird.upgrade.state import UpgradeStatus, finish, pause, resume, rollback, status
from bowerbird.upgrade.upgrade import Upgrade
from bowerbird.upgrade.verdict import Recommendation
from bowerbird.upgrade.watch import WatchEntry, WatchSet

# The verbs plan, run, serve and watch are not here: as names of the package they would hide their modules.
__all__ = [
    "ForecastCurve",
    "ItemEncoder",
    "PairedVectors",
    "Plan",
    "QuerySet",
    "Recommendation",
    "RunReport",
    "SearchService",
    "Upgrade",
    "UpgradeStatus",
    "WatchEntry",
    "WatchSet",
    "backfill_order",
    "begin",
    "finish",
    "pause",
    "resume",
    "rollback",
    "status",
]
