"""Maps between embedding spaces, as a gallery keeps and applies them: numpy only, so that no server needs torch.

A transform has a direction. ``source`` and ``target`` are fingerprints of spaces, and nothing is ever applied to
vectors of another space: a map in the wrong direction has the right shape wherever two models have one width, passes
every check of integrity, and destroys the search.

N vectors, Di and Do widths of the source and the target.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bowerbird.errors import DataError, InputError, SpaceError
from bowerbird.files import write_atomically

FORMAT = "bowerbird-transform/1"
BLOCK = 16_384  # vectors that are in hand at once
STEPS = ("linear", "scale", "relu", "normalize", "layer_norm", "sum")
MIN_PAIRS = 16  # with fewer pairs chance and fit cannot be told apart
SURE = 4.0  # standard errors by which a map must fit its own pairs better than strangers


@dataclass(frozen=True)
class Step:
    """One step of a map.

    Attributes:
        op: ``linear`` (``weight (out, in)``, optional ``bias (out,)``), ``scale`` (``weight (D,)``, ``bias (D,)``: a
            batch norm at rest), ``relu``, ``normalize`` (length 1), ``layer_norm`` (``weight``, ``bias``, 1e-5), or
            ``sum`` of the results of ``branches``; a branch without steps is the identity.
    """

    op: str
    weight: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None
    branches: tuple[tuple[Step, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.op not in STEPS:
            raise InputError(f"a transform's step is {self.op!r}; accepted: {', '.join(STEPS)}")
        for name in ("weight", "bias"):
            value = getattr(self, name)
            if value is not None:
                value = np.ascontiguousarray(value, np.float32)
                if not np.isfinite(value).all():
                    raise DataError(f"the {name} of a {self.op!r} step is not finite")
                object.__setattr__(self, name, value)

    def width(self, given: int) -> int:
        """Width of the result for vectors of width ``given``. Raises ``InputError`` where they do not fit."""
        if self.op == "linear":
            if self.weight is None or self.weight.ndim != 2 or self.weight.shape[1] != given:
                raise InputError(f"a linear step of shape {_shape(self.weight)} cannot take vectors of width {given}")
            if self.bias is not None and self.bias.shape != (len(self.weight),):
                raise InputError(f"a linear step of shape {self.weight.shape} has a bias of shape {self.bias.shape}")
            return len(self.weight)
        if self.op in ("scale", "layer_norm"):
            for value in (self.weight, self.bias):
                if value is None or value.shape != (given,):
                    raise InputError(f"a {self.op} step of shape {_shape(value)} cannot take width {given}")
        if self.op == "sum":
            widths = {_width(branch, given) for branch in self.branches}
            if len(widths) != 1:
                raise InputError(f"the branches of a sum have widths {sorted(widths)}; one width is needed")
            return widths.pop()
        return given

    def __call__(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        match self.op:
            case "relu":
                return np.maximum(rows, np.float32(0))
            case "normalize":
                return _unit(rows)
            case "sum":
                out = _apply(self.branches[0], rows).copy()
                for branch in self.branches[1:]:
                    out += _apply(branch, rows)
                return out
        assert self.weight is not None
        if self.op == "linear":
            out = rows @ self.weight.T
            return out if self.bias is None else out + self.bias
        assert self.bias is not None
        if self.op == "layer_norm":
            rows = rows - rows.mean(axis=1, keepdims=True)
            rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + np.float32(1e-5))
        return rows * self.weight + self.bias


@dataclass(frozen=True)
class VectorTransform:
    """Vectors of the space ``source`` in, unit vectors of the space ``target`` out. Immutable.

    Attributes:
        source, target: Fingerprints of two different spaces.
        dim_in, dim_out: Di, Do.
        steps: Applied one after the other; the result is brought to length 1.
        method: Who made it, for example ``compat:adapter``; shown to people.
        evidence: What was measured on held-out pairs (plain JSON data).

    Raises:
        InputError: If the steps do not fit each other or the widths, or source and target are one space.
    """

    source: str
    target: str
    dim_in: int
    dim_out: int
    steps: tuple[Step, ...]
    method: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.source or not self.target or self.source == self.target:
            raise InputError(
                f"a transform goes from one space to another; got source {self.source!r} and target {self.target!r}"
            )
        made = _width(self.steps, self.dim_in)
        if made != self.dim_out:
            raise InputError(f"the transform makes vectors of width {made}, and dim_out is {self.dim_out}")

    @classmethod
    def linear(cls, source: str, target: str, weight: Any, bias: Any = None, **more: Any) -> Self:
        """``x -> weight x + bias``, ``weight`` of shape ``(Do, Di)``."""
        step = Step("linear", np.asarray(weight, np.float32), None if bias is None else np.asarray(bias, np.float32))
        assert step.weight is not None
        return cls(source, target, step.weight.shape[1], step.weight.shape[0], (step,), **more)

    def __call__(self, vectors: Any) -> NDArray[np.float32]:
        """float32 ``(N, Do)`` unit rows from ``(N, Di)``.

        Raises:
            SpaceError: If the vectors have another width.
            DataError: If a result is zero or not finite; names the row.
        """
        vectors = np.atleast_2d(np.asarray(vectors))
        if vectors.shape[1] != self.dim_in:
            raise SpaceError(
                f"the transform {self} takes vectors of width {self.dim_in}, got {vectors.shape[1]}; is it meant for "
                "the other direction?"
            )
        out = np.empty((len(vectors), self.dim_out), np.float32)
        for start in range(0, len(vectors), BLOCK):
            rows = _apply(self.steps, np.asarray(vectors[start : start + BLOCK], np.float32))
            broken = ~np.isfinite(rows).all(axis=1) | ~rows.any(axis=1)
            if broken.any():
                raise DataError(
                    f"the transform {self} makes a zero or not finite vector of row {start + int(broken.argmax())}"
                )
            out[start : start + BLOCK] = _unit(rows)
        return out

    @cached_property
    def fingerprint(self) -> str:
        """Identity: a digest of direction, steps and weights."""
        program, tensors = _encode(self.steps)
        digest = hashlib.sha256(json.dumps([self.source, self.target, program]).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"{self.method or 'transform'} {self.source[:12]} -> {self.target[:12]}"

    def save(self, path: str | Path) -> None:
        """One safetensors file, atomically."""
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """What ``save`` writes."""
        from safetensors.numpy import save

        program, tensors = _encode(self.steps)
        header = {
            "format": FORMAT, "source": self.source, "target": self.target, "dim_in": self.dim_in,
            "dim_out": self.dim_out, "steps": program, "method": self.method, "evidence": dict(self.evidence),
        }  # fmt: skip
        return save(tensors or {"none": np.zeros(0, np.float32)}, {"bowerbird": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises ``DataError`` where the file is no transform; names what is wrong."""
        try:
            data = Path(path).read_bytes()
        except OSError as exc:
            raise DataError(f"{path} cannot be read as a transform: {exc}") from exc
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: str | Path = "these bytes") -> Self:
        """What ``to_bytes`` made; ``path`` names it in messages. Raises ``DataError`` where it is no transform."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(json.loads(data[8 : 8 + length]).get("__metadata__", {}).get("bowerbird", "null"))
        except (SafetensorError, ValueError) as exc:
            raise DataError(f"{path} cannot be read as a transform (safetensors): {exc}") from exc
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise DataError(f"{path} is no transform: its header does not say {FORMAT!r}")
        try:
            return cls(
                str(header["source"]), str(header["target"]), int(header["dim_in"]), int(header["dim_out"]),
                _decode(header["steps"], tensors), str(header.get("method", "")), dict(header.get("evidence", {})),
            )  # fmt: skip
        except (KeyError, TypeError) as exc:
            raise DataError(f"{path} is a damaged transform: {exc!r}") from exc


@dataclass(frozen=True)
class Direction:
    """How well a map fits pairs of vectors of its two spaces.

    Attributes:
        forward: Mean cosine of ``transform(source)`` with the target vectors of the same items.
        strangers: The same with the target vectors of other items: what a map that knows nothing gets.
        reverse: Mean cosine of ``transform(target)`` with the source vectors; ``None`` where the widths differ.
        pairs: How many pairs were looked at.
    """

    forward: float
    strangers: float
    reverse: float | None
    pairs: int


def check_direction(transform: VectorTransform, source_vectors: Any, target_vectors: Any) -> Direction:
    """Whether a map goes from its source to its target, seen on items whose vectors are known in both spaces.

    Args:
        source_vectors: ``(N, Di)``, vectors of the space ``transform.source``, at least ``MIN_PAIRS``.
        target_vectors: ``(N, Do)``, row i is the same item as row i of ``source_vectors``.

    Raises:
        SpaceError: If the map fits the reverse direction better, or the pairs no better than strangers. The message has
            the cosines.
        InputError: If the rows do not pair, or are too few for a verdict.
    """
    source = np.atleast_2d(np.asarray(source_vectors, np.float32))
    target = np.atleast_2d(np.asarray(target_vectors, np.float32))
    if len(source) != len(target):
        raise InputError(f"{len(source)} source vectors and {len(target)} target vectors do not pair")
    if len(source) < MIN_PAIRS:
        raise InputError(f"{len(source)} pairs cannot show a transform's direction; at least {MIN_PAIRS} are needed")
    widths = (source.shape[1], target.shape[1])
    if widths != (transform.dim_in, transform.dim_out):
        turned = ": it is meant for the other direction" if widths == (transform.dim_out, transform.dim_in) else ""
        raise SpaceError(
            f"the transform {transform} maps vectors of width {transform.dim_in} to width {transform.dim_out}, and the "
            f"pairs have widths {widths[0]} and {widths[1]}{turned}"
        )
    target = _unit(target)
    mapped = transform(source)
    fit = (mapped * target).sum(axis=1, dtype=np.float64)
    others = (target.sum(axis=0, dtype=np.float64) - target) / (len(target) - 1)
    strangers = (mapped * others).sum(axis=1, dtype=np.float64)
    reverse = None
    if transform.dim_in == transform.dim_out:
        reverse = float((transform(target) * _unit(source)).sum(axis=1, dtype=np.float64).mean())
    found = Direction(float(fit.mean()), float(strangers.mean()), reverse, len(source))
    gain = fit - strangers
    if reverse is not None and reverse > found.forward:
        raise SpaceError(
            f"the transform {transform} fits the reverse direction: mean cosine {found.forward:.3f} from "
            f"{transform.source[:12]} to {transform.target[:12]}, and {reverse:.3f} the other way round, on "
            f"{len(source)} pairs. It was fitted with source and target exchanged"
        )
    if gain.mean() <= SURE * gain.std() / math.sqrt(len(gain)):
        other = "" if reverse is None else f", and {reverse:.3f} in the reverse direction"
        raise SpaceError(
            f"the transform {transform} does not fit: mean cosine {found.forward:.3f} with the vectors of the same "
            f"items{other}; vectors of other items give {found.strangers:.3f} ({len(source)} pairs). Its spaces are "
            "others than it says, or it was fitted on other data"
        )
    return found


def with_evidence(
    transform: VectorTransform, pairs: tuple[Any, Any] | None = None, *, accept: bool = False, ask: str
) -> VectorTransform:
    """``transform`` with what shows that it goes from its source to its target in its evidence.

    That is its own verdict on held-out pairs (``usable``), or what is measured on ``pairs`` (``checked``). The names of
    its spaces are no evidence: two files that were mixed up when it was fitted give a map of the same shape and names.

    Args:
        pairs: ``(source vectors, target vectors)`` of the same items; see ``check_direction``.
        accept: Take it without either; the evidence says so from then on (``accepted``).
        ask: How to accept it, for the message.

    Raises:
        SpaceError: If nothing shows its direction, or the pairs show another one.
    """
    evidence = dict(transform.evidence)
    if pairs is not None:
        evidence["checked"] = asdict(check_direction(transform, *pairs))
        evidence.pop("accepted", None)
    elif evidence.get("usable") is None and not {"checked", "accepted"} & evidence.keys():
        if not accept:
            raise SpaceError(
                f"nothing shows that the transform {transform} goes from the first of these spaces to the second: it "
                "has no verdict on held-out pairs, and there are no pairs to measure it on. A map of the wrong "
                f"direction makes every search noise. {ask}"
            )
        evidence["accepted"] = "without a measurement"
    return replace(transform, evidence=evidence)


def _shape(value: NDArray[np.float32] | None) -> tuple[int, ...]:
    return () if value is None else value.shape


def _apply(steps: Sequence[Step], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    for step in steps:
        rows = step(rows)
    return rows


def _width(steps: Sequence[Step], given: int) -> int:
    for step in steps:
        given = step.width(given)
    return given


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32, copy=False)


def _encode(steps: Sequence[Step], prefix: str = "") -> tuple[list[dict[str, Any]], dict[str, NDArray[np.float32]]]:
    """``(steps as JSON, tensors by name)``."""
    program: list[dict[str, Any]] = []
    tensors: dict[str, NDArray[np.float32]] = {}
    for number, step in enumerate(steps):
        entry: dict[str, Any] = {"op": step.op}
        for name in ("weight", "bias"):
            value = getattr(step, name)
            if value is not None:
                entry[name] = f"{prefix}{number}.{name}"
                tensors[entry[name]] = value
        if step.branches:
            inner = [_encode(branch, f"{prefix}{number}.{i}.") for i, branch in enumerate(step.branches)]
            entry["branches"] = [made for made, _ in inner]
            for _, more in inner:
                tensors.update(more)
        program.append(entry)
    return program, tensors


def _decode(program: Sequence[Mapping[str, Any]], tensors: Mapping[str, NDArray[np.float32]]) -> tuple[Step, ...]:
    return tuple(
        Step(
            entry["op"],
            tensors[entry["weight"]] if "weight" in entry else None,
            tensors[entry["bias"]] if "bias" in entry else None,
            tuple(_decode(branch, tensors) for branch in entry.get("branches", ())),
        )
        for entry in program
    )
