"""Encoders of texts: word pieces to one vector per piece, in every layer.

``TextTransformer`` is a small transformer of our own, for vocabularies made of the captions. ``TransformersText`` holds
a DistilBERT or BERT model of the transformers library, from a folder of weights. Both give the same: a list of hidden
states, the class piece first in every sequence.

B batch, L pieces, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

from bowerbird.errors import InputError, MissingExtraError


class TextTransformer(nn.Module):
    """Piece and position embeddings and pre-norm blocks with exact GELU; padding is never a key.

    Args:
        vocab_size: Number of pieces.
        embed_dim: D, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads.
        max_length: Longest sequence in pieces.
        mlp_ratio: Hidden width of a block's perceptron, over D.
        dropout: After the embeddings, and on both branches of every block.

    Raises:
        InputError: Values outside these ranges.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        max_length: int = 77,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise InputError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        if vocab_size < 1 or depth < 0 or max_length < 3 or not mlp_ratio > 0 or not 0 <= dropout < 1:
            raise InputError(
                f"vocab_size = {vocab_size}, depth = {depth}, max_length = {max_length}, mlp_ratio = {mlp_ratio}, "
                f"dropout = {dropout}: expected 1 or more, 0 or more, 3 or more, above 0, and 0 to below 1"
            )
        self.vocab_size, self.embed_dim, self.depth, self.max_length = vocab_size, embed_dim, depth, max_length
        self.dropout = dropout
        self.embeddings = nn.Embedding(vocab_size, embed_dim)
        self.positions = nn.Parameter(torch.empty(1, max_length, embed_dim))
        self.blocks = nn.ModuleList(TextBlock(embed_dim, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """depth + 1 tensors ``(B, L, D)``: the embeddings, then the output of every block, the last one normed.

        Args:
            input_ids: int64 ``(B, L)``, L up to ``max_length``.
            attention_mask: ``(B, L)``, 1 (or true) for pieces, 0 for padding; by default all are pieces.

        Raises:
            InputError: Another shape, too long, or (on the CPU) an index outside the vocabulary.
        """
        check_pieces(input_ids, attention_mask, vocab_size=self.vocab_size, max_length=self.max_length)
        keys = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        states = [self.embeddings(input_ids) + self.positions[:, : input_ids.shape[1]]]
        x = dropout(states[0], self.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, keys)
            states.append(self.norm(x) if i + 1 == self.depth else x)
        return states


class TextBlock(nn.Module):
    """x + Attention(LN x), then + MLP(LN x)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """``keys``: bool ``(B, 1, 1, L)``, true where a piece may be looked at."""
        shape = (3, self.heads, x.shape[2] // self.heads)
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, shape).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=keys).transpose(1, 2).flatten(2)
        x = x + dropout(self.proj(seen), self.dropout, self.training)
        return x + dropout(self.fc2(gelu(self.fc1(self.norm2(x)))), self.dropout, self.training)


class TransformersText(nn.Module):
    """A text model of the transformers library (DistilBERT, BERT), in the same form as ``TextTransformer``.

    Args:
        model: The model; ``from_folder`` and ``from_architecture`` make it.

    Raises:
        InputError: It is no encoder of texts.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config
        if not hasattr(config, "vocab_size") or not hasattr(config, "max_position_embeddings"):
            raise InputError(f"{config.model_type} is no text model of the kind of DistilBERT or BERT")
        self.vocab_size = int(config.vocab_size)
        self.embed_dim = int(getattr(config, "dim", None) or config.hidden_size)
        self.depth = int(getattr(config, "n_layers", None) or config.num_hidden_layers)
        self.max_length = int(config.max_position_embeddings)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TransformersText:
        """Architecture and weights of a local folder; nothing is downloaded, only tensors are read.

        Raises:
            InputError: There is no such folder, or no text model in it.
        """
        if not Path(folder).is_dir():
            raise InputError(f"text model {str(folder)!r}: there is no such folder")
        library = _transformers()
        try:
            model = library.AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"text model {str(folder)!r} cannot be loaded: {_first_line(error)}") from error
        return cls(_without_pooler(model))

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> TransformersText:
        """Fresh weights. ``architecture``: settings of the model with its ``model_type``.

        Raises:
            InputError: transformers knows no such model, or not these settings.
        """
        library = _transformers()
        try:
            model = library.AutoModel.from_config(library.AutoConfig.for_model(**architecture))
        except Exception as error:  # the library checks settings with exceptions of its own
            raise InputError(f"transformers could not build this text model: {_first_line(error)}") from error
        return cls(_without_pooler(model))

    def architecture(self) -> dict[str, Any]:
        """What ``from_architecture`` needs."""
        config = self.model.config
        return {**config.to_diff_dict(), "model_type": config.model_type}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """depth + 1 tensors ``(B, L, D)``: the embeddings, then the output of every layer. See ``TextTransformer``."""
        check_pieces(input_ids, attention_mask, vocab_size=self.vocab_size, max_length=self.max_length)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return list(output.hidden_states)


def check_pieces(input_ids: Tensor, attention_mask: Tensor | None, *, vocab_size: int, max_length: int) -> None:
    """Raises ``InputError`` for pieces that a text encoder cannot take."""
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        raise InputError(f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected int64 (B, L)")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; input_ids has {tuple(input_ids.shape)}"
        )
    if not 1 <= input_ids.shape[1] <= max_length:
        raise InputError(f"sequences of {input_ids.shape[1]} pieces; this text encoder takes 1 to {max_length}")
    # On a GPU looking at the values would wait for it.
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(input_ids):
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= vocab_size:
            raise InputError(
                f"input_ids holds {low if low < 0 else high}; this text encoder knows pieces 0 to {vocab_size - 1}: "
                "the tokenizer belongs to another one"
            )


def _transformers() -> Any:
    """The library, which takes seconds to import. Raises ``MissingExtraError`` where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "this text model needs transformers: pip install 'bowerbird-videotext[transformers]'"
        ) from error
    return transformers


def _without_pooler(model: Any) -> Any:
    """BERT's pooler is not used: its weights would be stored, and get no gradient."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
