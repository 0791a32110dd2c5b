"""Patch features of frames by an image network that is never trained.

N frames, S patches, F channels of a block, C of all chosen blocks together, C' of the global features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bowerbird.data.images import Preprocessing
from bowerbird.encoders.bundle import load_encoder
from bowerbird.encoders.timm_encoder import TimmTrunk, create_timm_model, load_weights, preprocessing_of
from bowerbird.errors import InputError
from bowerbird.protocols import Encoder, freeze


class FrozenFrames(nn.Module):
    """A timm model in eval mode, whose blocks give their maps as they are, before the last norm.

    Args:
        model: Made by ``timm.create_model``.
        blocks: Whose maps are joined; negative ones count from the last.
        preprocessing: How frames are prepared.
        chunk: Frames that go through it at once.

    Attributes:
        channels: C.
        global_channels: C'; the global features are what the model gives without a classifier.
        patches: S of frames of the size that ``preprocessing`` says.

    Raises:
        InputError: A block that does not exist, blocks with maps of different sizes, or a model whose blocks timm does
            not give.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[int] = (-1,), *, preprocessing: Preprocessing, chunk: int = 40
    ) -> None:
        super().__init__()
        name = type(model).__name__
        if not hasattr(model, "forward_intermediates"):
            raise InputError(f"backbone: timm does not give the blocks of a {name}; choose another model")
        self.model, self.preprocessing, self.chunk = freeze(model), preprocessing, chunk
        total = len(model.feature_info)  # type: ignore[arg-type]
        unknown = [block for block in blocks if not -total <= block < total]
        if unknown:
            raise InputError(f"blocks: {name} has no block {unknown[0]}; it has {total}, from 0 to {total - 1}")
        self.blocks = [block % total for block in blocks]
        parameter = next(model.parameters())
        with torch.no_grad():
            example = parameter.new_zeros(1, 3, preprocessing.height, preprocessing.width)
            maps, vectors = self._run(example, with_global=True)
            sizes = {tuple(one.shape[2:]) for one in maps}
            if len(sizes) > 1:
                raise InputError(
                    f"blocks = {list(blocks)} of {name} have maps of {', '.join('x'.join(map(str, s)) for s in sizes)} "
                    "positions; only maps of one size can be joined"
                )
            self.channels, self.patches = sum(one.shape[1] for one in maps), maps[0][0, 0].numel()
            assert vectors is not None
            self.global_channels = int(vectors.shape[1])

    @classmethod
    def of(
        cls,
        backbone: str,
        blocks: Sequence[int] = (-1,),
        *,
        arguments: Mapping[str, Any] | None = None,
        weights: str | None = None,
        pretrained: bool | str = False,
        image_size: int | None = None,
        chunk: int = 40,
    ) -> tuple[Self, dict[str, Any]]:
        """A backbone by name or folder, and the settings (``backbone``, ``backbone_arguments``, ``image_size``) that
        build its modules again without the folder.

        Args:
            backbone: Name of a timm model; folder of an exported encoder or of a finished run, or an encoder by name,
                that is a timm model or can be written as one. A projection behind it is left out.
            arguments: Of ``timm.create_model``, for the name of a timm model.

        Raises:
            UnknownNameError: There is no such timm model or encoder.
            InputError: An encoder that timm has no form of; ``weights`` or ``pretrained`` for something else than timm.
        """
        if ":" not in backbone and "/" not in backbone and not Path(backbone).is_dir():
            model = create_timm_model(backbone, image_size=image_size, pretrained=pretrained, **(arguments or {}))
            if weights is not None:
                load_weights(model, weights)
            prepared = preprocessing_of(model)
            if image_size is not None:
                prepared = Preprocessing.from_dict({**prepared.to_dict(), "size": image_size})
            source = {"backbone": backbone, "backbone_arguments": dict(arguments or {}), "image_size": image_size}
            return cls(model, blocks, preprocessing=prepared, chunk=chunk), source
        if weights is not None or pretrained or arguments or image_size is not None:
            raise InputError(
                f"backbone = {backbone!r} is an encoder with weights and a size of its own: leave out weights, "
                "pretrained, backbone_arguments and image_size"
            )
        encoder = load_encoder(backbone, device="cpu", dense=True).module
        if encoder.preprocessing is None:
            raise InputError(f"backbone = {backbone!r} does not say how a picture is prepared; choose one that does")
        prepared, size = encoder.preprocessing, encoder.preprocessing.size
        if not isinstance(size, int):
            raise InputError(f"backbone = {backbone!r} takes pictures of {size} pixels; take one for square ones")
        model, architecture, known = _as_timm(encoder, backbone)
        source = {"backbone": architecture, "backbone_arguments": known, "image_size": size}
        return cls(model, blocks, preprocessing=prepared, chunk=chunk), source

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: running means of a frozen network must not drift."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor, *, with_global: bool = False) -> tuple[Tensor, Tensor | None]:
        """Patches ``(N, S, C)`` of frames ``(N, 3, H, W)``, and their global features ``(N, C')`` if asked for."""
        patches, vectors = [], []
        for part in frames.split(self.chunk):
            maps, found = self._run(part, with_global=with_global)
            patches.append(torch.cat(maps, dim=1).flatten(2).transpose(1, 2))
            if found is not None:
                vectors.append(found)
        return torch.cat(patches), torch.cat(vectors) if vectors else None

    def _run(self, frames: Tensor, *, with_global: bool) -> tuple[list[Tensor], Tensor | None]:
        """The maps ``(N, F, h, w)`` of ``blocks``, in their order. Later blocks run for global features only."""
        model: Any = self.model
        order = sorted(self.blocks)
        last = None
        if with_global:
            last, maps = model.forward_intermediates(frames, indices=order, output_fmt="NCHW")
        else:
            maps = model.forward_intermediates(
                frames, indices=order, output_fmt="NCHW", stop_early=True, intermediates_only=True
            )
        by_block = dict(zip(order, maps, strict=True))
        vectors = None if last is None else model.forward_head(last, pre_logits=True)
        return [by_block[block] for block in self.blocks], vectors


def _as_timm(encoder: Encoder, name: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """An encoder as a timm model, its architecture and the other arguments of ``timm.create_model``."""
    trunk = getattr(encoder, "trunk", None)
    if isinstance(trunk, TimmTrunk):
        return trunk.model, str(trunk.model.pretrained_cfg["architecture"]), {}
    form = encoder.timm_form()
    if form is None:
        raise InputError(
            f"backbone = {name!r}: blocks can be read of timm models and of encoders that can be exported to timm "
            f"(mim:vit and others), not of a {type(encoder).__name__}"
        )
    model = create_timm_model(form.architecture, **form.arguments)
    known = model.state_dict()
    model.load_state_dict({key: value for key, value in form.state.items() if key in known})
    return model, form.architecture, dict(form.arguments)
