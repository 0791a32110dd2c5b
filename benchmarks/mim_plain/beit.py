"""BEiT's step: tokens of the small view, cross-entropy of the masked patches of the large one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bowerbird_mim.beit import BEiTObjective, BlockwiseMaskGenerator, MaskedTokenModel
from bowerbird_mim.beit_vit import BEiTEncoder
from bowerbird_mim.tokenizer import DiscreteVAE
from mim_plain.vit import BATCH, SIZES, Mlp, PatchEmbed, step_of

TOKENIZERS: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "num_tokens": 64, "codebook_dim": 32, "hidden_dim": 32, "num_layers": 2},
    "tiny": {"image_size": 112, "num_tokens": 8192, "codebook_dim": 64, "hidden_dim": 64, "num_layers": 3},
}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, qkv_bias).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, 4 * dim)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), bias)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PlainBEiT(nn.Module):
    """Encoder, mask token and head, with the names of the official checkpoint."""

    def __init__(
        self, image_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, vocab_size: int
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))
        self.register_buffer("index", index_of(side), persistent=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.lm_head = nn.Linear(embed_dim, vocab_size)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Features of the patches after the final norm, ``(B, L, D)``."""
        x = self.patch_embed(images)
        hidden = mask[..., None].to(x.dtype)
        x = x * (1 - hidden) + self.mask_token * hidden
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        bias = self.table[self.index].permute(2, 0, 1)[None]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)[:, 1:]


def index_of(side: int) -> Tensor:
    """Rows of the table for every pair of tokens of a square grid, the class token first."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = rows.flatten(), columns.flatten()
    last = (2 * side - 1) ** 2 + 3
    index = torch.empty(side**2 + 1, side**2 + 1, dtype=torch.long)
    index[1:, 1:] = (row[:, None] - row + side - 1) * (2 * side - 1) + (column[:, None] - column + side - 1)
    index[0, :], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def plain_model(model: MaskedTokenModel, size: str) -> PlainBEiT:
    """With the weights of ``model``."""
    plain = PlainBEiT(**SIZES[size], vocab_size=model.vocab_size)
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    state["table"] = state.pop("rel_pos_bias.relative_position_bias_table")
    plain.load_state_dict(state)
    return plain


def parts(size: str) -> tuple[DiscreteVAE, MaskedTokenModel, dict[str, Tensor]]:
    """A tokenizer, a model and a batch; the masks are those of ``BlockwiseMaskGenerator``."""
    tokenizer = DiscreteVAE(channels=3, **TOKENIZERS[size]).eval().requires_grad_(False)
    model = MaskedTokenModel(BEiTEncoder(**SIZES[size]), tokenizer.vocab_size)
    side, patches = SIZES[size]["image_size"], model.encoder.grid[0] * model.encoder.grid[1]
    make = BlockwiseMaskGenerator(model.encoder.grid, round(0.38 * patches))
    generator = torch.Generator().manual_seed(0)
    small = TOKENIZERS[size]["image_size"]
    return tokenizer, model, {
        "image": torch.randn(BATCH[size], 3, side, side),
        "tokenizer_image": torch.randn(BATCH[size], 3, small, small),
        "token_mask": torch.stack([make(generator).flatten() for _ in range(BATCH[size])]),
    }  # fmt: skip


def plain_beit(size: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    tokenizer, model, batch = parts(size)
    objective, plain = BEiTObjective(tokenizer, model=model), plain_model(model, size)

    def loss() -> Tensor:
        mask = batch["token_mask"]
        with torch.no_grad():
            ids = tokenizer.encoder(batch["tokenizer_image"]).argmax(1).flatten(1)
        return F.cross_entropy(plain.lm_head(plain(batch["image"], mask)[mask]), ids[mask])

    return step_of(model, lambda: objective(batch).total), step_of(plain, loss)
