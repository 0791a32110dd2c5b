"""``domain:miou``: mean intersection over union of every segmentation set, in the pictures' own size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from bowerbird.errors import InputError
from bowerbird.protocols import EvalContext, Evaluator, Metrics
from bowerbird_domain.cdcl import nearest_dataset
from bowerbird_domain.segmentation import IGNORE, SegmentationEncoder, native_pixels
from bowerbird_domain.segmentation_configs import MIoUConfig
from bowerbird_domain.segmentation_sets import SegmentationSets


class MIoU(Evaluator):
    """Per set: ``SET/mIoU``, the mean over classes of the intersection over union, summed over all pictures first.

    A class that neither the label maps nor the predictions of a set hold is left out of its mean. ``SET/iou/CLASS`` are
    the terms, ``SET/accuracy`` the share of right pixels, ``mIoU`` the mean over sets. Index 255 does not count.
    """

    def __init__(self, config: MIoUConfig) -> None:
        self.config = config

    @classmethod
    def build(cls, config: MIoUConfig) -> Self:
        return cls(config)

    def run(self, context: EvalContext) -> Metrics:
        """Raises ``InputError`` for encoders, data sets, names and classes that do not fit together."""
        encoder, c = context.encoder, self.config
        if not isinstance(encoder, SegmentationEncoder):
            raise InputError(f"domain:miou measures segmentation networks, not a {type(encoder).__name__}")
        dataset = context.dataset(c.dataset, split=c.split, **c.settings)
        if not isinstance(dataset, SegmentationSets):
            raise InputError(f"domain:miou measures on segmentation sets; {c.dataset!r} has no label maps")
        training = encoder.training
        encoder.eval()
        try:
            found = [self._of_set(encoder, dataset, position) for position in range(len(dataset.domains))]
        finally:
            encoder.train(training)
        values = {key: value for of_set in found for key, value in of_set.items()}
        return Metrics(summary={"mIoU": float(np.mean([values[f"{name}/mIoU"] for name in dataset.domains])), **values})

    def _of_set(self, encoder: SegmentationEncoder, dataset: SegmentationSets, domain: int) -> dict[str, float]:
        name = dataset.domains[domain]
        classes = dataset.label_spaces[name]
        known = encoder.label_spaces.get(name)
        if known != len(classes):
            raise InputError(
                f"domain:miou: the set {name!r} has {len(classes)} classes; the network "
                + (f"has {known} for it" if known else f"was trained on {', '.join(encoder.label_spaces) or 'none'}")
                + ". Measure on the sets that it was trained on"
            )
        device = next(encoder.parameters()).device
        branch = name
        if self.config.branch == "nearest":
            if encoder.statistics != "private":
                raise InputError("branch = 'nearest' needs a network with statistics per data set (domain:cdcl)")
            first, _ = next(self._batches(encoder, dataset, domain))
            branch = nearest_dataset(encoder.network, first.to(device))
        jaccard = MulticlassJaccardIndex(len(classes), average="none", ignore_index=IGNORE).to(device)
        with torch.no_grad():
            for images, targets in self._batches(encoder, dataset, domain):
                maps = encoder.maps(images.to(device), branch)
                jaccard.update(encoder.classify(maps, images.shape[2:], name).argmax(dim=1), targets.to(device))
        pixels = jaccard.confmat.double().cpu()  # (K, K) by class and prediction
        if not pixels.any():
            raise InputError(f"domain:miou: the label maps of the set {name!r} hold nothing but {IGNORE}")
        seen = (pixels.sum(dim=0) + pixels.sum(dim=1)) > 0
        ious = jaccard.compute().cpu().double()
        return {
            f"{name}/mIoU": float(ious[seen].mean()),
            f"{name}/accuracy": float(pixels.trace() / pixels.sum()),
            **{f"{name}/iou/{one}": float(ious[i]) for i, one in enumerate(classes) if seen[i]},
        }

    def _batches(
        self, encoder: SegmentationEncoder, dataset: SegmentationSets, domain: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures (B, 3, H, W) and label maps (B, H, W) of one set, neighbours of equal size together."""
        assert encoder.preprocessing is not None
        gathered: list[tuple[Any, Any]] = []
        for index, found in enumerate(dataset.domain_indices()):
            if found != domain:
                continue
            item = dataset[index]
            pixels, target = native_pixels(encoder.preprocessing, item["image"]), item["label_map"]
            if gathered and (len(gathered) == self.config.batch_size or gathered[0][1].shape != target.shape):
                yield _stacked(gathered)
                gathered = []
            gathered.append((pixels, target))
        if gathered:
            yield _stacked(gathered)


def _stacked(pairs: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*pairs, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets).astype(np.int64))
