"""Trained encoders as folders, and what loads them.

A folder holds ``encoder.json`` (how to build it, its preprocessing, classes and fingerprint), ``weights.safetensors``,
``README.md`` (a model card) and, where the run had them, ``classifier.safetensors`` and maps into older spaces,
``transform-*.safetensors``. Loading executes no code from it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from bowerbird import __version__
from bowerbird.data import images_of
from bowerbird.data.images import OnError, Preprocessing, decode_batches
from bowerbird.data.videos import decode_clips
from bowerbird.dist import pick_device
from bowerbird.encoders.card import model_card
from bowerbird.encoders.sparse import sparsity
from bowerbird.encoders.weights import load_strictly
from bowerbird.errors import DataError, InputError, RecipeError
from bowerbird.files import atomic_folder, write_json
from bowerbird.protocols import Dataset, Encoder, freeze
from bowerbird.recipe import build_config, parse_value
from bowerbird.registry import get_registry

if TYPE_CHECKING:
    from bowerbird.gallery.space import Space
    from bowerbird.gallery.transform import VectorTransform

FORMAT = 1
MANIFEST = "encoder.json"
WEIGHTS = "weights.safetensors"
CLASSIFIER = "classifier.safetensors"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class EncoderSpec:
    """What is known of an encoder besides its weights.

    Attributes:
        use: Name of the encoder's record.
        config: Settings that rebuild its modules.
        classes: Names of the classes that it was trained on, if any.
        path: Its folder; ``None`` where it was built from a record and settings.
        relations: To other spaces, made by its training: ``{"kind": "compatible", "to": ..., "evidence": ...}``; of
            kind ``transform`` where queries need a map, see ``LoadedEncoder.transform_to``.
    """

    use: str
    config: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    path: Path | None = None
    relations: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """An encoder that is ready to encode: frozen, in eval mode, on its device."""

    spec: EncoderSpec
    module: Encoder
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def dim(self) -> int:
        return int(self.module.embed_dim)

    @property
    def name(self) -> str:
        """The folder it came from, or the record and settings that it was built from."""
        if self.spec.path is not None:
            return str(self.spec.path)
        settings = "&".join(f"{key}={value}" for key, value in self.spec.config.items())
        return f"{self.spec.use}?{settings}" if settings else self.spec.use

    def encode(
        self, items: Sequence[Any], *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors of pictures (paths, bytes, ``PIL.Image``); of videos (paths, with or without a moment) where the
        encoder takes videos; of texts where it takes nothing else.

        Pictures and videos are decoded by other threads while the network runs.

        Args:
            items: N of them.
            batch_size: How many go through the network at once; of videos, how many frames, but one video at least.
            progress: Called with the number of items of every batch that is done.

        Returns:
            float32 ``(N, dim)``.

        Raises:
            DataError: A picture or video cannot be read, or has no usable embedding (NaN, infinite or zero).
        """
        vectors = np.empty((len(items), self.dim), dtype=np.float32)
        for indices, rows in self.encode_batches(items, batch_size=batch_size):
            vectors[indices] = rows
            if progress is not None:
                progress(len(indices))
        return vectors

    def encode_batches(
        self, items: Sequence[Any], *, batch_size: int = 64, on_error: OnError = "raise"
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Like ``encode``, batch by batch: positions ``(B,)`` and unit vectors ``(B, dim)``, in order.

        ``on_error`` is that of ``bowerbird.data.images.decode_batches``: what a picture that cannot be read does.
        """
        for indices, batch in self._batches(items, batch_size, on_error):
            yield indices, self._usable(indices, self.forward(batch))

    @property
    def frames(self) -> int | None:
        """How many frames of a video it takes; ``None`` where it takes no videos."""
        return self.module.frames

    def encode_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Unit vectors of N texts, in the space of its pictures or videos if it takes these too: float32 ``(N, dim)``.

        Raises:
            InputError: The encoder takes no texts, a text is empty, or there is one string instead of a list.
        """
        if isinstance(texts, str):
            raise InputError(f"texts must be a list of texts, found one: [{texts!r}] is a list of it")
        tokenize = getattr(self.module, "tokenize", None)
        if tokenize is None:
            raise InputError(
                f"encoder {self.name!r} ({self.spec.use}) takes no texts. Searching by a sentence needs one that was "
                "trained with texts, such as videotext:dual-encoder"
            )
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"a text to be encoded is empty: {text!r}")
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for indices, batch in _text_batches(tokenize, texts, batch_size):
            vectors[indices] = self._usable(indices, self.forward(batch))
        return vectors

    def encode_dataset(
        self, dataset: Dataset, *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors of the items of a data set, in order of position: float32 ``(len(dataset), dim)``."""
        if self.module.preprocessing is not None:
            return self.encode(images_of(dataset), batch_size=batch_size, progress=progress)
        found = [dataset[position]["text"] for position in range(len(dataset))]
        texts = [text if isinstance(text, str) else text[0] for text in found]  # of several captions the first
        return self.encode(texts, batch_size=batch_size, progress=progress)

    @torch.inference_mode()
    def forward(self, batch: Mapping[str, Any]) -> NDArray[np.float32]:
        """Unit vectors ``(B, dim)`` of a ready batch of tensors."""
        moved = {
            key: {k: v.to(self.device) for k, v in value.items()}
            if isinstance(value, Mapping)
            else value.to(self.device)
            for key, value in batch.items()
        }
        pooled = self.module(moved).pooled.float()
        return functional.normalize(pooled, dim=1).cpu().numpy()

    def space(self) -> Space:
        """The space of its vectors, for a gallery."""
        from bowerbird.gallery.space import Space

        # A gallery loads its encoder by this reference, from whatever folder it is used in.
        encoder = self.name if self.spec.path is None else str(self.spec.path.resolve())
        return Space(fingerprint=self.fingerprint, encoder=encoder, dim=self.dim)

    def transform_to(self, space: str) -> VectorTransform | None:
        """The map from its space to the older one with the fingerprint ``space`` that was trained together with it.

        ``None`` where there is none for exactly this pair. Raises ``DataError`` where its file is missing or damaged,
        or is the map of another pair.
        """
        from bowerbird.gallery.transform import VectorTransform

        if self.spec.path is None or not any((r["kind"], r["to"]) == ("transform", space) for r in self.spec.relations):
            return None
        file = self.spec.path / transform_file(space)
        made = VectorTransform.load(file)
        if (made.source, made.target) != (self.fingerprint, space):
            raise DataError(
                f"{file} is no map from this encoder to {space[:12]}, which {MANIFEST} promises: it is {made}"
            )
        return made

    def _batches(
        self, items: Sequence[Any], batch_size: int, on_error: OnError
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
        if batch_size < 1:
            raise InputError(f"batch_size = {batch_size}: expected at least 1")
        preprocessing = self.module.preprocessing
        if preprocessing is not None and self.frames is not None:
            # As many frames as there would be pictures: the memory of a batch does not grow with the length of clips.
            videos = max(1, batch_size // self.frames)
            clips = decode_clips(items, preprocessing, self.frames, batch_size=videos, on_error=on_error)
            for indices, rows in clips:
                yield indices, {"video": torch.from_numpy(rows)}
            return
        if preprocessing is not None:
            for indices, images in decode_batches(items, preprocessing, batch_size=batch_size, on_error=on_error):
                yield indices, {"image": torch.from_numpy(images)}
            return
        tokenize = getattr(self.module, "tokenize", None)
        if tokenize is None:
            raise InputError(f"encoder {self.spec.use!r} takes neither pictures nor texts by itself")
        yield from _text_batches(tokenize, items, batch_size)

    def _usable(self, positions: NDArray[np.int64], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """``vectors``, if each of them is one."""
        broken = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
        if broken.any():
            raise DataError(
                f"encoder {self.name!r} gives no usable vector (NaN, infinite or zero) for {int(broken.sum())} of "
                f"{len(vectors)} items, the first at position {positions[broken][0]}; its weights may be damaged"
            )
        return vectors


def _text_batches(
    tokenize: Callable[[list[str]], Any], texts: Sequence[Any], batch_size: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    for start in range(0, len(texts), batch_size):
        part = [str(text) for text in texts[start : start + batch_size]]
        yield np.arange(start, start + len(part)), {"text": tokenize(part)}


def fingerprint_of(encoder: Encoder, *, use: str, config: Mapping[str, Any]) -> str:
    """SHA-256 over what decides the vectors: name, settings, preprocessing, and every tensor with its name and type."""
    preprocessing = encoder.preprocessing.to_dict() if encoder.preprocessing is not None else None
    head = {"use": use, "config": dict(config), "preprocessing": preprocessing}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_encoder(
    encoder: Encoder,
    path: str | Path,
    *,
    use: str,
    config: Mapping[str, Any],
    classes: Sequence[str] = (),
    classifier: Tensor | None = None,
    relations: Sequence[Mapping[str, Any]] = (),
    card: str = "",
) -> str:
    """Write an encoder as a folder, whole or not at all, and return its fingerprint.

    Args:
        encoder: The module; all its weights are stored, in float32, in which it will compute when it is loaded.
        path: The folder. One that already stands there is replaced if it is an encoder's folder.
        use: Name of the encoder's record.
        config: The settings that it was built with.
        classes: Names of the classes that it was trained on.
        classifier: ``(C, D)`` weight of the classifier that it was trained with, one row per class.
        relations: See ``EncoderSpec``. Of a ``transform`` also ``steps``, which get a file of their own.
        card: Text for the model card.

    Raises:
        InputError: ``path`` is something else than an encoder's folder, or the classifier does not fit.
    """
    path = Path(path)
    check_place(path)
    if classifier is not None and (classifier.ndim != 2 or len(classifier) != len(classes)):
        raise InputError(f"classifier of shape {tuple(classifier.shape)} for {len(classes)} classes; expected (C, D)")
    if any(parameter.dtype != torch.float32 for parameter in encoder.parameters()):
        encoder = copy.deepcopy(encoder).float()
    stored = encoder.stored_config(_shortest(use, config))
    fingerprint = fingerprint_of(encoder, use=use, config=stored)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in encoder.state_dict().items()}
    manifest = {
        "format": FORMAT,
        "use": use,
        "config": stored,
        "preprocessing": encoder.preprocessing.to_dict() if encoder.preprocessing is not None else None,
        "dim": encoder.embed_dim,
        "classes": list(classes),
        "fingerprint": fingerprint,
        "relations": [{k: v for k, v in relation.items() if k != "steps"} for relation in relations],
        "versions": {"bowerbird-core": __version__, "torch": str(torch.__version__)},
    }
    with atomic_folder(path) as folder:
        save_file(state, folder / WEIGHTS)
        if classifier is not None:
            save_file({"classifier.weight": classifier.detach().cpu().clone().contiguous()}, folder / CLASSIFIER)
        for relation in relations:
            if relation["kind"] == "transform":
                _save_transform(folder, relation, fingerprint, encoder.embed_dim)
        tokenizer = getattr(encoder, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER)
        (folder / "README.md").write_text(model_card(path.name, manifest, card, state))
        write_json(folder / MANIFEST, manifest)
    return fingerprint


def transform_file(space: str) -> str:
    """Name of the file with the map into the space with this fingerprint."""
    return f"transform-{space[:12]}.safetensors"


def _save_transform(folder: Path, relation: Mapping[str, Any], source: str, dim: int) -> None:
    from bowerbird.gallery.transform import VectorTransform

    steps, evidence, target = tuple(relation["steps"]), dict(relation["evidence"]), str(relation["to"])
    width = dim
    for step in steps:
        width = step.width(width)
    made = VectorTransform(source, target, dim, width, steps, str(evidence.get("method", "")), evidence)
    made.save(folder / transform_file(target))


def check_place(path: Path) -> None:
    """Raises ``InputError`` where an encoder's folder must not be written."""
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{str(path)!r} already exists and is no encoder folder; choose another place")


def load_encoder(ref: str | Path, *, device: str = "auto", dense: bool = False) -> LoadedEncoder:
    """An encoder from a folder, a run's folder, or a record's name with settings.

    Args:
        ref: A folder written by ``save_encoder`` or ``bowerbird export``; a run's folder; or a name such as
            ``core:timm?model=resnet18&weights=resnet18.safetensors`` (values are read as in ``--set``).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        dense: Give the plain layers of a sparse export (``bowerbird export --sparse``): to train or export them again.

    Raises:
        InputError: There is no such folder or record.
        DataError: The files of the folder are damaged or do not belong together.
        MissingExtraError: The folder is a sparse export, and ``bowerbird-sparsity`` is not installed.
    """
    text = str(ref)
    path = Path(text)
    if path.is_dir():
        for folder in (path, path / "encoder"):
            if (folder / MANIFEST).is_file():
                return _load_folder(folder, pick_device(device), dense=dense)
        if (path / "recipe.json").is_file():
            raise InputError(
                f"run {text!r} is not finished: it holds no encoder yet. Continue it: "
                f"bowerbird train RECIPE --out {text} --resume auto"
            )
        raise InputError(f"folder {text!r} holds no encoder: expected {MANIFEST}, or a run with encoder/{MANIFEST}")
    if ":" not in text.split("?", 1)[0] or text.startswith((".", "/")):
        raise InputError(
            f"encoder {text!r}: there is no such folder. Expected an encoder's folder, a run's folder, or a name such "
            "as core:efficientnet-lite?model=lite0"
        )
    return _build_from_name(text, pick_device(device))


def _build_from_name(ref: str, device: torch.device) -> LoadedEncoder:
    use, _, query = ref.partition("?")
    settings: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise RecipeError(f"encoder {ref!r}: {part!r} is no setting; expected key=value")
        settings[key] = parse_value(value)
    registry = get_registry()
    record = registry.get("encoder", use)
    config = build_config(record, settings, where=f"encoder {ref!r}")
    with torch.random.fork_rng(devices=[]):  # a projection without weights is the same in every process
        torch.manual_seed(0)
        encoder: Encoder = registry.load(record).build(config)
    values = _shortest(record.name, settings)
    return _ready(encoder, EncoderSpec(use=record.name, config=values), device, encoder.stored_config(values))


def _load_folder(folder: Path, device: torch.device, *, dense: bool) -> LoadedEncoder:
    manifest = read_manifest(folder)
    registry = get_registry()
    record = registry.get("encoder", manifest["use"])
    config = build_config(record, manifest["config"], where=f"{folder / MANIFEST} [config]")
    encoder: Encoder = registry.load(record).build(config)
    if manifest["preprocessing"] is not None:
        encoder.preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
    sparse: Any = None
    if "sparse" in manifest:
        sparse = sparsity("folders", needed_by=f"encoder {str(folder)!r}, a sparse export,")
        load_strictly(encoder, sparse.read_weights(folder, manifest["sparse"]), source=str(folder / sparse.WEIGHTS))
    else:
        _load_state(encoder, folder / WEIGHTS)
    if encoder.embed_dim != manifest["dim"]:
        raise DataError(f"{folder / MANIFEST}: dim = {manifest['dim']}, but the encoder gives {encoder.embed_dim}")
    if (folder / TOKENIZER).is_dir():
        encoder.load_tokenizer(folder / TOKENIZER)  # type: ignore[operator]
    spec = EncoderSpec(
        use=record.name,
        config=manifest["config"],
        classes=tuple(manifest.get("classes", ())),
        path=folder,
        relations=tuple(manifest.get("relations", ())),
    )
    loaded = _ready(encoder, spec, device, manifest["config"])
    if loaded.fingerprint != manifest["fingerprint"]:
        raise DataError(
            f"encoder {str(folder)!r} is not the one it claims to be: its files have the fingerprint "
            f"{loaded.fingerprint[:12]}, {MANIFEST} says {manifest['fingerprint'][:12]}. "
            "The weights or settings were changed"
        )
    # The fingerprint was that of the dense weights: a form in which they are computed makes no other space.
    return loaded if sparse is None or dense else sparse.in_sparse_form(loaded, manifest["sparse"])


def _shortest(use: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without values that are the default: one form, whether defaults were written out or not."""
    model = build_config(get_registry().get("encoder", use), config, where=f"encoder {use!r}")
    return {} if model is None else model.model_dump(mode="json", exclude_defaults=True)


def _ready(encoder: Encoder, spec: EncoderSpec, device: torch.device, config: Mapping[str, Any]) -> LoadedEncoder:
    fingerprint = fingerprint_of(encoder, use=spec.use, config=config)
    freeze(encoder).to(device)
    return LoadedEncoder(spec=spec, module=encoder, fingerprint=fingerprint, device=device)


def read_manifest(folder: Path) -> dict[str, Any]:
    """``encoder.json`` of a folder, checked. Raises ``DataError``."""
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        found = manifest.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error
    if found != FORMAT:
        raise DataError(f"{str(file)!r} has format {found!r}; this version reads {FORMAT}. Upgrade bowerbird-core")
    lacking = [key for key in ("use", "config", "preprocessing", "dim", "fingerprint") if key not in manifest]
    if lacking:
        raise DataError(f"{str(file)!r} lacks {', '.join(lacking)}")
    return dict(manifest)


def read_classifier(folder: str | Path) -> Tensor | None:
    """``(C, D)`` weight of the classifier in an encoder's folder, or ``None`` where there is none."""
    file = Path(folder) / CLASSIFIER
    return load_file(file)["classifier.weight"] if file.is_file() else None


def _load_state(encoder: Encoder, file: Path) -> None:
    if not file.is_file():
        raise DataError(f"encoder {str(file.parent)!r} has no {file.name}")
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"weights {str(file)!r} cannot be read: {error}") from error
    load_strictly(encoder, state, source=str(file))
