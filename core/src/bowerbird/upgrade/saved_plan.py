"""A plan that was saved: what ``run`` takes from it, and how much of its gain is there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bowerbird.errors import DataError, InputError, UpgradeError
from bowerbird.upgrade.forecast import ForecastCurve
from bowerbird.upgrade.plan_record import transform_file
from bowerbird.upgrade.strategies import load_strategy
from bowerbird.upgrade.watch import level_before, watch

if TYPE_CHECKING:
    from bowerbird.gallery.gallery import Gallery
    from bowerbird.gallery.transform import VectorTransform


@dataclass(frozen=True)
class SavedPlan:
    """What ``run`` takes from a plan that was saved: see ``load_plan``."""

    old: str
    new: str
    strategy: str
    merger: str | None
    order: str
    order_settings: dict[str, Any]
    seed: int
    label_key: str | None
    transform: VectorTransform | None
    curve: ForecastCurve | None
    old_level: float | None
    new_level: float | None = None

    def begin_settings(self) -> dict[str, Any]:
        """Arguments of ``begin``."""
        made = {
            "strategy": self.strategy, "merger": self.merger, "order": self.order, "transform": self.transform,
            "order_settings": self.order_settings or None, "seed": self.seed, "label_key": self.label_key,
        }  # fmt: skip
        return {name: value for name, value in made.items() if value is not None}


def load_plan(path: str | Path) -> SavedPlan:
    """The recommendation of a saved plan.

    Raises:
        DataError: If the file is no plan.
        UpgradeError: If the plan recommends no upgrade; says what it says.
    """
    import json

    from bowerbird.gallery.transform import VectorTransform

    path = Path(path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        verdict, curves = saved["recommendation"], saved["curves"]
        strategy, merger = verdict["strategy"], verdict.get("merger") or None
        decision, reason = verdict["decision"], verdict["reason"]
        old = saved["old"]["fingerprint"]
        new, order, seed = saved["new"]["fingerprint"], verdict.get("order") or saved["order"], int(saved["seed"])
    except FileNotFoundError as exc:
        raise DataError(
            f"{path}: there is no such plan; `bowerbird upgrade plan GALLERY --to ENCODER` makes one"
        ) from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc}") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{path} is no plan as `bowerbird upgrade plan --out plan.json` saves it: {exc!r}") from exc
    if strategy is None:
        raise UpgradeError(f"the plan {path} recommends no strategy ({decision}: {reason}); name one with --strategy")
    transform = None
    if strategy in saved.get("transforms", {}):
        transform = VectorTransform.load(transform_file(path, strategy))
        if transform.fingerprint != saved["transforms"][strategy]:
            raise DataError(f"{transform_file(path, strategy)} is not the transform that the plan {path} was made with")
    chosen = next(
        (c for c in curves if (c["name"], c.get("merger") or None) == (strategy, merger) and not c["unavailable"]), None
    )
    curve = chosen and ForecastCurve(
        chosen["name"], tuple(chosen["shares"]), tuple(chosen["quality"]), tuple(chosen["nfr"]), chosen["area"]
    )
    before, after = (
        None if (level := saved.get(name)) is None else float(level["mean"]) for name in ("old_old", "new_new")
    )
    settings = dict(saved.get("order_settings") or {}) if order == saved["order"] else {}
    return SavedPlan(
        old, new, strategy, merger, order, settings, seed, saved.get("label_key"), transform, curve or None,
        before, after,
    )  # fmt: skip


def share_for_gain(saved: SavedPlan, gain: float, strategy: str) -> float:
    """The share of the gallery at which a saved plan forecasts ``gain`` (above 0, up to 1) of what the upgrade brings.

    Raises:
        InputError: If the plan has no forecast for this strategy, or it forecasts no gain.
    """
    name = load_strategy(strategy)[0]
    if saved.curve is None or saved.old_level is None or saved.curve.name != name:
        raise InputError(f"the plan has no forecast for strategy {name!r}, which a stop at a share of the gain needs")
    share = saved.curve.share_at_gain(gain, saved.old_level)
    if not math.isfinite(share):
        raise InputError(f"the plan forecasts no gain of {name!r}, so that no share of it can be reached")
    return max(share, 1e-9)


def measured_gain(gallery: Gallery, saved: SavedPlan) -> float | None:
    """The share of the gain that the watched queries show now; ``None`` where none with labels are watched.

    The gain so far is measured: mAP@100 now minus that of the old system, on the same queries. What there is to gain
    is not known before the end, and is the plan's new/new minus old/old. Below 0 or above 1 is possible.
    """
    if saved.old_level is None or saved.new_level is None or saved.new_level <= saved.old_level:
        raise InputError("the plan measured no gain, so that no share of it can be reached")
    try:
        before = level_before(gallery)
    except UpgradeError:
        return None
    return (watch(gallery).quality - before) / (saved.new_level - saved.old_level)
