"""Search and evaluation: indexes, ranking metrics, flips, backfill curves, verification. Needs numpy only."""

from bowerbird.retrieval.compatibility import (
    AdvBCTScores,
    CompatibilityReport,
    Embeddings,
    RetrievalData,
    StrictCompatibility,
    advbct_scores,
    average_compatibility,
    average_multimodel_accuracy,
    backward_transfer,
    compatibility_matrix,
    compatibility_report,
    cross_test,
    forgetting,
    measure,
    new_model_loss,
    self_test,
    similarity,
    strict_compatibility,
    update_gain,
)
from bowerbird.retrieval.curves import BackfillState, Curve, backfill_curve, num_backfilled
from bowerbird.retrieval.faiss_index import FaissIndex
from bowerbird.retrieval.flips import APFlips, Flips, ap_flips, churn, flips
from bowerbird.retrieval.index import ExactIndex, Hits, exact_search
from bowerbird.retrieval.intervals import Interval, bootstrap_interval, paired_difference
from bowerbird.retrieval.metrics import (
    PerQuery,
    RankedList,
    Relevance,
    Revisited,
    average_precision,
    cmc,
    precision,
    recall_all,
    revisited_precision,
    revisited_protocol,
    revisited_relevance,
)
from bowerbird.retrieval.verification import (
    Identification,
    TwoGalleries,
    Verification,
    combine_galleries,
    fold_accuracy,
    identification_at_fpir,
    pair_scores,
    template_features,
    verification_at_fpr,
)

__all__ = [
    "APFlips", "AdvBCTScores", "BackfillState", "CompatibilityReport", "Curve", "Embeddings", "ExactIndex",
    "FaissIndex", "Flips", "Hits", "Identification", "Interval", "PerQuery", "RankedList", "Relevance",
    "RetrievalData", "Revisited", "StrictCompatibility", "TwoGalleries", "Verification", "advbct_scores", "ap_flips",
    "average_compatibility", "average_multimodel_accuracy", "average_precision", "backfill_curve", "backward_transfer",
    "bootstrap_interval", "churn", "cmc", "combine_galleries", "compatibility_matrix", "compatibility_report",
    "cross_test", "exact_search", "flips", "fold_accuracy", "forgetting", "identification_at_fpir", "measure",
    "new_model_loss", "num_backfilled", "pair_scores", "paired_difference", "precision", "recall_all",
    "revisited_precision", "revisited_protocol", "revisited_relevance", "self_test", "similarity",
    "strict_compatibility", "template_features", "update_gain", "verification_at_fpr",
]  # fmt: skip
