"""``videotext:msr-vtt``, ``videotext:didemo``, ``videotext:lsmdc``, ``videotext:msvd``: the user's own copies.

The annotations are read as they are distributed: docs/video-data.md says which files, and where they come from. Each is
looked for by its name, in ``root`` and then in any folder below.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bowerbird.data.moments import Moment, moment_uri
from bowerbird.data.plain_pickle import load_plain_pickle
from bowerbird.errors import DataError, UnknownNameError, did_you_mean
from bowerbird_videotext.clips import Clip, ClipList, Problems, VideoFiles, joined, usable
from bowerbird_videotext.data_configs import DiDeMoConfig, LsmdcConfig, MsrVttConfig, MsvdConfig
from bowerbird_videotext.video_table import read_table

_SEGMENT = 5.0  # seconds; DiDeMo's videos are cut into so many of them
_LSMDC_COLUMNS = ("clip", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")


@dataclass(frozen=True)
class _Entry:
    """A video, or a moment of it, as annotations name it."""

    where: str
    name: str
    captions: Sequence[str]
    moment: Moment | None = None


class MsrVtt(ClipList):
    """MSR-VTT. J. Xu et al.: MSR-VTT: A Large Video Description Dataset for Bridging Video and Language, CVPR 2016.

    The protocols ``1k-A`` and ``7k`` share a test split: 1,000 videos with one fixed caption each (Y. Yu et al.: A
    Joint Sequence Fusion Model for Video Question Answering and Retrieval, ECCV 2018).
    """

    @classmethod
    def build(cls, config: MsrVttConfig, split: str | None = None) -> Self:
        """``split`` is ``train`` (default) or ``test``, with the protocol ``full`` also ``val``.

        Raises ``UnknownNameError`` for another split, and ``DataError`` as ``videotext:table`` does.
        """
        known = ("train", "val", "test") if config.protocol == "full" else ("train", "test")
        split = _known(split, known, f"videotext:msr-vtt, protocol {config.protocol}")
        problems = Problems(config.skip_unreadable)
        if config.protocol == "full":
            entries = _msr_vtt_full(config.root, split, problems)
        elif split == "train":
            names = {
                "1k-A": ("MSRVTT_train.9k.csv", "train_list_jsfusion.txt"),
                "7k": ("MSRVTT_train.7k.csv", "train_list_miech.txt"),
            }[config.protocol]
            said = _msr_vtt_captions(config.root)
            entries = [_Entry(where, one, said.get(one, ())) for where, one in _listed(config.root, names, problems)]
        else:
            entries = _msr_vtt_1k(config.root, problems)
        return cls(_clips(entries, config, problems, f"videotext:msr-vtt, {split}"))


class DiDeMo(ClipList):
    """DiDeMo. L. A. Hendricks et al.: Localizing Moments in Video with Natural Language, ICCV 2017.

    A description's moment is the one that most of its annotators chose, the first of those that equally many chose.
    """

    @classmethod
    def build(cls, config: DiDeMoConfig, split: str | None = None) -> Self:
        """``split`` is ``train`` (default), ``val`` or ``test``. Raises as ``MsrVtt.build``."""
        split = _known(split, ("train", "val", "test"), "videotext:didemo")
        path = _file(config.root, f"{split}_data.json")
        problems = Problems(config.skip_unreadable)
        entries: list[_Entry] = []
        for number, found in enumerate(_json(path, list), 1):
            where = f"{str(path)!r}, description {number}"
            try:
                times = [tuple(time) for time in found["times"]] if config.captions == "moments" else []
                entry = _Entry(where, str(found["video"]), [str(found["description"])], _moment(times))
            except (KeyError, TypeError, ValueError, DataError) as error:
                problems.add(where, f"expected video, description and times [[first, last], ...] ({error!r})")
                continue
            entries.append(entry)
        if config.captions == "concatenated":
            entries = _concatenated(entries)
        return cls(_clips(entries, config, problems, f"videotext:didemo, {split}"))


class Lsmdc(ClipList):
    """LSMDC 2016. A. Rohrbach et al.: Movie Description, IJCV 2017. ``test``: the challenge's 1,000 public clips."""

    @classmethod
    def build(cls, config: LsmdcConfig, split: str | None = None) -> Self:
        """``split`` is ``train`` (default), ``val`` or ``test``. Raises as ``MsrVtt.build``."""
        files = {
            "train": "LSMDC16_annos_training.csv",
            "val": "LSMDC16_annos_val.csv",
            "test": "LSMDC16_challenge_1000_publictect.csv",
        }
        split = _known(split, tuple(files), "videotext:lsmdc")
        problems = Problems(config.skip_unreadable)
        rows = read_table(_file(config.root, files[split]), problems, header=_LSMDC_COLUMNS)
        entries = [_Entry(where, values["clip"].strip(), [values["sentence"]]) for where, values in rows]
        return cls(_clips(entries, config, problems, f"videotext:lsmdc, {split}"))


class Msvd(ClipList):
    """MSVD. D. Chen, W. Dolan: Collecting Highly Parallel Data for Paraphrase Evaluation, ACL 2011."""

    @classmethod
    def build(cls, config: MsvdConfig, split: str | None = None) -> Self:
        """``split`` is ``train`` (default), ``val`` or ``test``. Raises as ``MsrVtt.build``."""
        split = _known(split, ("train", "val", "test"), "videotext:msvd")
        problems = Problems(config.skip_unreadable)
        said = _msvd_captions(config, problems)
        listed = _listed(config.root, (f"{split}_list.txt",), problems)
        entries = [_Entry(where, one, said.get(one, ())) for where, one in listed]
        return cls(_clips(entries, config, problems, f"videotext:msvd, {split}"))


# ------------------------------------------------------------------------------------------------------------ MSR-VTT


def _msr_vtt_captions(root: Path) -> dict[str, list[str]]:
    """Captions of every video, in the order of the file: of Microsoft's form, or of COCO's."""
    path = _first_of(root, ("MSRVTT_data.json", "MSR_VTT.json", "train_val_videodatainfo.json"))
    paths = [path]
    if path.name == "train_val_videodatainfo.json":
        paths.append(_file(root, "test_videodatainfo.json"))
    said: dict[str, list[str]] = {}
    for one in paths:
        content = _json(one, dict)
        key, name = ("sentences", "video_id") if "sentences" in content else ("annotations", "image_id")
        for number, found in enumerate(_list_in(content, key, one), 1):
            try:
                said.setdefault(str(found[name]), []).append(str(found["caption"]))
            except (KeyError, TypeError) as error:
                raise DataError(f"{str(one)!r}, {key} {number}: expected {name} and caption ({error!r})") from error
    return said


def _msr_vtt_full(root: Path, split: str, problems: Problems) -> list[_Entry]:
    said = _msr_vtt_captions(root)
    listed = _find(root, f"{split}_list_full.txt")
    if listed is not None:
        return [_Entry(where, one, said.get(one, ())) for where, one in _lines(listed, problems)]
    wanted = "validate" if split == "val" else split
    paths = [
        _find(root, name) for name in ("MSRVTT_data.json", "train_val_videodatainfo.json", "test_videodatainfo.json")
    ]
    entries = {}
    for path in filter(None, paths):
        for number, found in enumerate(_list_in(_json(path, dict), "videos", path), 1):
            if isinstance(found, dict) and found.get("split") == wanted and "video_id" in found:
                name = str(found["video_id"])
                entries[name] = _Entry(f"{str(path)!r}, video {number}", name, said.get(name, ()))
    if not entries:
        raise DataError(
            f"{str(root)!r}: no file says which videos are the split {split!r} of MSR-VTT; expected videos with split "
            f"= {wanted!r} in MSRVTT_data.json or *_videodatainfo.json, or {split}_list_full.txt"
        )
    return list(entries.values())


def _msr_vtt_1k(root: Path, problems: Problems) -> list[_Entry]:
    """The test videos and their fixed captions: a table, or a list of videos and which of their captions it is."""
    table = _find(root, "MSRVTT_JSFUSION_test.csv")
    if table is not None:
        rows = read_table(table, problems)
        _has_columns(table, rows, ("video_id", "sentence"))
        return [_Entry(where, values["video_id"].strip(), [values["sentence"]]) for where, values in rows]
    chosen, listed = _find(root, "jsfusion_val_caption_idx.pkl"), _find(root, "val_list_jsfusion.txt")
    if chosen is None or listed is None:
        raise DataError(
            f"{str(root)!r}: expected MSRVTT_JSFUSION_test.csv, or val_list_jsfusion.txt with "
            "jsfusion_val_caption_idx.pkl, which say which caption each test video has"
        )
    said, which = _msr_vtt_captions(root), load_plain_pickle(chosen)
    entries = []
    for where, name in _lines(listed, problems):
        index = which.get(name) if isinstance(which, dict) else None
        captions = said.get(name, [])
        if not isinstance(index, int) or not 0 <= index < len(captions):
            problems.add(where, f"{str(chosen)!r} gives caption {index!r} of {name!r}, which has {len(captions)}")
            continue
        entries.append(_Entry(where, name, [captions[index]]))
    return entries


# ----------------------------------------------------------------------------------------------------- DiDeMo, MSVD


def _moment(times: Sequence[tuple[Any, ...]]) -> Moment | None:
    """The moment of most annotators, from first and last segments (counted from 0, both included)."""
    if not times:
        return None
    first, last = Counter(times).most_common(1)[0][0]
    return Moment(int(first) * _SEGMENT, (int(last) + 1) * _SEGMENT)


def _concatenated(entries: Iterable[_Entry]) -> list[_Entry]:
    by_video: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_video.setdefault(entry.name, []).append(entry)
    return [
        _Entry(parts[0].where, name, [" ".join(text for part in parts for text in part.captions)])
        for name, parts in by_video.items()
    ]


def _msvd_captions(config: MsvdConfig, problems: Problems) -> Mapping[str, Sequence[str]]:
    path = _first_of(
        config.root,
        ("AllVideoDescriptions.txt", "raw-captions.pkl", "MSR Video Description Corpus.csv", "video_corpus.csv"),
    )
    said: dict[str, list[str]] = {}
    if path.suffix == ".pkl":
        found = load_plain_pickle(path)
        if not isinstance(found, dict) or not all(isinstance(texts, list | tuple) for texts in found.values()):
            raise DataError(f"{str(path)!r}: expected a dict from the name of a video to a list of captions")
        return {str(name): [t if isinstance(t, str) else " ".join(t) for t in texts] for name, texts in found.items()}
    if path.suffix == ".csv":
        rows = read_table(path, problems)
        _has_columns(path, rows, ("VideoID", "Start", "End", "Language", "Description"))
        for _, values in rows:
            if values["Language"] == config.language:
                name = "{VideoID}_{Start}_{End}".format_map(values)
                said.setdefault(name, []).append(values["Description"])
        return said
    for _, line in _lines(path, problems):
        name, _, text = line.partition(" ")
        said.setdefault(name, []).append(text)
    return said


# -------------------------------------------------------------------------------------------------------------- files


def _known(split: str | None, known: tuple[str, ...], name: str) -> str:
    split = split or "train"
    if split not in known:
        raise UnknownNameError(f"{name} has no split {split!r}; it has {', '.join(known)}.{did_you_mean(split, known)}")
    return split


def _find(root: Path, name: str) -> Path | None:
    if (root / name).is_file():
        return root / name
    return min(root.rglob(name), default=None) if root.is_dir() else None


def _first_of(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = _find(root, name)
        if path is not None:
            return path
    what = "holds none of" if root.is_dir() else "is no folder; expected one with one of"
    raise DataError(f"{str(root)!r} {what} the files {', '.join(names)}: see docs/video-data.md for where they are")


def _file(root: Path, name: str) -> Path:
    return _first_of(root, (name,))


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text("utf-8-sig"))
    except ValueError as error:  # also text that is not UTF-8
        raise DataError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(content, kind):
        raise DataError(f"{str(path)!r}: expected a JSON {kind.__name__}, found {type(content).__name__}")
    return content


def _list_in(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    found = content.get(key)
    if not isinstance(found, list):
        raise DataError(f"{str(path)!r}: expected a list {key!r}; it has {', '.join(map(str, content))}")
    return found


def _listed(root: Path, names: Sequence[str], problems: Problems) -> list[tuple[str, str]]:
    """The names of videos in the first of some files: a text with one a line, or a table with ``video_id``."""
    path = _first_of(root, names)
    if path.suffix != ".csv":
        return list(_lines(path, problems))
    rows = read_table(path, problems)
    _has_columns(path, rows, ("video_id",))
    return [(where, values["video_id"].strip()) for where, values in rows]


def _has_columns(path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str]) -> None:
    found = rows[0][1]
    for name in columns:
        if name not in found:
            raise UnknownNameError(f"{str(path)!r} has no column {name!r}; it has {', '.join(found)}.")


def _lines(path: Path, problems: Problems) -> Iterator[tuple[str, str]]:
    """Lines that are neither empty nor begin with ``#``."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield f"{str(path)!r}, line {number}", line.strip()


def _clips(
    entries: Iterable[_Entry],
    config: MsrVttConfig | DiDeMoConfig | LsmdcConfig | MsvdConfig,
    problems: Problems,
    name: str,
) -> list[Clip]:
    files = VideoFiles(config.videos or config.root)
    clips = []
    for entry in entries:
        found = files.find(entry.name)
        captions = tuple(" ".join(text.split()) for text in entry.captions)
        if isinstance(found, str):
            problems.add(entry.where, found)
        elif not captions or not all(captions):
            problems.add(entry.where, f"{entry.name!r} has {'an empty' if captions else 'no'} caption")
        elif entry.moment is None:
            clips.append(Clip(entry.name, str(found), captions, entry.where))
        else:
            source, item_id = moment_uri(found, entry.moment), moment_uri(entry.name, entry.moment)
            clips.append(Clip(item_id, source, captions, entry.where))
    return usable(joined(clips, problems), config.check, problems, name=name, report=config.report)
