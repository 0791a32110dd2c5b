"""The old model of an upgrade, as the objectives of this package need it: encoder, identity, classes, classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file
from torch import Tensor

from bowerbird.protocols import BuildContext, Encoder, freeze

CLASSIFIER = "classifier.weight"


@dataclass(frozen=True)
class OldModel:
    """A frozen old encoder and what is left of its training.

    Attributes:
        path: Where it was loaded from.
        encoder: Frozen, in eval mode.
        fingerprint: Of its space.
        classes: Names of the classes it was trained with; may be empty.
        classifier: ``(C_old, d_old)`` weight it was trained with, or ``None``. A bias is left out, as in openBCT.
    """

    path: str
    encoder: Encoder
    fingerprint: str
    classes: Sequence[str]
    classifier: Tensor | None

    @classmethod
    def load(cls, run: str | None, encoder: str | None, context: BuildContext) -> Self:
        """From the folder of a run, or else from an exported encoder or an encoder reference."""
        from bowerbird.encoders import load_encoder  # image libraries: the losses alone do without

        if run is not None:
            trained = context.load_run(run)
            frozen = freeze(trained.encoder)
            return cls(
                str(run),
                frozen,
                load_encoder(run).fingerprint,
                trained.classes,
                trained.objective_state.get(CLASSIFIER),
            )
        assert encoder is not None
        loaded = load_encoder(encoder)
        stored = Path(encoder) / "classifier.safetensors"
        classifier = load_file(stored).get(CLASSIFIER) if stored.is_file() else None
        return cls(encoder, freeze(loaded.module), loaded.fingerprint, loaded.spec.classes, classifier)


def measured_compatibility(new, old, context):
    return {}
