"""``core:perceptron``: layers on the grey pixels of small pictures, or on feature vectors. The smallest encoder.

For benchmarks and first steps, where a training run should take seconds. B batch, F inputs, D ``embed_dim``.
"""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.configs import PerceptronConfig
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, Features


class Perceptron(Encoder):
    """``depth`` hidden layers of ``width`` with ReLU, then a linear embedding; a linear map with ``depth = 0``.

    Reads ``frozen_features`` ``(B, F)`` or ``image`` ``(B, 3, S, S)``, whose grey value is the mean of the channels and
    whose size makes F = S * S. The pixels count as a frozen trunk: a run may keep them instead of decoding pictures.
    """

    def __init__(self, config: PerceptronConfig) -> None:
        super().__init__()
        if config.image_size is not None:
            self.preprocessing = Preprocessing(
                size=config.image_size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear"
            )
        self.inputs, self.embed_dim = config.num_inputs, config.embed_dim
        layers: list[nn.Module] = []
        width = self.inputs
        for _ in range(config.depth):
            layers += [nn.Linear(width, config.width), nn.ReLU()]
            width = config.width
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.embed_dim))

    @classmethod
    def build(cls, config: PerceptronConfig) -> Self:
        return cls(config)

    def forward(self, batch: Batch) -> Features:
        """Raises ``InputError`` for inputs of another width."""
        values = batch.get("frozen_features")
        if values is None:
            values = self.frozen_trunk(batch)
        if values.ndim != 2 or values.shape[1] != self.inputs:
            raise InputError(f"core:perceptron takes (batch, {self.inputs}) values; found {tuple(values.shape)}.")
        return Features(pooled=self.layers(values.to(next(self.parameters()).dtype)))

    def frozen_trunk(self, batch: Batch) -> Tensor:
        """``(B, S * S)`` grey values. Raises ``InputError`` without pictures, or for some of another shape."""
        images = batch.get("image")
        if images is None:
            raise InputError(f"core:perceptron reads image or frozen_features; the batch has {', '.join(batch)}.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"core:perceptron takes images (batch, 3, size, size); found {tuple(images.shape)}.")
        return images.mean(dim=1).flatten(1)
