"""What DSU adds to a training step of ResNet-18, and to evaluation: python benchmarks/dsu_step.py

A step is forward, cross-entropy, backward and SGD on one batch, with noise at the authors' six points. Whether a point
acts is a coin per step, so two cases are measured, every point acts and none does; the step with p = 0.5 takes their
mean, since the points' costs add up. The same network is timed with and without the noise in turns on one thread, and
with the formula written plainly (torch.var) for comparison. The ratio is that of the shortest processor times, which
others on the machine disturb least. The C library keeps freed memory (`common.KEEP_MEMORY`) on both sides;
``--malloc default`` leaves it as it is, and is measured, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_domain.dsu import FeatureStatisticsUncertainty, insert_after
from common import KEEP_MEMORY, result_with_default_memory, shortest, start_again, write_result

LIMIT_TRAINING = 1.05
LIMIT_EVALUATION = 1.01  # zero, as far as a clock can tell


class Plain(nn.Module):
    """The paper's equations with torch's own mean and variance."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mean, std = x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-6).sqrt()
        beta = mean + torch.randn_like(mean) * (mean.var(0, keepdim=True) + 1e-6).sqrt()
        gamma = std + torch.randn_like(std) * (std.var(0, keepdim=True) + 1e-6).sqrt()
        return gamma * (x - mean) / std + beta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep", help="see above")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    start_again(KEEP_MEMORY if options.malloc == "keep" else {})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=7).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    labels = torch.arange(options.batch) % 7

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate() -> None:
        model(images)

    def inserted(p: float) -> AbstractContextManager[Any]:
        return insert_after(model, ["resnet"], lambda: FeatureStatisticsUncertainty(p))

    cases: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "none": nullcontext,
        "every point acts": lambda: inserted(1.0),
        "no point acts": lambda: inserted(0.0),
        "plain torch": lambda: insert_after(model, ["resnet"], Plain),
    }
    model.train()
    training = shortest(dict.fromkeys(cases, step), options.rounds, cases)
    model.eval()
    evaluation = shortest(dict.fromkeys(("none", "every point acts"), evaluate), options.rounds, cases)
    half = (training["every point acts"] + training["no point acts"]) / 2

    def against(seconds: float, reference: float) -> dict[str, float]:
        return {
            "ratio": round(seconds / reference, 4),
            "ms": round(1e3 * seconds, 2),
            "reference_ms": round(1e3 * reference, 2),
        }

    result: dict[str, Any] = {
        "size": options.size,
        "batch": options.batch,
        "limit_training": LIMIT_TRAINING,
        "limit_evaluation": LIMIT_EVALUATION,
        "training": {
            "p = 0.5": against(half, training["none"]),
            "p = 1": against(training["every point acts"], training["none"]),
            "p = 1, torch.var": against(training["plain torch"], training["none"]),
        },
        "evaluation": against(evaluation["every point acts"], evaluation["none"]),
    }
    if options.malloc == "keep":
        asked = [f"--{name}={getattr(options, name)}" for name in ("size", "batch", "rounds")]
        found = result_with_default_memory(__file__, *asked)["training"]
        result["training"] |= {f"{case}, memory given back": values for case, values in found.items()}
    write_result("dsu_step", result, out=options.output)


if __name__ == "__main__":
    main()
