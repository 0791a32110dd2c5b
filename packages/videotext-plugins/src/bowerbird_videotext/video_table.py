"""``videotext:table``: the user's own videos and captions, from a folder or a table of CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from bowerbird.data.moments import Moment, moment_uri
from bowerbird.data.videos import videos_in
from bowerbird.errors import DataError, InputError, MissingExtraError, UnknownNameError, did_you_mean
from bowerbird_videotext.clips import Clip, ClipList, Problems, VideoFiles, joined, usable
from bowerbird_videotext.data_configs import VideoTableConfig

Row = tuple[str, dict[str, Any]]  # where it is, such as "'train.csv', row 7", and its values


class VideoTable(ClipList):
    """The videos of a folder or of a table; rows of the same video and moment are its captions."""

    @classmethod
    def build(cls, config: VideoTableConfig, split: str | None = None) -> Self:
        """The videos of ``split``; all of them where none is asked for.

        Raises:
            UnknownNameError: There is no such split or column.
            DataError: A file is missing or cannot be used; without ``skip_unreadable`` also a row or a video.
        """
        if split is None and "{split}" in f"{config.table}{config.videos}":
            raise InputError("videotext:table: table or videos says {split}, so a split must be named")
        name = "videotext:table" if config.table is None else repr(_filled(config.table, split))
        folder = config.root / _filled(config.videos, split)
        problems = Problems(config.skip_unreadable)
        if config.table is None:
            if split is not None and "{split}" not in config.videos:
                folder /= split
            clips = _of_folder(folder, config, problems)
        else:
            rows = _of_split(read_table(config.root / _filled(config.table, split), problems), config, split)
            clips = joined(_of_table(rows, config, VideoFiles(folder), problems), problems)
        return cls(usable(clips, config.check, problems, name=name, report=config.report))


def _filled(text: str, split: str | None) -> str:
    return text.replace("{split}", split or "")


# ------------------------------------------------------------------------------------------------------------- tables


def read_table(path: Path, problems: Problems, *, header: Sequence[str] | None = None) -> list[Row]:
    """The rows of a CSV, TSV, JSON-lines or Parquet file, each with where it is.

    Args:
        problems: Gets rows of another number of values, and lines that are no JSON object.
        header: Names of the columns of a table without a line of them; tabs separate its values.

    Raises:
        DataError: The file is missing, is none of these or has no row.
        MissingExtraError: A Parquet file without pyarrow.
    """
    if not path.is_file():
        raise DataError(f"there is no table {str(path)!r}")
    ending = path.suffix.lower()
    try:
        if header is not None or ending in (".csv", ".tsv"):
            rows = list(_csv_rows(path, "\t" if header is not None or ending == ".tsv" else ",", header, problems))
        elif ending in (".jsonl", ".ndjson"):
            rows = list(_json_rows(path, problems))
        elif ending == ".parquet":
            rows = list(_parquet_rows(path))
        else:
            raise DataError(f"{str(path)!r} is no table; expected .csv, .tsv, .jsonl or .parquet")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not rows:
        raise DataError(f"{str(path)!r} has no row")
    return rows


def _csv_rows(path: Path, delimiter: str, header: Sequence[str] | None, problems: Problems) -> Iterator[Row]:
    quoting: Any = csv.QUOTE_MINIMAL if header is None else csv.QUOTE_NONE
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        names = list(header) if header is not None else next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{str(path)!r}: two columns have the same name: {', '.join(names)}")
        try:
            for values in reader:
                if not values:
                    continue
                where = f"{str(path)!r}, line {reader.line_num}"
                if len(values) != len(names):
                    problems.add(where, f"{len(values)} values; expected {len(names)}: {', '.join(names)}")
                    continue
                yield where, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{str(path)!r}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path, problems: Problems) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            where = f"{str(path)!r}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                problems.add(where, f"no JSON ({error})")
                continue
            if isinstance(values, dict):
                yield where, values
            else:
                problems.add(where, f"expected a JSON object, found {type(values).__name__}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            f"{str(path)!r}: Parquet is read by pyarrow: pip install 'bowerbird-videotext[parquet]'"
        ) from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{str(path)!r} cannot be read as Parquet: {error}") from error
    for number, row in enumerate(values, 1):
        yield f"{str(path)!r}, row {number}", row


def _of_split(rows: list[Row], config: VideoTableConfig, split: str | None) -> list[Row]:
    if split is None or "{split}" in f"{config.table}{config.videos}":
        return rows
    if config.split_column not in _columns(rows):
        raise UnknownNameError(
            f"videotext:table: the split {split!r} is asked for, but {config.table!r} has no column "
            f"{config.split_column!r} (split_column); it has {', '.join(_columns(rows))}. A table for every split is "
            "table = 'NAME-{split}.csv'"
        )
    found = [row for row in rows if row[1].get(config.split_column) == split]
    if not found:
        known = sorted({str(values.get(config.split_column)) for _, values in rows})
        raise UnknownNameError(
            f"{config.table!r} has no split {split!r}; it has {', '.join(known[:20])}.{did_you_mean(split, known)}"
        )
    return found


def _columns(rows: Sequence[Row]) -> list[str]:
    return list({name: None for _, values in rows for name in values})


def _of_table(rows: list[Row], config: VideoTableConfig, files: VideoFiles, problems: Problems) -> Iterator[Clip]:
    columns = _columns(rows)
    asked = {"video": config.video, "item_id": config.item_id, "start": config.start, "end": config.end}
    asked |= {"label": config.label} | {f"keep[{i}]": name for i, name in enumerate(config.keep)}
    if config.captions == "required":
        asked["caption"] = config.caption
    for setting, name in asked.items():
        if name is not None and name not in columns:
            raise UnknownNameError(
                f"{config.table!r} has no column {name!r} ({setting}); it has {', '.join(columns)}."
                f"{did_you_mean(name, columns)}"
            )
    for where, values in rows:
        name = str(values.get(config.video) or "").strip()
        try:
            moment = _moment(values, config)
        except DataError as error:
            problems.add(where, str(error))
            continue
        found = files.find(name) if name else "the path of the video is empty"
        captions = _captions(values.get(config.caption))
        label = None if config.label is None else values.get(config.label)
        if isinstance(found, str):
            problems.add(where, found)
        elif not captions and (config.captions == "required" or _is_given(values.get(config.caption))):
            problems.add(where, f"the caption of {name!r} is empty")
        elif config.label is not None and not _is_given(label):
            problems.add(where, f"{name!r} has no class ({config.label})")
        else:
            video = str(found) if moment is None else moment_uri(found, moment)
            item_id = name if moment is None else moment_uri(name, moment)
            item_id = item_id if config.item_id is None else str(values.get(config.item_id) or "")
            if not item_id:
                problems.add(where, f"the id is empty ({config.item_id})")
                continue
            more = {key: values.get(key) for key in config.keep}
            yield Clip(item_id, video, captions, where, None if label is None else str(label), more)


def _captions(value: Any) -> tuple[str, ...]:
    """The texts of a cell, which holds one or a list; none where one of them is empty."""
    texts = [" ".join(str(one or "").split()) for one in (value if isinstance(value, list | tuple) else [value])]
    return tuple(texts) if all(texts) else ()


def _is_given(value: Any) -> bool:
    return value not in (None, "", [])


def _moment(values: Mapping[str, Any], config: VideoTableConfig) -> Moment | None:
    times: list[float | None] = []
    for column in (config.start, config.end):
        value = None if column is None else values.get(column)
        try:
            times.append(None if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise DataError(f"{column} = {value!r} is no time in seconds") from None
    start, end = times
    return None if start is None and end is None else Moment(start or 0.0, end)


def _of_folder(folder: Path, config: VideoTableConfig, problems: Problems) -> list[Clip]:
    ids, paths = videos_in(folder)
    clips = []
    for item_id, path in zip(ids, paths, strict=True):
        beside = path.with_suffix(".txt")
        try:
            lines = beside.read_text("utf-8-sig").splitlines() if beside.is_file() else []
        except UnicodeDecodeError as error:
            problems.add(repr(str(beside)), f"not UTF-8 text ({error.reason} at byte {error.start})")
            continue
        captions = tuple(" ".join(line.split()) for line in lines if line.strip())
        if not captions and config.captions == "required":
            what = "is empty" if beside.is_file() else "does not exist"
            problems.add(repr(str(path)), f"its captions {beside.name!r}: the file {what}")
            continue
        clips.append(Clip(item_id, str(path), captions, repr(str(path))))
    return clips
