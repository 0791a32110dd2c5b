"""`detection:torchvision` beside its torchvision model called directly: python benchmarks/detector_inference.py

Faster R-CNN, Mask R-CNN and RetinaNet on ResNet-18 with a feature pyramid, first weights, and a score threshold that
lets 100 objects through, as many as are kept. The wrapped side is ``Detector.detect``: pictures in, objects
on the CPU out. The other is the same torchvision model called with the same pictures. They take turns on one thread;
the ratio is that of the shortest processor times, and the results of both must be the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from bowerbird_detection.configs import TorchvisionConfig
from bowerbird_detection.detectors import TorchvisionDetector
from common import shortest, write_result

LIMIT = 1.05  # of the time: throughput within 5 %
CLASSES = tuple(f"class {i}" for i in range(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=320, help="shorter side of the pictures")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = {}
    for kind in ("faster-rcnn", "mask-rcnn", "retinanet"):
        torch.manual_seed(0)
        config = TorchvisionConfig(
            detector=kind,  # type: ignore[arg-type]
            backbone="resnet18",
            classes=CLASSES,
            shorter_side=options.side,
            longer_side=2 * options.side,
            score_threshold=0.01 if kind == "retinanet" else 0.05,
        )
        detector = TorchvisionDetector.build(config).eval()
        images = [torch.rand(3, options.side, options.side * 4 // 3) for _ in range(options.batch)]

        @torch.no_grad()
        def direct(detector: TorchvisionDetector = detector, images: list[torch.Tensor] = images) -> Any:
            return detector.model(images)

        def wrapped(detector: TorchvisionDetector = detector, images: list[torch.Tensor] = images) -> Any:
            return detector.detect(images)

        for ours, plain in zip(wrapped(), direct(), strict=True):
            assert torch.equal(ours.boxes, plain["boxes"]) and torch.equal(ours.scores, plain["scores"])
        seconds = shortest({"wrapped": wrapped, "direct": direct}, options.rounds)
        cases[kind] = {
            "ratio": round(seconds["wrapped"] / seconds["direct"], 4),
            "pictures_per_s": round(options.batch / seconds["wrapped"], 2),
            "direct_pictures_per_s": round(options.batch / seconds["direct"], 2),
            "objects": sum(len(found.boxes) for found in wrapped()),
        }
    result = {"side": options.side, "batch": options.batch, "limit_ratio": LIMIT, "cases": cases}
    write_result("detector_inference", result, out=options.output)


if __name__ == "__main__":
    main()
