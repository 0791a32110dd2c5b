"""The frozen records that plugins yield. They name their target by string, so that a listing imports nothing heavy.

A record's ``name`` is ``plugin:method``; the left part is the name of the plugin's entry point.
``target`` and ``config`` are ``"package.module:attribute"``; they are imported when the method is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from bowerbird.errors import PluginError, did_you_mean

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

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, its kind included."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {
            "kind": self.kind,
            **{key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()},
        }


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Encoder``.

    Attributes:
        inputs: Batch keys that it reads.
        outputs: What its ``Features`` hold: ``pooled``, ``tokens``.
    """

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
    """Target: a subclass of ``bowerbird.data.dataset.Dataset``.

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
    """Target: by role. Those with a contract in ``bowerbird.testing``:

    - ``index``: a class with ``build(config)``, ``add``, ``remove``, ``search``, ``save`` and ``load``;
    - ``merger``: a function ``(old hits, new hits, k)`` that returns hits, see ``bowerbird.retrieval.index.Hits``;
    - ``order``: a function ``(ids, old_vectors, *, seed, centers=None)`` that returns a permutation of positions;
    - ``upgrade``: a class with ``needs_old_encoder``, ``merger``, ``check(...)`` and ``old_part_queries(...)``;
    - ``executor``: a class that starts the workers of an upgrade, see ``bowerbird.upgrade.engines.Executor``;
    - ``reranker``: a function ``(scores, **settings)`` that returns new scores of the same shape ``(Q, N)``, higher is
      nearer; numpy arrays, all queries of an evaluation at once, one column per gallery item;
    - ``store``: a class as ``bowerbird.gallery.protocol.StoreDriver``.

    Attributes:
        role: One of ``RETRIEVER_ROLES``.
        schemes: Of a store: the URL schemes that it opens, for example ``("postgresql",)``.
    """

    kind: ClassVar[str] = "retriever"
    role: str
    schemes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModifierRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Modifier``.

    Attributes:
        attaches_to: Names of the module types that it changes.
    """

    kind: ClassVar[str] = "modifier"
    attaches_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluatorRecord(Record):
    """Target: a subclass of ``bowerbird.protocols.Evaluator``.

    Attributes:
        needs: Batch keys that it reads.
    """

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

# ---------------------------------------------------------------------------------------------------- checking

PLUGIN_NAME = re.compile(r"[a-z0-9]+(?:[-_][a-z0-9]+)*")
METHOD_NAME = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")
IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def check_record(record: Any, *, kind: str, plugin: str) -> None:
    """Check everything about a record that can be known without importing what it points to.

    Args:
        record: What a catalogue hook yielded.
        kind: The kind that the hook collects.
        plugin: Name of the plugin's entry point.

    Raises:
        PluginError: Naming the record, the field, what it holds and what is accepted.
    """
    expected = next(record_type for record_type in RECORD_TYPES if record_type.kind == kind)
    if not isinstance(record, expected):
        raise PluginError(f"yielded {record!r} where a {expected.__name__} is expected")
    where = f"{expected.__name__}({record.name!r})"

    if not isinstance(record.name, str):
        raise PluginError(f"{where}: name must be a string")
    left, _, method = record.name.partition(":")
    if left != plugin or not METHOD_NAME.fullmatch(method):
        raise PluginError(f"{where}: name must be '{plugin}:<method>' with a method of a-z, 0-9, '-', '_' and '.'")
    if not isinstance(record.summary, str) or not record.summary.strip() or len(record.summary.splitlines()) != 1:
        raise PluginError(f"{where}: summary must be one line of text, not {record.summary!r}")
    if record.maturity not in MATURITIES:
        raise PluginError(f"{where}: maturity {record.maturity!r} is not one of {', '.join(MATURITIES)}")
    if record.paper is not None and not isinstance(record.paper, str):
        raise PluginError(f"{where}: paper must be a string or None, not {record.paper!r}")
    for name in ("presets", "extras"):
        mapping = getattr(record, name)
        if not isinstance(mapping, Mapping) or not all(
            isinstance(item, str) for pair in mapping.items() for item in pair
        ):
            raise PluginError(f"{where}: {name} must map strings to strings, not {mapping!r}")

    imports = {"target": record.target, **{f"presets[{key!r}]": value for key, value in record.presets.items()}}
    if record.config is not None:
        imports["config"] = record.config
    for name, value in imports.items():
        if not isinstance(value, str) or not IMPORT_STRING.fullmatch(value):
            raise PluginError(f"{where}: {name} must be an import string 'package.module:attribute', not {value!r}")

    for item in fields(record):
        value = getattr(record, item.name)
        # `needs="image"` instead of `needs=("image",)` would be read as five keys of one letter.
        if item.type == "tuple[str, ...]" and not (
            isinstance(value, tuple) and all(isinstance(part, str) for part in value)
        ):
            raise PluginError(f"{where}: {item.name} must be a tuple of strings, not {value!r}")
        if item.type == "bool" and not isinstance(value, bool):
            raise PluginError(f"{where}: {item.name} must be True or False, not {value!r}")
    if isinstance(record, RetrieverRecord) and record.role not in RETRIEVER_ROLES:
        hint = did_you_mean(str(record.role), RETRIEVER_ROLES)
        raise PluginError(f"{where}: role {record.role!r} is not one of {', '.join(RETRIEVER_ROLES)}.{hint}")
