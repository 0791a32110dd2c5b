"""The frozen records that plugins yield. They name their target by string, so that a listing imports nothing heavy.

A record's ``name`` is ``plugin:method``; the left part is the name of the plugin's entry point.
``target`` and ``config`` are ``"package.module:attribute"``; they are imported when the method is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

API_VERSION = "1.0"  # of the hooks and records in this package; plugins declare theirs as BOWERBIRD_API

MATURITIES = ("stable", "experimental")
RETRIEVER_ROLES = ("index", "store", "merger", "transform", "upgrade", "order", "executor", "reranker")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every record says about its method.

    Attributes:
        name: ``plugin:method``, for example ``compat:bct``.
        target: Import string of what the method is.
        summary: One line, shown by ``bowerbird list``.
        config: Import string of the pydantic model of its settings; ``None`` where it has none.
        presets: Name of a preset -> import string of a function without arguments that returns settings.
        paper: Title and arXiv or DOI number; ``None`` where there is none.
        extras: Import name -> what to install (``pip install`` argument). Checked before the target is imported.
        maturity: One of ``MATURITIES``.
    """

    kind: ClassVar[str]

    name: str
    target: str
    summary: str
    config: str | None = None
    presets: Mapping[str, str] = field(default_factory=dict)
    paper: str | None = None
    extras: Mapping[str, str] = field(default_factory=dict)
    maturity: str = "stable"


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Encoder``."""

    kind: ClassVar[str] = "encoder"
    inputs: tuple[str, ...] = ("image",)
    outputs: tuple[str, ...] = ("pooled",)


@dataclass(frozen=True, kw_only=True)
class ObjectiveRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Objective``.

    Attributes:
        needs: Batch keys that it reads (``bowerbird.batch``).
        encoder_needs: Outputs of the encoder that it reads, for example ``tokens``.
        batch_additive: The loss of a joined batch is the mean of the losses of its equal parts, so that two processes
            give what one gives.
    """

    kind: ClassVar[str] = "objective"
    needs: tuple[str, ...]
    encoder_needs: tuple[str, ...] = ("pooled",)
    batch_additive: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Dataset``.

    Attributes:
        provides: Batch keys of its items.
        splits: Names of its splits; ``()`` where they depend on the settings.
        offline: Whether it works without a network once installed.
    """

    kind: ClassVar[str] = "dataset"
    provides: tuple[str, ...]
    splits: tuple[str, ...] = ()
    offline: bool = True


@dataclass(frozen=True, kw_only=True)
class RetrieverRecord(Record):
    """Target: depends on ``role``, see ``bowerbird.protocols`` and the plugin-author guide."""

    kind: ClassVar[str] = "retriever"
    role: str


@dataclass(frozen=True, kw_only=True)
class ModifierRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Modifier``. ``attaches_to``: module types it changes."""

    kind: ClassVar[str] = "modifier"
    attaches_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluatorRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Evaluator``. ``needs``: batch keys that it reads."""

    kind: ClassVar[str] = "evaluator"
    needs: tuple[str, ...] = ("image", "label")


RECORD_TYPES: tuple[type[Record], ...] = (
    EncoderRecord,
    ObjectiveRecord,
    DatasetRecord,
    RetrieverRecord,
    ModifierRecord,
    EvaluatorRecord,
)
