"""What the tests of BEiT and mc-BEiT share: a tokenizer without training, and models with the official weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bowerbird.data.images import Preprocessing
from bowerbird.protocols import BuildContext, Encoder, TrainedRun
from bowerbird.testing import SimpleBuildContext, assert_close
from bowerbird_mim.beit import MaskedTokenModel
from bowerbird_mim.beit_vit import BEiTEncoder

SMALL = {"image_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}


class ColourTokenizer(Encoder):
    """A tokenizer without training: the distance of a cell's mean colour to ``vocab_size`` fixed colours."""

    def __init__(self, vocab_size: int = 6, stride: int = 2) -> None:
        super().__init__()
        self.vocab_size, self.stride, self.embed_dim = vocab_size, stride, vocab_size
        self.preprocessing = Preprocessing(size=8)
        generator = torch.Generator().manual_seed(0)
        self.colours = torch.nn.Parameter(torch.randn(vocab_size, 3, generator=generator))

    def logits(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, self.stride)  # (N, 3, h, w)
        return -(means[:, None] - self.colours[..., None, None]).square().sum(dim=2)

    def ids(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(dim=1)

    def decode(self, ids: Tensor) -> Tensor:
        cells = self.colours[ids].permute(0, 3, 1, 2)
        return cells.repeat_interleave(self.stride, dim=2).repeat_interleave(self.stride, dim=3)


def context_with(tokenizer: Encoder) -> BuildContext:
    return SimpleBuildContext(runs={"runs/t": TrainedRun("runs/t", tokenizer, {}, (), {})})


def from_golden(values: dict) -> MaskedTokenModel:
    encoder = BEiTEncoder(
        image_size=values["img_size"],
        patch_size=values["patch_size"],
        in_channels=values["images"].shape[1],
        embed_dim=values["embed_dim"],
        depth=values["depth"],
        num_heads=values["num_heads"],
        mlp_ratio=values["mlp_ratio"],
        layer_scale=values["layer_scale_init"],
        layer_norm_eps=values["layernorm_eps"],
    )
    model = MaskedTokenModel(encoder, values["vocab_size"]).double()
    state = {
        name.removeprefix("sd."): value
        for name, value in values.items()
        if name.startswith("sd.") and not name.endswith("relative_position_index")
    }
    own = ("mask_token", "lm_head")
    model.load_state_dict({k if k.startswith(own) else f"encoder.{k}": value for k, value in state.items()})
    return model


def compare_gradients(model: MaskedTokenModel, values: dict) -> None:
    named = {name.removeprefix("encoder."): parameter for name, parameter in model.named_parameters()}
    gradients = {name.removeprefix("grad."): value for name, value in values.items() if name.startswith("grad.")}
    assert gradients.keys() == named.keys()
    for name, value in gradients.items():
        assert_close(named[name].grad, value, atol=1e-10, where=name)
