"""Files of weights: read without executing code, loaded with every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bowerbird.errors import DataError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file; code in a file is never executed."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"weights {str(path)!r}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"weights {str(path)!r} cannot be read as tensors ({type(error).__name__}: {_first_sentence(error)}); "
            "accepted: .safetensors, or a torch file that holds only tensors"
        ) from error
    for wrapper in ("state_dict", "model"):  # what training scripts commonly put around the weights
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {str(key).removeprefix("module."): value for key, value in dict(content).items()}
    strange = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if strange:
        raise DataError(
            f"weights {str(path)!r}: {strange[:3]} are no tensors; expected a flat mapping of names to tensors"
        )
    return tensors


def _first_sentence(error: Exception) -> str:
    """What failed, without torch's advice to load the file by executing what is in it."""
    return (str(error).splitlines() or [""])[0].partition(". ")[0].removesuffix(".")


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Like ``load_state_dict(strict=True)``, with a message that names the source and a few of the keys."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unknown = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    found = [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if found:
        raise DataError(f"weights {source!r} do not fit {type(module).__name__}: {'; '.join(found)}")
    module.load_state_dict(dict(state), strict=True)
