"""The records of ``bowerbird-domain``. Light: standard library and records only."""

from __future__ import annotations

from collections.abc import Iterable

from bowerbird.hookspecs import hookimpl
from bowerbird.records import ModifierRecord

BOWERBIRD_API = "1.0"


@hookimpl
def bowerbird_modifiers() -> Iterable[ModifierRecord]:
    yield ModifierRecord(
        name="domain:dsu",
        target="bowerbird_domain.modifiers:DSUModifier",
        config="bowerbird_domain.configs:DSUConfig",
        summary="Noise in the feature statistics of a batch while training, as wide as they differ within the batch.",
        paper="Uncertainty Modeling for Out-of-Distribution Generalization, ICLR 2022, arXiv:2202.03958",
    )
    yield ModifierRecord(
        name="domain:mixstyle",
        target="bowerbird_domain.modifiers:MixStyleModifier",
        config="bowerbird_domain.configs:MixStyleConfig",
        summary="Every sample takes a part of the feature statistics of another one while training; DSU's baseline.",
        paper="Domain Generalization with MixStyle, ICLR 2021, arXiv:2104.02008",
    )
