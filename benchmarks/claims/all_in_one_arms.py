"""The arms of all-in-one.toml: which garment comes first? Clips of two garments and a blank frame, made in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining_arms import Values, dataset
from torch import Tensor, nn

from bowerbird_videotext.all_in_one import UnifiedVideoTextTransformer
from bowerbird_videotext.all_in_one_heads import OpenEndedQAHead

QUESTION = torch.tensor([[2, 5, 6, 3]])  # [CLS], two words, [SEP]: the same for every clip
CLASSES = 10
MEAN, STD = 0.28, 0.35  # of Fashion-MNIST's pixels


class Clips:
    """Pictures of a split, of which pairs of different classes are drawn.

    A clip is garment A, garment B, blank: ``(3, 3, 28, 28)``; its label the class of A.
    """

    def __init__(self, split: str) -> None:
        pictures = dataset("core:fashion-mnist", split)
        self.pixels = torch.from_numpy(pictures.images)
        self.labels = torch.tensor(pictures.labels())

    def draw(self, count: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Clips ``(count, 3, 3, 28, 28)`` and the classes of both garments ``(count, 2)``."""
        pairs = np.empty((0, 2), np.int64)
        while len(pairs) < count:
            drawn = generator.integers(len(self.pixels), size=(2 * count, 2))
            labels = self.labels.numpy()[drawn]
            pairs = np.concatenate([pairs, drawn[labels[:, 0] != labels[:, 1]]])
        chosen = torch.from_numpy(pairs[:count])
        grey = self.pixels[chosen].float() / 255  # (count, 2, 28, 28)
        frames = torch.cat([grey, torch.zeros_like(grey[:, :1])], dim=1)
        return ((frames - MEAN) / STD)[:, :, None].expand(-1, -1, 3, -1, -1), self.labels[chosen]


class Namer(nn.Module):
    """The unified transformer with its head for answers."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        sizes = {key: value for key, value in settings.items() if key != "roll"}
        divisor = 8 if settings.get("roll", True) else None
        self.transformer = UnifiedVideoTextTransformer(**sizes, roll_divisor=divisor)
        self.head = OpenEndedQAHead(self.transformer.embed_dim, CLASSES, dropout=0.0)

    def forward(self, clips: Tensor) -> Tensor:
        return self.head(self.transformer(clips, QUESTION.expand(len(clips), -1)).pooled)


def run(plan: Mapping[str, Any], seed: int) -> Values:
    """``<arm>.<value>``, and the thresholds of the plan under their own names.

    The seed sets the first weights, the clips of the training and those of the test; arms share all three.
    """
    train, test = Clips("train"), Clips("test")
    clips, labels = test.draw(plan["test"], np.random.default_rng([seed, 1]))
    values: Values = {"zero": 0.0, **{name: float(name) for name in plan["thresholds"]}}
    for arm in plan["arms"]:
        model = trained({**plan["model"], **arm["set"]}, train, plan["train"], seed)
        torch.manual_seed(seed)  # the arm that shuffles patches draws in the test, too
        answers = answered(model, clips)
        found = {
            "accuracy": answers == labels[:, 0],
            "either": (answers[:, None] == labels).any(dim=1),
            "turned": answered(model, clips[:, [1, 0, 2]]) != answers,
        }
        values |= {f"{arm['name']}.{key}": float(rows.float().mean()) for key, rows in found.items()}
    return values


def trained(settings: Mapping[str, Any], data: Clips, train: Mapping[str, Any], seed: int) -> Namer:
    torch.manual_seed(seed)
    model = Namer(settings).train()
    generator = np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=train["lr"])
    for _ in range(train["steps"]):
        clips, labels = data.draw(train["batch_size"], generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(clips), labels[:, 0]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def answered(model: Namer, clips: Tensor) -> Tensor:
    return torch.cat([model(part) for part in clips.split(250)]).argmax(dim=1)
