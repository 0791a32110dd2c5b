"""What goes over the wire: the models of requests and responses, and with them the OpenAPI schema.

Ids and metadata are data of strangers: they are text here, and the page shows them as text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Role = Literal["read", "write", "admin"]
ItemId = Annotated[str, Field(min_length=1, max_length=1024)]
# Bounded, which also keeps out what UTF-8 and SQL cannot hold: lone surrogates, numbers beyond 64 bits.
Text = Annotated[str, Field(max_length=65536)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Scalar = Text | Whole | float | bool


def _few(most: int) -> Callable[[Any], Any]:
    """Refuses a table with more keys before its values are looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"has {len(value)} keys, of at most {most}")
        return value

    return check


# Not only the good ones are bounded: each wrong value is an error to be told, and millions of them stop the service.
Values = Annotated[list[Scalar], Field(max_length=1000, fail_fast=True)]
Where = Annotated[dict[Text, Scalar | Values], Field(max_length=64), BeforeValidator(_few(64))]
Metadata = Annotated[dict[Text, Scalar | None], Field(max_length=256), BeforeValidator(_few(256))]
Vector = Annotated[list[float], Field(max_length=65536, fail_fast=True)]
MOST_KEYS = 64  # of a body
MOST_RESULTS = 1000  # offset + k of a search


class Request(BaseModel):
    """A JSON body. Unknown keys are refused: a misspelt one is a mistake, not a wish. So are NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: Any) -> Any:
        return _few(MOST_KEYS)(value)


class Response(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(BaseModel):
    """An error as of RFC 9457, ``application/problem+json``."""

    type: str = Field("about:blank", description="What kind of problem; `about:blank` where the status says it all.")
    title: str
    status: int
    detail: str = Field(description="What was asked, what was found, what to do.")
    instance: str | None = Field(None, description="Identifies this occurrence in the log of the service.")
    errors: list[dict[str, Any]] | None = Field(None, description="Where a body or parameter is wrong: `loc`, `msg`.")


# ---------------------------------------------------------------------------------------------------- gallery


class SpaceInfo(Response):
    fingerprint: str
    encoder: str = Field(description="Name of the encoder, without the folders of the server.")
    dim: int
    items: int = Field(description="Items that are searched in this space now.")
    lifted: bool = False


class Accepts(Response):
    """By what this gallery can be searched now."""

    image: bool
    text: bool
    video: bool
    vector: bool = True


class UpgradeBrief(Response):
    id: int
    state: Literal["running", "paused", "complete"]
    old: str = Field(description="Fingerprint of the space that it leads away from.")
    new: str
    share: float = Field(description="Share of the items in the new space, 0 to 1.")


class GalleryInfo(Response):
    name: str
    version: str = Field(description="Of bowerbird-core.")
    items: int
    pending: int = Field(description="Items without a vector: searches do not find them.")
    epoch: int = Field(description="Number of the last commit; it grows with every change.")
    serving: str
    spaces: list[SpaceInfo]
    accepts: Accepts
    upgrade: UpgradeBrief | None
    candidates: list[str] = Field(description="Names of the encoders to which an upgrade may lead.")
    label_key: str | None
    metadata_keys: list[str] = Field(description="Keys seen in a sample of the items, for filters.")
    read_only: bool
    role: Role = Field(description="What the caller may do.")
    max_upload_bytes: int
    max_files: int


# ----------------------------------------------------------------------------------------------------- search


class Search(Request):
    """What every search takes."""

    k: int = Field(20, ge=1, le=MOST_RESULTS)
    offset: int = Field(0, ge=0, lt=MOST_RESULTS, description="Results to leave out at the beginning, for paging.")
    where: Where | None = Field(None, description="Only items with this metadata; a list means any of its values.")


class TextSearch(Search):
    text: str = Field(min_length=1, max_length=4096)


class ItemSearch(Search):
    """Items like one of the gallery; the item itself is left out."""

    id: ItemId


class VectorSearch(Search):
    """Exactly one of the two. Vectors need not have length 1."""

    vector: Vector | None = Field(None, description="Of the space that serves.")
    vectors: dict[Text, Vector] | None = Field(
        None, max_length=16, description="By the fingerprint of their space; an upgrade may need two."
    )


class Hit(Response):
    rank: int = Field(description="From 1, over all pages.")
    id: str
    distance: float = Field(description="1 - cosine, 0 to 2.")
    score: float = Field(description="Cosine, -1 to 1.")
    side: Literal["old", "new"] = Field(description="`old` where it was found by a vector of an older space.")
    space: str
    metadata: dict[str, Any]
    has_picture: bool = Field(description="Whether /v1/thumbnail can show it.")


class SearchResponse(Response):
    hits: list[Hit]
    more: bool = Field(description="Whether another page may have results.")
    epoch: int = Field(description="Of the snapshot that was searched; pages of one epoch belong together.")
    share: float = Field(description="Of the gallery in the newest space, 0 to 1; 1 outside upgrades.")
    milliseconds: float


class ComparedHit(Hit):
    moved: bool = Field(description="Whether the item is in the new space now.")
    rank_before: int | None = Field(description="Its rank in the old list; null where it is not in it.")
    right: bool | None = Field(description="Whether it has the query's label; null where that is not known.")


class CompareResponse(Response):
    """The old system, the new system as far as it is filled, and what is served."""

    old: list[ComparedHit]
    new: list[ComparedHit]
    merged: list[ComparedHit]
    label: str | None = Field(description="Of the query, where it is an item with a label.")
    flip: Literal["positive", "negative", "none"] | None = Field(
        description="Whether the first result became right, became wrong, or neither; null without a label."
    )
    kept: int = Field(description="How many of the old results are in the merged list.")
    old_name: str
    new_name: str
    epoch: int
    share: float


# ------------------------------------------------------------------------------------------------------ items


class ItemInfo(Response):
    id: str
    metadata: dict[str, Any]
    content_hash: str | None
    spaces: list[str] = Field(description="Fingerprint of the space in which it is searched; none while it is pending.")
    side: Literal["old", "new"]
    has_picture: bool


class ItemPage(Response):
    items: list[ItemInfo]
    next: int | None = Field(description="Give it as `after` for the next page; null at the end.")


class NewItem(Request):
    id: ItemId
    metadata: Metadata = Field(default_factory=dict)


class NewVector(NewItem):
    vector: Vector = Field(min_length=1)


class NewVectors(Request):
    items: list[NewVector] = Field(min_length=1, max_length=1000)
    space: Text | None = Field(None, description="Fingerprint of their space; needed during an upgrade.")


class Added(Response):
    """What became of a batch; together every id that was sent. The batch is there, durably, when this is answered."""

    added: list[str]
    replaced: list[str] = Field(description="Were there with another picture or vector, or other metadata.")
    unchanged: list[str] = Field(description="Were there already: sending a batch again changes nothing.")
    failed: dict[str, str] = Field(description="Id -> why; only where `on_error` is `skip`.")
    epoch: int


class Delete(Request):
    ids: list[ItemId] = Field(min_length=1, max_length=10_000, fail_fast=True)


class Deleted(Response):
    deleted: list[str]
    absent: list[str] = Field(description="Were not there: deleting again changes nothing.")
    epoch: int


# ---------------------------------------------------------------------------------------------------- spaces, map


class RelationInfo(Response):
    kind: Literal["compatible", "transform"]
    new: str
    old: str
    evidence: dict[str, Any]


class MatrixCell(Response):
    """Whether queries of `source` can search vectors of `target`."""

    source: str
    target: str
    kind: Literal["own", "compatible", "transform", "both", "none"] = Field(description="`both`: over several steps.")
    quality: float | None = Field(description="Share of right first results, where labels allow to measure it.")
    note: str


class SpacesView(Response):
    spaces: list[SpaceInfo]
    relations: list[RelationInfo]
    cells: list[MatrixCell]


class MapView(Response):
    """N points, positions as whole numbers 0 to 65535 on both axes."""

    method: Literal["pca", "umap"]
    methods: list[str] = Field(description="Those that this service can draw.")
    epoch: int
    space: str = Field(description="Fingerprint of the space that is shown.")
    total: int = Field(description="Items of the space; the map shows a sample where it is larger than N.")
    ids: list[str]
    x: list[int]
    y: list[int]
    group: list[int] = Field(description="Position in `groups`, -1 for none.")
    groups: list[str] = Field(description="Values of the metadata key `group_key`, the most frequent ones.")
    group_key: str | None = Field(
        None, description="The label's key, or another where the most frequent labels hold few of the items."
    )
    moved: list[bool] = Field(description="Whether the item is in the newest space.")


# ---------------------------------------------------------------------------------------------------- upgrade


class WorkerView(Response):
    """The background worker of this service. Other processes may work on the same upgrade."""

    state: Literal["none", "starting", "working", "stopping", "paused", "done", "failed"]
    rate: float | None = Field(description="Items per second, lately.")
    seconds_left: float | None
    moved: int = Field(description="Items that it has moved since it was started.")
    error: str | None


class CurvePoint(Response):
    share: float
    quality: float | None = Field(description="mAP@100 on the watched queries.")
    r1: float | None
    nfr: float = Field(description="Negative flips against the old system, 0 to 1.")
    pfr: float
    churn: float
    time: float


class ForecastLine(Response):
    strategy: str
    merger: str
    shares: list[float]
    quality: list[float]
    low: list[float] | None
    high: list[float] | None
    nfr: list[float] | None
    recommended: bool


class PlanView(Response):
    """A plan, as far as the page shows it; `bowerbird upgrade plan` has the rest."""

    candidate: str | None
    created_at: float
    metric: str
    recommendation: str
    reason: str
    old_quality: float | None
    new_quality: float | None
    hours: float | None
    price: float | None
    lines: list[ForecastLine]


class PlanJob(Response):
    state: Literal["none", "running", "done", "failed"]
    candidate: str | None
    step: str | None
    error: str | None
    plan: PlanView | None


class FailedItem(Response):
    id: str
    attempts: int
    error: str


class UpgradeView(Response):
    """`state` is `none` outside upgrades; then the other fields describe nothing, or the last upgrade's curve."""

    state: Literal["none", "running", "paused", "complete"]
    id: int | None
    strategy: str | None
    order: str | None
    merger: str | None
    old: SpaceInfo | None
    new: SpaceInfo | None
    items: int
    new_items: int
    old_vectors: int = Field(0, description="Vectors of the old space that are kept until `finish` drops them.")
    share: float
    failures: list[FailedItem] = Field(description="The first hundred.")
    failed: int
    worker: WorkerView
    level_before: float | None = Field(description="Quality of the old system on the watched queries.")
    curve: list[CurvePoint]
    plan: PlanView | None
    last: str | None = Field(description="What became of the upgrade before: finished or rolled back.")
    stopped_by: str | None = Field(None, description="Why it is paused, where the rule `max_nfr` did that.")


class StartPlan(Request):
    candidate: Text
    label_key: Text | None = None
    sample: int = Field(1000, ge=10, le=100_000)


class StartUpgrade(Request):
    """Defaults are those of the last plan for this candidate where there is one, else of `bowerbird upgrade run`."""

    candidate: Text
    strategy: Text | None = None
    merger: Text | None = None
    order: Text | None = None
    label_key: Text | None = None
    watch_every: float = Field(0.05, gt=0, le=1)
    max_nfr: float | None = Field(None, ge=0, le=1)
    rate: float | None = Field(None, gt=0, description="Most items per second.")


class Confirm(Request):
    """Acts on the upgrade that the caller has seen: refused with 409 where another one is under way by now."""

    id: Whole


class Finish(Confirm):
    accept_failed: bool = False


class Rollback(Confirm):
    leave_pending: bool = False


# ----------------------------------------------------------------------------------------------------- health


class Health(Response):
    status: Literal["ok"]


class Ready(Response):
    ready: bool
    reasons: list[str] = Field(description="What is missing.")
