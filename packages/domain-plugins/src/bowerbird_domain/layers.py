"""Modules behind named layers of any network, through forward hooks: parameters and their names stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Self

from torch import Tensor, nn

from bowerbird.errors import InputError, RecipeError

# The points of a ResNet of torchvision or timm at which the authors of DSU insert theirs: after the first convolution
# and before its norm, after pooling, after the four stages. "vit": after every block of a timm-like transformer.
RESNET = ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")
ALIASES: Mapping[str, tuple[str, ...]] = {
    "resnet": RESNET,
    "vit": ("blocks.*",),
    **{f"stage{i}": (f"layer{i}",) for i in range(1, 5)},
}
_SHOWN = 12  # names in an error message


def insert_after(model: nn.Module, layer_names: Sequence[str], factory: Callable[[], nn.Module]) -> Inserted:
    """Let a new ``factory()`` see and replace the output of every named layer.

    What is inserted follows the mode of its layer: ``model.eval()`` turns off what is off at evaluation. It is no part
    of ``model``: not of its parameters, its state or its names.

    Args:
        model: Any network.
        layer_names: Names as in ``model.named_modules()``, their endings (``layer1`` for ``trunk.model.layer1``),
            patterns, or aliases; see ``find_layers``.
        factory: Called once per layer, without arguments.

    Returns:
        A handle: ``remove()`` takes everything out again; it is also a context manager.

    Raises:
        RecipeError: A name that no layer has.
        InputError: While the network runs: a layer whose output is no tensor, or is refused by what is inserted; the
            message names the layer.
    """
    return Inserted(model, {name: factory() for name in find_layers(model, layer_names)})


class Inserted:
    """The handle of ``insert_after``. ``modules``: name of a layer -> what was inserted behind it."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.modules = dict(modules)
        self._handles = [
            model.get_submodule(name).register_forward_hook(_Behind(name, module))
            for name, module in self.modules.items()
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Behind:
    """The forward hook behind one layer."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            raise InputError(f"layer {self.name!r} returns a {type(output).__name__}; only a tensor can be changed")
        if self.module.training != layer.training:
            self.module.train(layer.training)
        try:
            return self.module(output)
        except InputError as error:
            raise InputError(f"behind layer {self.name!r}: {error}") from error


def find_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The full names of the layers that ``names`` stand for, each once, in the order of the network.

    A name is compared with the end of a layer's full name, part by part between the dots, where ``*``, ``?`` and
    ``[...]`` match within one part. Of several layers that match, those nearest to the root are meant: ``conv1`` is the
    first convolution of a ResNet and not those of its blocks, ``layer?`` its four stages, ``blocks.*`` the blocks of a
    transformer and not what they consist of. ``resnet`` stands for the six points of a ResNet (a ResNet for small
    pictures may lack ``maxpool``), ``vit`` for the blocks of a transformer, ``stage1`` for ``layer1``.

    Raises:
        RecipeError: A name without a layer, or no name at all; lists close ones and what there is.
    """
    layers = [name for name, _ in model.named_modules() if name]
    if isinstance(names, str) or not names:
        raise RecipeError(f"layers = {names!r}: expected a list of at least one name")
    found: set[str] = set()
    for name in names:
        # An exact layer goes before an alias of the same name.
        wanted = [name] if _matches(layers, name) else list(ALIASES.get(name, (name,)))
        if name == "resnet" and _matches(layers, "layer1"):
            wanted = [point for point in wanted if point != "maxpool" or _matches(layers, point)]
        for pattern in wanted:
            matches = _matches(layers, pattern)
            if not matches:
                raise RecipeError(_unknown(layers, name, pattern))
            found.update(matches)
    return [layer for layer in layers if layer in found]


def _matches(layers: Sequence[str], pattern: str) -> list[str]:
    """The layers nearest to the root whose names end with ``pattern``."""
    parts = pattern.split(".")
    matches = [
        layer
        for layer in layers
        if len(own := layer.split(".")) >= len(parts)
        and all(fnmatchcase(a, b) for a, b in zip(own[-len(parts) :], parts, strict=True))
    ]
    depth = min((layer.count(".") for layer in matches), default=0)
    return [layer for layer in matches if layer.count(".") == depth]


def _unknown(layers: Sequence[str], name: str, pattern: str) -> str:
    asked = repr(name) if name == pattern else f"{name!r} ({pattern!r})"
    last = {layer.rpartition(".")[2]: layer for layer in reversed(layers)}
    close = get_close_matches(pattern, layers, n=3) or [last[x] for x in get_close_matches(pattern, last, n=3)]
    top = sorted(layers, key=lambda layer: layer.count("."))[:_SHOWN]
    more = f" and {len(layers) - len(top)} below" if len(layers) > len(top) else ""
    return (
        f"no layer is called {asked}."
        + (f" Close: {', '.join(close)}." if close else "")
        + f" The network has {', '.join(top) or 'no layers'}{more}. Accepted: the end of a layer's name, with *, ? and "
        f"[...] within a part between dots, or {', '.join(ALIASES)}"
    )
