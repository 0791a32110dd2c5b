"""``compat:bt2`` as it is trained: the encoder that holds the head of ``bt2``, and the objective. Letters as there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.errors import RecipeError
from bowerbird.protocols import BuildContext, Encoder, Features, LossOutput, Objective
from bowerbird.recipe import build_config
from bowerbird.registry import get_registry
from bowerbird_compat.bt2 import BasisTransformHead, BT2Loss, BT2Output, check_sizes
from bowerbird_compat.feature_cache import FeatureCache
from bowerbird_compat.old_model import OldModel, measured_compatibility
from bowerbird_compat.prototypes import build_prototypes


class BasisTransformConfig(BaseModel):
    """Settings of the encoder ``compat:basis-transform``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    base: dict[str, Any] = Field(description='the trunk: use = "core:timm" (any encoder) and its settings')
    new_dim: int = Field(ge=1, description="size of the teacher's vectors")
    old_dim: int = Field(ge=1, description="size of the old vectors")
    added_dim: int = Field(32, ge=0, description="entries added to new_dim, at most old_dim")
    scale: float = Field(2.0, gt=0, description="weight of the teacher part: 2 in the paper's settings, 3 in its code")
    rectify: bool = Field(True, description="relu before the layer of the free part")
    last_relu: bool = Field(
        True,
        description="relu on the trunk's output, as in the authors' ResNet; false where the teacher's vectors have "
        "negative entries",
    )
    orthogonal_map: Literal["matrix_exp", "cayley", "householder"] = Field(
        "matrix_exp", description="what keeps the matrices orthogonal"
    )

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        check_sizes(self.new_dim, self.new_dim, self.old_dim, self.added_dim)
        if not isinstance(self.base.get("use"), str):
            raise ValueError('base needs use, the name of an encoder: base = {use = "core:timm", model = "resnet18"}')
        return self


class BasisTransformEncoder(Encoder):
    """Any encoder, a layer to ``new_dim + old_dim`` entries, and ``BasisTransformHead``."""

    def __init__(self, base: Encoder, config: BasisTransformConfig) -> None:
        super().__init__()
        width = config.new_dim + config.old_dim
        self.base, self.last_relu = base, config.last_relu
        self.widen = nn.Identity() if base.embed_dim == width else nn.Linear(base.embed_dim, width)
        self.head = BasisTransformHead(
            width, config.new_dim, config.old_dim, config.added_dim, config.scale,
            rectify=config.rectify, orthogonal_map=config.orthogonal_map,
        )  # fmt: skip
        self.embed_dim, self.preprocessing = self.head.embed_dim, base.preprocessing

    @classmethod
    def build(cls, config: BasisTransformConfig) -> Self:
        settings = dict(config.base)
        record = get_registry().get("encoder", settings.pop("use"))
        made = build_config(record, settings, where="compat:basis-transform [base]")
        return cls(get_registry().load(record).build(made), config)

    def output(self, batch: Batch) -> BT2Output:
        features = self.widen(self.base(batch).pooled)
        return self.head(features.relu() if self.last_relu else features)

    def forward(self, batch: Batch) -> Features:
        return Features(pooled=self.output(batch).embedding)

    def frozen_trunk(self, batch: Batch) -> Tensor | None:
        return self.base.frozen_trunk(batch)

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        base = dict(config["base"])
        use = base.pop("use")
        return {**config, "base": {"use": use, **self.base.stored_config(base)}}


class BT2Config(BaseModel):
    """Settings of ``compat:bt2``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    old_run: str | None = Field(None, description="folder of the old run, or of the exported old encoder")
    old_encoder: str | None = Field(None, description="instead of old_run: an encoder by name")
    teacher_run: str | None = Field(None, description="folder of the run that trained the new model freely")
    teacher_encoder: str | None = Field(None, description="instead of teacher_run: an encoder by name")
    teacher_weight: float = Field(1.0, ge=0, description="factor of the cosine distance to the teacher (lambda_1)")
    influence_weight: float = Field(10.0, ge=0, description="factor of the influence loss (lambda_2)")
    old_weight: float = Field(5.0, ge=0, description="factor of the cosine distance to the old vector (lambda_3)")
    influence_scale: float = Field(1.0, gt=0, description="factor of the old logits")
    normalize_prototypes: bool = Field(False, description="give prototypes norm 1")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of both cross-entropies")
    measure: bool = Field(True, description="measure the compatibility on training items when the encoder is exported")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for role in ("old", "teacher"):
            if (getattr(self, f"{role}_run") is None) == (getattr(self, f"{role}_encoder") is None):
                raise ValueError(f"give {role}_run or {role}_encoder, one of them")
        return self


class BT2Objective(Objective):
    """Trains a ``compat:basis-transform`` encoder. The old encoder and the teacher run only while this is built.

    Needs ``image`` (or ``frozen_features``), ``label`` and ``index``.
    """

    encoder: BasisTransformEncoder

    def __init__(
        self, encoder: BasisTransformEncoder, num_classes: int, loss: BT2Loss, old: FeatureCache, teacher: FeatureCache
    ) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss
        # Not named classifier: it belongs to the teacher part, not to the vector that is exported.
        self.new_classifier = nn.Linear(encoder.head.new_dim, num_classes, bias=False)
        self.old_vectors, self.teacher_vectors = old, teacher  # no modules: neither trained nor saved
        self._exported: tuple[BT2Config, OldModel, BuildContext] | None = None

    @classmethod
    def build(cls, config: BT2Config, encoder: Encoder, context: BuildContext) -> Self:
        """Loads old model and teacher and keeps their vectors of the training split.

        Raises ``RecipeError`` for another encoder, sizes that differ, or a training split without classes.
        """
        if not isinstance(encoder, BasisTransformEncoder):
            raise RecipeError(
                f"compat:bt2 trains the encoder compat:basis-transform; the recipe's is a {type(encoder).__name__}. "
                'Set [encoder] use = "compat:basis-transform", with the present encoder as its base.'
            )
        if not context.classes:
            raise RecipeError("compat:bt2 needs a data set with labels; the training split has no classes.")
        old = OldModel.load(config.old_run, config.old_encoder, context)
        teacher = OldModel.load(config.teacher_run, config.teacher_encoder, context)
        for name, model, size in (("old", old, encoder.head.old_dim), ("new", teacher, encoder.head.new_dim)):
            if model.encoder.embed_dim != size:
                raise RecipeError(
                    f"{model.path} gives vectors of size {model.encoder.embed_dim}, and encoder.{name}_dim is {size}: "
                    f"set encoder.{name}_dim = {model.encoder.embed_dim}."
                )
        device = next(encoder.parameters()).device
        caches = []
        for model in (old, teacher):
            model.encoder.to(device)
            batches = context.eval_batches(model.encoder, keys=("image", "label", "index"))
            caches.append(FeatureCache.build(model.encoder, batches, key="index"))
        if encoder.last_relu and bool((caches[1].vectors < 0).any()):
            warnings.warn(
                f"Vectors of the teacher {teacher.path} have negative entries, which a trunk with a relu on its output "
                "cannot meet. Set encoder.last_relu = false.",
                stacklevel=2,
            )
        made = build_prototypes(
            old.encoder, context.eval_batches(old.encoder), len(context.classes),
            normalize=config.normalize_prototypes, on_missing="skip",
        )  # fmt: skip
        loss = BT2Loss(
            made.weight, config.teacher_weight, config.influence_weight, config.old_weight, class_map=made.class_map(),
            influence_scale=config.influence_scale, label_smoothing=config.label_smoothing,
        )  # fmt: skip
        self = cls(encoder, len(context.classes), loss, *caches)
        self._exported = config, old, context
        return self

    def forward(self, batch: Batch) -> LossOutput:
        """Parts ``cls``, ``influence``, ``old``, ``teacher`` without their weights; stat ``accuracy``."""
        out = self.encoder.output(batch)
        out = replace(out, logits=self.new_classifier(out.teacher))
        labels, device = batch["label"], out.embedding.device
        old = self.old_vectors.get(batch["index"]).to(device)
        terms = self.loss(out, labels, old, self.teacher_vectors.get(batch["index"]).to(device))
        total = terms.pop("total")
        assert out.logits is not None
        accuracy = (out.logits.detach().argmax(dim=1) == labels).float().mean()
        return LossOutput(total, {name: term.detach() for name, term in terms.items()}, {"accuracy": accuracy})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As usual, but no weight decay for what parametrises the orthogonal matrices: it would not decay them."""
        head = self.encoder.head
        free = {id(p) for basis in (head.new_basis, head.old_basis) for p in basis.parameters()}
        groups = []
        for group in super().parameter_groups():
            groups.append({**group, "params": [p for p in group["params"] if id(p) not in free]})
        orthogonal_ones = [p for p in self.parameters() if id(p) in free and p.requires_grad]
        return [g for g in [*groups, {"params": orthogonal_ones, "weight_decay": 0.0}] if g["params"]]

    def relations(self) -> list[dict[str, Any]]:
        """The relation that the export records: ``compatible`` with the old space, with its measured evidence."""
        if self._exported is None:
            return []
        config, old, context = self._exported
        evidence: dict[str, Any] = {"method": "compat:bt2", "added_dim": self.encoder.head.added_dim}
        if config.measure:
            evidence |= measured_compatibility(self.exported_encoder(), old.encoder, context)
        return [{"kind": "compatible", "to": old.fingerprint(), "evidence": evidence}]
