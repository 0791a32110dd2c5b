"""``videotext:dual-encoder``: clips and captions to vectors of one space, by two encoders that never meet.

The architecture of "Frozen in Time" (Bain et al., ICCV 2021, arXiv 2104.00650), which MCQ, MILES and MAC train in other
ways. A picture is a video of one frame.

B batch, T frames, N patches, L word pieces, P width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from bowerbird.batch import Batch
from bowerbird.data.images import Preprocessing
from bowerbird.encoders.bundle import TOKENIZER, WEIGHTS, read_manifest
from bowerbird.encoders.weights import load_strictly, read_weights
from bowerbird.errors import DataError, InputError
from bowerbird.protocols import Encoder, Features
from bowerbird_videotext.dual_encoder_config import DualEncoderConfig, TextConfig
from bowerbird_videotext.losses import cosine_similarity_matrix
from bowerbird_videotext.space_time import SpaceTimeTransformer, inflate_temporal_embedding
from bowerbird_videotext.text import TextTransformer, TransformersText
from bowerbird_videotext.tokenizer import WordPieceTokenizer

VOCABULARY_SLACK = 128  # rows that a text encoder may have more than its tokenizer has pieces: sizes get rounded up


class TextTower(Encoder):
    """What encoders that take texts share: a tokenizer, and a text encoder made for its vocabulary.

    Attributes:
        tokenizer: ``None`` until ``open`` was called, where the settings name none.
        text_encoder: The same.
        vocabulary: 32 bytes that name the tokenizer's vocabulary; zeros without one. Stored with the weights, so that
            an encoder's fingerprint depends on it and another tokenizer is refused.
    """

    tokenizer: WordPieceTokenizer | None
    text_encoder: nn.Module | None
    vocabulary: Tensor

    def prepare_texts(self, config: TextConfig) -> None:
        """Make tokenizer and text encoder as far as ``config`` says them. Call it at the end of ``__init__``.

        Raises:
            InputError: A folder holds no tokenizer or no text model, or the two do not fit each other.
        """
        self.text_config = config
        self.tokenizer, self.text_encoder = None, None
        self.register_buffer("vocabulary", torch.zeros(32, dtype=torch.uint8))
        if config.text_model is not None:
            self.text_encoder = TransformersText.from_folder(config.text_model)
        elif config.text_architecture is not None:
            self.text_encoder = TransformersText.from_architecture(config.text_architecture)
        elif config.vocabulary is not None:
            self.text_encoder = self._small_text_encoder(config.vocabulary)
        source = config.tokenizer or config.text_model
        if source is not None:
            self.use_tokenizer(WordPieceTokenizer.from_folder(source, max_length=self._max_tokens()))

    def open(self, captions: Sequence[str]) -> None:
        """Make a tokenizer of ``captions`` and the text encoder of its vocabulary, unless there are both already."""
        if self.tokenizer is None:
            config = self.text_config
            if config.vocabulary is not None or config.text_architecture is not None:
                raise InputError(
                    "this text encoder has a vocabulary, and no tokenizer came with it; set tokenizer to its folder"
                )
            self.use_tokenizer(
                WordPieceTokenizer.train(captions, vocab_size=config.vocab_size, max_length=self._max_tokens())
            )

    def use_tokenizer(self, tokenizer: WordPieceTokenizer) -> None:
        """Take ``tokenizer``; where there is no text encoder yet, make it of its vocabulary.

        Raises:
            InputError: It has other pieces than the text encoder, or is not the one that the weights were trained with.
        """
        place = self.vocabulary.device
        if self.text_encoder is None:
            self.text_encoder = self._small_text_encoder(len(tokenizer)).to(place)
        known = int(self.text_encoder.vocab_size)  # type: ignore[arg-type]
        if not 0 <= known - len(tokenizer) < VOCABULARY_SLACK:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} word pieces, the text encoder {known}: they do not belong together"
            )
        digest = torch.frombuffer(bytearray(tokenizer.digest()), dtype=torch.uint8).to(place)
        if bool(self.vocabulary.any()) and not torch.equal(self.vocabulary, digest):
            raise InputError("the tokenizer is not the one that this text encoder was trained with")
        self.vocabulary.copy_(digest)
        tokenizer.max_length = min(tokenizer.max_length, self._max_tokens())
        self.tokenizer = tokenizer

    def load_tokenizer(self, folder: str | Path) -> None:
        """The tokenizer of an exported folder. Raises ``DataError`` where it is not the one of the weights."""
        try:
            self.use_tokenizer(WordPieceTokenizer.from_folder(folder, max_length=self._max_tokens()))
        except InputError as error:
            raise DataError(f"{str(folder)!r}: {error}") from error

    def load_trained(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Take the weights ``state`` of an exported folder, as training goes on from them.

        Raises:
            DataError: They do not fit, or were trained with another tokenizer than the one that is set.
        """
        load_strictly(self, state, source=str(folder))
        try:
            self.use_tokenizer(self.ready_tokenizer())  # compares it with the vocabulary that came with the weights
        except InputError as error:
            raise DataError(f"weights {str(folder)!r}: {error}") from error

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``(B, L)``. Raises ``InputError`` for empty texts."""
        return self.ready_tokenizer()(texts)

    def ready_tokenizer(self) -> WordPieceTokenizer:
        """The tokenizer. Raises ``InputError`` where there is none yet."""
        if self.tokenizer is None:
            raise InputError(
                "this encoder has no tokenizer yet: training makes one of the captions, or set tokenizer to a folder"
            )
        return self.tokenizer

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Without the sources of first weights and of the tokenizer, which lie beside the weights."""
        kept = {key: value for key, value in config.items() if key not in ("weights", "text_model", "tokenizer")}
        if isinstance(self.text_encoder, TransformersText):
            kept["text_architecture"] = self.text_encoder.architecture()
        elif self.text_encoder is not None:
            kept["vocabulary"] = int(self.text_encoder.vocab_size)  # type: ignore[arg-type]
        return kept

    def _small_text_encoder(self, vocabulary: int) -> TextTransformer:
        c = self.text_config
        return TextTransformer(
            vocabulary, c.text_dim, c.text_depth, c.text_heads, max_length=c.max_tokens, dropout=c.text_dropout
        )

    def _max_tokens(self) -> int:
        longest = getattr(self.text_encoder, "max_length", None)
        return self.text_config.max_tokens if longest is None else min(self.text_config.max_tokens, int(longest))


class DualEncoder(TextTower):
    """A video encoder and a text encoder with a linear map each into one space.

    Args:
        video_encoder: Clips ``(B, T, 3, H, W)`` to ``(B, D)``.
        text_encoder: ``(input_ids, attention_mask)`` to a list of hidden states, class piece first; ``None``: made by
            ``open`` as ``texts`` says.
        projection_dim: P.
        tokenizer: Of the text encoder.
        preprocessing: How a frame becomes a tensor; ``None`` where only tensors come.
        texts: Settings of a text encoder that is not given.

    Raises:
        InputError: Tokenizer and text encoder do not fit each other.
    """

    def __init__(
        self,
        video_encoder: SpaceTimeTransformer,
        text_encoder: nn.Module | None = None,
        projection_dim: int = 256,
        *,
        tokenizer: WordPieceTokenizer | None = None,
        preprocessing: Preprocessing | None = None,
        texts: TextConfig | None = None,
    ) -> None:
        super().__init__()
        self.preprocessing, self.frames, self.embed_dim = preprocessing, video_encoder.max_frames, projection_dim
        self.video_encoder = video_encoder
        self.prepare_texts(texts or TextConfig())
        if text_encoder is not None:
            self.text_encoder = text_encoder
        width = self.text_config.text_dim if self.text_encoder is None else int(self.text_encoder.embed_dim)  # type: ignore[arg-type]
        self.video_proj = nn.Linear(video_encoder.embed_dim, projection_dim)
        self.text_proj = nn.Linear(width, projection_dim)
        if tokenizer is not None:
            self.use_tokenizer(tokenizer)

    @classmethod
    def build(cls, config: DualEncoderConfig) -> Self:
        """Raises ``InputError`` or ``DataError`` for folders and files that do not fit, naming what differs."""
        encoder = cls(
            video_encoder_of(config), None, config.projection_dim, preprocessing=config.preprocessing(), texts=config
        )
        if config.weights is not None:
            load_first_weights(encoder, Path(config.weights), inflate=config.inflate)
        return encoder

    def stored_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in super().stored_config(config).items() if key != "inflate"}

    # ---------------------------------------------------------------------------------------------- vectors

    def encode_video(
        self,
        video: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        return_tokens: bool = False,
    ) -> Any:
        """Vectors of clips ``(B, P)``, not normalised; with ``return_tokens`` also of their patches ``(B, T, n, P)``.

        Args:
            video: ``(B, T, 3, H, W)``, T up to ``frames``; or ``(B, O, T, 3, H, W)``: O clips of every video, whose
                vectors are averaged.
            keep, mask, return_tokens: As in ``SpaceTimeTransformer.forward``.
        """
        if video.ndim == 6:
            if keep is not None or mask is not None or return_tokens:
                raise InputError("several clips of a video give one vector; keep, mask and tokens are for single clips")
            return self.encode_video(video.flatten(0, 1)).unflatten(0, video.shape[:2]).mean(dim=1)
        if return_tokens:
            whole, patches = self.video_encoder(video, keep=keep, mask=mask, return_tokens=True)
            return self.video_proj(whole), self.video_proj(patches)
        return self.video_proj(self.video_encoder(video, keep=keep, mask=mask))

    def text_states(self, text: Mapping[str, Tensor]) -> list[Tensor]:
        """Hidden states ``(B, L, D)`` of every layer of the text encoder, the embeddings first."""
        if self.text_encoder is None:
            self.ready_tokenizer()  # says what to do
        if "input_ids" not in text:
            raise InputError(f"text has {', '.join(text) or 'nothing'}; expected input_ids, as tokenize gives them")
        states: list[Tensor] = self.text_encoder(text["input_ids"], text.get("attention_mask"))  # type: ignore[misc]
        return states

    def project_text(self, states: Tensor) -> Tensor:
        """The last hidden states, or any rows of them, in the shared space: a linear map after a ReLU."""
        return self.text_proj(relu(states))

    def encode_text(self, text: Mapping[str, Tensor] | Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Vectors of captions ``(B, P)``, not normalised: the class piece of the last hidden states, projected.

        ``text`` is what ``tokenize`` gives, or its ``input_ids (B, L)`` with the mask as second argument.
        """
        if isinstance(text, Tensor):
            text = (
                {"input_ids": text} if attention_mask is None else {"input_ids": text, "attention_mask": attention_mask}
            )
        return self.project_text(self.text_states(text)[-1][:, 0])

    def similarity(self, texts: Tensor, videos: Tensor) -> Tensor:
        """Cosines ``(Q, G)`` of the vectors of texts ``(Q, P)`` and videos ``(G, P)``."""
        return cosine_similarity_matrix(texts, videos)

    def forward(self, batch: Batch) -> Features:
        """Features of ``video``, else of ``image`` as videos of one frame, else of ``text``."""
        if "video" in batch:
            return Features(pooled=self.encode_video(batch["video"]))
        if "image" in batch:
            return Features(pooled=self.encode_video(batch["image"][:, None]))
        if "text" in batch:
            return Features(pooled=self.encode_text(batch["text"]))
        raise InputError(f"the batch has none of video, image and text; it has {', '.join(batch) or 'nothing'}")


def video_encoder_of(config: DualEncoderConfig) -> SpaceTimeTransformer:
    """The video encoder that ``config`` describes, with fresh weights."""
    return SpaceTimeTransformer(
        config.image_size,
        config.patch_size,
        config.embed_dim,
        config.depth,
        config.num_heads,
        config.mlp_ratio,
        max_frames=config.frames,
        time_init=config.time_init,
        temporal_attention=config.temporal_attention and config.attention == "divided",
        temporal_embedding=config.temporal_embedding,
        attention=config.attention,
    )


# ------------------------------------------------------------------------------------------------ first weights


def load_first_weights(encoder: DualEncoder, path: Path, *, inflate: Any = "zeros") -> None:
    """Fill ``encoder`` from a trained dual encoder, or its video encoder from a timm ViT.

    Args:
        encoder: What is filled.
        path: A folder of a dual encoder or of its run, or a file of weights of a timm vision transformer.
        inflate: What more frames get; see ``inflate_temporal_embedding``.

    Raises:
        DataError: The files are missing, damaged or of another architecture; the message lists what differs.
    """
    for folder in (path, path / "encoder"):
        if (folder / "encoder.json").is_file():
            _load_dual_encoder(encoder, folder, inflate)
            return
    load_vit_weights(encoder.video_encoder, path)


def _load_dual_encoder(encoder: DualEncoder, folder: Path, inflate: Any) -> None:
    manifest = read_manifest(folder)
    use = manifest["use"]
    if use != "videotext:dual-encoder":
        raise DataError(f"weights {str(folder)!r} are of {use}; expected a videotext:dual-encoder, or a ViT's file")
    if encoder.text_encoder is None and "text_architecture" in manifest["config"]:
        raise DataError(f"weights {str(folder)!r} have a text encoder of transformers: set text_model to its folder")
    if encoder.tokenizer is None:
        encoder.load_tokenizer(folder / TOKENIZER)
    state = read_weights(folder / WEIGHTS)
    key = "video_encoder.temporal_embed"
    if key in state:
        state[key] = inflate_temporal_embedding(state[key], encoder.video_encoder.max_frames, inflate)
    encoder.load_trained(state, folder)


def load_vit_weights(encoder: SpaceTimeTransformer, path: str | Path) -> None:
    """Fill ``encoder`` with the weights of a timm ViT; what concerns time stays as it is.

    Raises:
        DataError: The file cannot be read, or is of another architecture; the message lists what differs.
    """
    found = read_weights(path)
    own = encoder.state_dict()
    extra = ("head.", "head_dist.", "pre_logits.", "fc_norm.", "mask_token")
    kept = {key: value for key, value in found.items() if not key.startswith(extra)}
    of_time = ("timeattn.", "norm3.", "temporal_embed")
    kept |= {key: value for key, value in own.items() if any(part in key for part in of_time)}
    load_strictly(encoder, kept, source=str(path))
