"""What a plugin author tests with. No normal run imports this package; pytest is imported where a test needs it.

A contract is a class to subclass; its tests arrive with it::

    from bowerbird.testing import EncoderContract

    class TestTiny(EncoderContract):
        name = "acme:tiny"
        config = {"embed_dim": 8}

``PluginTester`` checks a whole plugin, ``load_golden`` and ``assert_close`` compare with numbers that were computed
elsewhere, ``run_two_ranks`` runs a function in two processes that talk over gloo.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bowerbird.testing.contract import Contract, override_contract_test
    from bowerbird.testing.datasets import DatasetContract, SyntheticDataset
    from bowerbird.testing.evaluators import EvaluatorContract, SimpleEvalContext
    from bowerbird.testing.gloo import run_two_ranks
    from bowerbird.testing.golden import assert_close, load_golden
    from bowerbird.testing.plugin_tester import PluginTester
    from bowerbird.testing.retrievers import (
        IndexContract,
        MergerContract,
        OrderContract,
        RerankerContract,
        UpgradeContract,
    )
    from bowerbird.testing.store_contract import StoreContract
    from bowerbird.testing.training import EncoderContract, ObjectiveContract, SimpleBuildContext, TinyEncoder

# The golden loader needs no torch, so that the names are looked up on first use.
_MODULES = {
    "Contract": "contract",
    "override_contract_test": "contract",
    "DatasetContract": "datasets",
    "SyntheticDataset": "datasets",
    "EvaluatorContract": "evaluators",
    "SimpleEvalContext": "evaluators",
    "run_two_ranks": "gloo",
    "assert_close": "golden",
    "load_golden": "golden",
    "PluginTester": "plugin_tester",
    "IndexContract": "retrievers",
    "MergerContract": "retrievers",
    "OrderContract": "retrievers",
    "RerankerContract": "retrievers",
    "UpgradeContract": "retrievers",
    "StoreContract": "store_contract",
    "EncoderContract": "training",
    "ObjectiveContract": "training",
    "SimpleBuildContext": "training",
    "TinyEncoder": "training",
}

__all__ = [
    "Contract",
    "DatasetContract",
    "EncoderContract",
    "EvaluatorContract",
    "IndexContract",
    "MergerContract",
    "ObjectiveContract",
    "OrderContract",
    "PluginTester",
    "RerankerContract",
    "SimpleBuildContext",
    "SimpleEvalContext",
    "StoreContract",
    "SyntheticDataset",
    "TinyEncoder",
    "UpgradeContract",
    "assert_close",
    "load_golden",
    "override_contract_test",
    "run_two_ranks",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"bowerbird.testing.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'bowerbird.testing' has no attribute {name!r}")
