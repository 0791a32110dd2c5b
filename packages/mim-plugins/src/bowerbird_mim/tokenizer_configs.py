"""Settings of the image tokenizers."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bowerbird.data.images import Preprocessing


class CodeEncoderConfig(BaseModel):
    """What both tokenizers share."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: int = Field(default=112, ge=2, description="Side of a picture in pixels; 2^num_layers divides it.")
    channels: int = Field(default=3, ge=1, description="Of a picture; other than 3: only tensors are read.")
    num_tokens: int = Field(default=512, ge=2, description="Number of codes (the vocabulary).")
    codebook_dim: int = Field(default=64, ge=1, description="Width of a code.")
    hidden_dim: int = Field(default=64, ge=1, description="Channels of the convolutions.")
    num_layers: int = Field(
        default=3, ge=1, le=8, description="Halvings of the side; a cell is 2^num_layers pixels wide."
    )
    pictures: bool = Field(default=True, description="false: only tensors are read, no picture files.")
    resize: Literal["squash", "crop"] = Field(
        default="squash", description="squash: the whole picture; crop: shorter side, then the centre."
    )
    mean: tuple[float, float, float] = Field(default=(0.5,) * 3, strict=False, description="Of red, green, blue.")
    std: tuple[float, float, float] = Field(default=(0.5,) * 3, strict=False, description="Of red, green, blue.")

    @model_validator(mode="after")
    def _cells_divide_the_picture(self) -> Self:
        if self.image_size % 2**self.num_layers:
            raise ValueError(
                f"image_size = {self.image_size} is no multiple of 2^num_layers = {2**self.num_layers}, the side of a "
                "cell"
            )
        return self

    def architecture(self) -> dict[str, Any]:
        """The arguments of the tokenizer but for the preprocessing."""
        others = {"pictures", "resize", "mean", "std", "weights"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    def preprocessing(self) -> Preprocessing | None:
        if self.channels != 3 or not self.pictures:
            return None
        return Preprocessing(size=self.image_size, mean=self.mean, std=self.std, resize=self.resize)


class DVAEConfig(CodeEncoderConfig):
    """Settings of ``mim:dvae``."""

    weights: str | None = Field(
        default=None, description="First weights: a dVAE with the names of BEiT's code (.safetensors, or tensors only)."
    )


class VQVAEConfig(CodeEncoderConfig):
    """Settings of ``mim:vqvae``."""

    commitment: float = Field(default=0.25, ge=0, description="Pull of the features towards their codes.")
    learn_codes: Literal["ema", "gradient"] = Field(
        default="ema", description="Codes follow the mean of their features, or learn by gradient."
    )
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="With learn_codes = 'ema': share of the old mean.")
    variance: float = Field(default=0.5, gt=0, description="Softness of probabilities: logits are -d / (2 variance).")

    def architecture(self) -> dict[str, Any]:
        values = super().architecture()
        learned = values.pop("learn_codes") == "gradient"
        return values | ({"ema_decay": None} if learned else {})
