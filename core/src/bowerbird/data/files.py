"""What the readers of benchmark sets share: images in files, and text tables whose errors name file and line."""

from __future__ import annotations

import csv
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from bowerbird.data.dataset import Dataset
from bowerbird.errors import DataError, UnknownNameError, did_you_mean


class BenchmarkImages(Dataset):
    """Items with ids and, where the files say so, classes. A subclass says how the image of an item is had."""

    def __init__(self, ids: Sequence[str], labels: Sequence[int] = (), classes: Sequence[str] = ()) -> None:
        self.classes = tuple(classes)
        self._ids = list(ids)
        self._labels = list(labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """The image of an item, RGB. Raises ``DataError``, which names the file, where it cannot be read."""

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"item_id": self._ids[index], "image": self.image(index)}
        if self._labels:
            item["label"] = self._labels[index]
        return item

    @property
    def item_ids(self) -> Sequence[str]:
        return self._ids

    def labels(self) -> Sequence[int]:
        """Empty where the files give no classes."""
        return self._labels


def check_split(name: str, split: str, known: Sequence[str]) -> None:
    """Raises ``UnknownNameError`` for a split that the data set ``name`` does not have."""
    if split not in known:
        raise UnknownNameError(f"{name} has no split {split!r}; it has {', '.join(known)}.{did_you_mean(split, known)}")


def need_folder(path: Path, layout: str) -> Path:
    """``path``, if it is a folder; else a ``DataError`` with the layout that is expected."""
    if not path.is_dir():
        raise DataError(f"The folder {path} {'is a file' if path.exists() else 'does not exist'}. {layout}")
    return path


def need_file(path: Path, layout: str) -> Path:
    """``path``, if it is a file; else a ``DataError`` with the layout that is expected."""
    if not path.is_file():
        raise DataError(f"The file {path} {'is a folder' if path.is_dir() else 'does not exist'}. {layout}")
    return path


def csv_rows(path: Path, columns: Sequence[str], layout: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """``(line number, row)`` of a comma-separated file with a header that has at least ``columns``.

    Raises ``DataError``, naming the file and the line, for a missing file or column, a row with other than the
    header's number of fields, or an empty field among ``columns``.
    """
    need_file(path, layout)
    form = ",".join(columns)
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            places = {name: header.index(name) for name in columns if name in header}
            if len(places) != len(columns):
                raise DataError(
                    f"{path}, line 1: the header is {','.join(header) or 'missing'!r}; expected the columns {form}."
                )
            for row in reader:
                if not row:
                    continue
                values = {name: row[place].strip() for name, place in places.items() if place < len(row)}
                if len(row) != len(header) or not all(values.values()):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {','.join(row)!r} has {len(row)} fields; expected "
                        f"{len(header)}, of which {form} are not empty."
                    )
                yield reader.line_num, values
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no comma-separated UTF-8 text: {error}.") from error


def word_rows(path: Path, count: int, form: str, layout: str) -> Iterator[tuple[int, list[str]]]:
    """``(line number, words)`` of a text file with ``count`` words a line; ``form`` says which, for errors."""
    need_file(path, layout)
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                words = line.split()
                if words and len(words) != count:
                    raise DataError(f"{path}, line {number}: {line.strip()!r} has {len(words)} words; expected {form}.")
                if words:
                    yield number, words
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}.") from error


def whole_number(text: str, path: Path, line: int, what: str) -> int:
    """``int(text)``, or a ``DataError`` that names the place."""
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}, line {line}: {what} is {text!r}; expected a whole number.") from None
