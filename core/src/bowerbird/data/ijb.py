"""``core:ijb``: IJB-B and IJB-C, templates of faces from photographs and videos, and their protocols.

C. Whitelam et al.: IARPA Janus Benchmark-B Face Dataset, CVPRW 2017. B. Maze et al.: IARPA Janus Benchmark - C:
Face Dataset and Protocol, ICB 2018. Read from a local copy in the layout of the InsightFace evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bowerbird.data.benchmark_configs import IJB_LAYOUT, IjbConfig
from bowerbird.data.files import BenchmarkImages, check_split, need_file, need_folder, whole_number, word_rows
from bowerbird.data.images import open_image
from bowerbird.errors import DataError

BENCHMARKS = ("ijbc", "ijbb")
GALLERIES = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
FACE_SIZE = 112
# Where ArcFace expects the eyes, the nose and the corners of the mouth in an image of 112 x 112 (arXiv:1801.07698).
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


@dataclass(frozen=True)
class Templates:
    """Template ids and their subjects, both int64 ``(T,)``: a gallery or the probes of 1:N identification."""

    templates: NDArray[np.int64]
    subjects: NDArray[np.int64]


class Ijb(BenchmarkImages):
    """Faces in the order of the files; ids are ``000000/NAME`` with the number of the line, from 0. No classes.

    Attributes:
        benchmark: ``ijbb`` or ``ijbc``.
        templates, media: int64 ``(F,)``.
        points: ``(F, 5, 2)`` eyes, nose, corners of the mouth, x and y in pixels.
        scores: ``(F,)`` of the face detector.
    """

    def __init__(
        self,
        root: Path,
        benchmark: str,
        names: Sequence[str],
        templates: NDArray[np.int64],
        media: NDArray[np.int64],
        points: NDArray[np.float64],
        scores: NDArray[np.float64],
        align: bool,
    ) -> None:
        super().__init__([f"{number:06d}/{name}" for number, name in enumerate(names)])
        self.root, self.benchmark, self.names, self.align = root, benchmark, list(names), align
        self.templates, self.media, self.points, self.scores = templates, media, points, scores

    @classmethod
    def build(cls, config: IjbConfig, split: str | None = None) -> Self:
        """All faces; the only split is ``test``.

        Raises ``DataError``, naming file and line, for missing files, rows of another form, and files whose lines do
        not speak of the same faces.
        """
        check_split("core:ijb", split or "test", ("test",))
        root = config.root.expanduser()
        benchmark = _benchmark(root, config.benchmark)
        need_folder(root / "loose_crop", IJB_LAYOUT)
        faces = root / "meta" / f"{benchmark}_face_tid_mid.txt"
        scores = root / "meta" / f"{benchmark}_name_5pts_score.txt"
        names: list[str] = []
        ids: list[list[int]] = []
        for line, words in word_rows(faces, 3, "name template media", IJB_LAYOUT):
            names.append(_file_name(words[0], faces, line))
            ids.append([whole_number(word, faces, line, "an id") for word in words[1:]])
        numbers: list[list[float]] = []
        for line, words in word_rows(scores, 12, "name, five points x y, score", IJB_LAYOUT):
            if len(numbers) < len(names) and words[0] != names[len(numbers)]:
                raise DataError(
                    f"{scores}, line {line}: the face is {words[0]!r}, that of {faces.name} {names[len(numbers)]!r}; "
                    "the files must have the same faces in the same order."
                )
            try:
                numbers.append([float(word) for word in words[1:]])
            except ValueError:
                raise DataError(f"{scores}, line {line}: expected a name and 11 numbers, found {words[1:]}.") from None
        if len(numbers) != len(names) or not names:
            raise DataError(
                f"{faces} has {len(names)} faces, {scores.name} has {len(numbers)}; both must have as many."
            )
        values, id_array = np.array(numbers), np.array(ids, np.int64)
        if not np.isfinite(values).all():
            raise DataError(
                f"{scores}: face {names[int(np.argwhere(~np.isfinite(values))[0][0])]} has no finite numbers."
            )
        return cls(
            root, benchmark, names, id_array[:, 0], id_array[:, 1], values[:, :10].reshape(-1, 5, 2), values[:, 10],
            config.align,
        )  # fmt: skip

    def image(self, index: int) -> Image.Image:
        """The face, 112 x 112 with its points in place, or the loose crop where ``align`` is off."""
        path = self.root / "loose_crop" / self.names[index]
        face = open_image(path)
        if not self.align:
            return face
        # Pillow wants the way back, and counts from the corner of a pixel; points count from its centre.
        a, b = similarity_transform(self.points[index] + 0.5, ARCFACE_POINTS + 0.5)
        if not abs(a) > 0:
            raise DataError(f"{path}: the five points {self.points[index].tolist()} are not those of a face.")
        a, b = 1 / a, -b / a
        back = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
        return face.transform((FACE_SIZE, FACE_SIZE), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)

    def metadata(self) -> Sequence[Mapping[str, Any]]:
        """``template`` and ``media``."""
        return [{"template": int(t), "media": int(m)} for t, m in zip(self.templates, self.media, strict=True)]

    def pairs(self) -> NDArray[np.int64]:
        """int64 ``(P, 3)``: template, template, 1 if they are one person. Of 1:1 verification.

        Raises ``DataError``, naming the line, for rows of another form and templates without faces.
        """
        path = need_file(self.root / "meta" / f"{self.benchmark}_template_pair_label.txt", IJB_LAYOUT)
        try:
            # 15 million lines: the loop in Python that names the line runs only where this fails.
            pairs = np.loadtxt(path, dtype=np.int64, ndmin=2, comments=None)
        except ValueError:
            for line, words in word_rows(path, 3, "template template same", IJB_LAYOUT):
                for word in words:
                    whole_number(word, path, line, "a word")
            raise DataError(f"{path} cannot be read. {IJB_LAYOUT}") from None
        if pairs.shape[1:] != (3,) or not len(pairs):
            raise DataError(f"{path} has {pairs.shape[-1]} columns; expected template template same.")
        bad = np.flatnonzero(~np.isin(pairs[:, 2], (0, 1)))
        if len(bad):
            raise DataError(f"{path}, line {bad[0] + 1}: same is {pairs[bad[0], 2]}; expected 0 or 1.")
        bad = np.flatnonzero(~np.isin(pairs[:, :2], self.templates).all(axis=1))
        if len(bad):
            raise DataError(f"{path}, line {bad[0] + 1}: {pairs[bad[0], :2].tolist()}: a template has no face.")
        return pairs

    def identification(self) -> tuple[Templates, Templates, Templates] | None:
        """Gallery 1, gallery 2 and the probes of 1:N; ``None`` where none of their files is there.

        Raises ``DataError`` where only some are there, for rows of another form and templates without faces.
        """
        first, second = GALLERIES[self.benchmark]
        names = [f"1N_gallery_{first}", f"1N_gallery_{second}", "1N_probe_mixed"]
        files = [self.root / "meta" / f"{self.benchmark}_{name}.csv" for name in names]
        if not any(file.is_file() for file in files):
            return None
        one, two, probes = (self._templates(need_file(file, IJB_LAYOUT)) for file in files)
        return one, two, probes

    def _templates(self, path: Path) -> Templates:
        """Template and subject are the first two columns; a template with several rows counts once."""
        subject_of: dict[int, int] = {}
        known = set(self.templates.tolist())
        for line, text in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
            words = [word.strip() for word in text.split(",")]
            if line == 1 or not text.strip():  # the header
                continue
            if len(words) < 2:
                raise DataError(f"{path}, line {line}: {text!r}; expected template,subject,...")
            template, subject = (whole_number(word, path, line, "an id") for word in words[:2])
            if template not in known:
                raise DataError(f"{path}, line {line}: template {template} has no face.")
            if subject_of.setdefault(template, subject) != subject:
                raise DataError(
                    f"{path}, line {line}: template {template} has subject {subject}, before {subject_of[template]}."
                )
        if not subject_of:
            raise DataError(f"{path} names no template; expected rows template,subject,... below a header.")
        return Templates(np.array(list(subject_of), np.int64), np.array(list(subject_of.values()), np.int64))


def similarity_transform(source: NDArray[Any], target: NDArray[Any]) -> tuple[complex, complex]:
    """``(a, b)`` of the turning, uniform scaling and shift that bring ``source`` nearest to ``target``.

    Both are ``(N, 2)``. With points ``z = x + iy`` it is ``a * z + b``: a least-squares line of complex numbers, which
    is S. Umeyama's estimate (PAMI 1991) in the plane without mirroring. ``a`` is 0 for points on one spot.
    """
    z, w = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    centred = z - z.mean()
    length = float(np.sum(np.abs(centred) ** 2))
    a = complex(np.sum(np.conj(centred) * w) / length) if length else 0j
    return a, complex(w.mean() - a * z.mean())


def _benchmark(root: Path, name: str) -> str:
    found = [b for b in BENCHMARKS if (root / "meta" / f"{b}_face_tid_mid.txt").is_file()]
    if name != "auto":
        return name
    if len(found) > 1:
        raise DataError(f"{root / 'meta'} has the files of {' and '.join(found)}: say which one with benchmark.")
    if not found:
        raise DataError(f"{root / 'meta'} has neither ijbc_face_tid_mid.txt nor ijbb_face_tid_mid.txt. {IJB_LAYOUT}")
    return found[0]


def _file_name(name: str, path: Path, line: int) -> str:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise DataError(f"{path}, line {line}: {name!r}; expected the name of a file in loose_crop.")
    return name
