"""MAE's step: a quarter of the patches, mask tokens in a light decoder, normalised pixels of the hidden ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bowerbird_mim.mae import MaskedAutoencoder
from bowerbird_mim.vit import ViTEncoder
from mim_plain.vit import BATCH, SIZES, Block, PlainViT, plain_vit, step_of

DECODER = {"small": (48, 1, 4), "tiny": (192, 4, 3)}  # width, blocks, heads
RATIO = 0.75


class PlainDecoder(nn.Module):
    def __init__(self, dim: int, width: int, depth: int, heads: int, length: int, numbers: int) -> None:
        super().__init__()
        self.decoder_embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, length + 1, width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, numbers)

    def forward(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        fill = self.mask_token.expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], fill], 1)
        patches = patches.gather(1, ids_restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]


def plain_decoder(model: MaskedAutoencoder, size: str) -> PlainDecoder:
    """With the weights of ``model``."""
    encoder = model.encoder
    length, numbers = encoder.grid[0] * encoder.grid[1], 3 * encoder.patch_size**2
    decoder = PlainDecoder(encoder.embed_dim, *DECODER[size], length, numbers)
    decoder.load_state_dict(model.decoder.state_dict())
    return decoder


def target_of(images: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = images.shape
    cut = images.view(batch, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 3, 5, 1)
    patches = cut.reshape(batch, -1, patch * patch * channels)
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def restored(
    vit: PlainViT, decoder: PlainDecoder, images: Tensor, order: Tensor, visible: int
) -> tuple[Tensor, Tensor]:
    """Predictions ``(B, L, P)`` and the mask ``(B, L)`` where the first ``visible`` patches of ``order`` are seen."""
    restore = order.argsort(1)
    patches = vit.embed(images)
    kept = patches.gather(1, order[:, :visible, None].expand(-1, -1, patches.shape[-1]))
    return decoder(vit.encode(kept), restore), (restore >= visible).float()


def make_ours(size: str) -> MaskedAutoencoder:
    return MaskedAutoencoder(ViTEncoder(**SIZES[size]), *DECODER[size])


def make_batch(model: MaskedAutoencoder, size: str) -> tuple[Tensor, Tensor]:
    """Pictures and noise."""
    rows, columns = model.encoder.grid
    return torch.randn(BATCH[size], 3, *model.encoder.image_size), torch.rand(BATCH[size], rows * columns)


def plain_mae(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    model = make_ours(size)
    vit, decoder = plain_vit(model.encoder, size), plain_decoder(model, size)
    images, noise = make_batch(model, size)
    visible = int(noise.shape[1] * (1 - RATIO))

    def loss() -> Tensor:
        pred, mask = restored(vit, decoder, images, noise.argsort(1), visible)
        error = (pred - target_of(images, model.encoder.patch_size)).square().mean(-1)
        return (error * mask).sum() / mask.sum()

    return step_of(model, lambda: model(images, RATIO, noise).loss), step_of(nn.ModuleList([vit, decoder]), loss)
