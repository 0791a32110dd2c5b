"""``bowerbird detect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import click

from bowerbird.cli import examples
from bowerbird.cli.parts import class_names, images_from, progress_bar

PICTURES, RESULTS, IMAGES = "pictures", "results.json", "images.json"


@click.command(
    "detect",
    epilog=examples(
        "bowerbird detect runs/canvases street.jpg --out found",
        "bowerbird detect runs/canvases --folder ~/Pictures --out found --classes cat,dog --threshold 0.7",
        "bowerbird detect models/detector --dataset 'detection:coco?annotations=val.json&images=val' --out found "
        "--threshold 0 --no-pictures",
        "bowerbird gallery add things --folder ~/Pictures --detect runs/canvases",
    ),
)
@click.argument("model")
@click.argument("images", nargs=-1, type=click.Path())
@click.option("--folder", type=click.Path(exists=True, file_okay=False), help="Every image below it.")
@click.option("--dataset", help="A data set by name, or with settings: 'detection:canvases?count=20'.")
@click.option("--split", help="Split of the data set.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for what is found.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Least score of an object. To "
    "measure AP with other tools: 0."
)  # fmt: skip
@click.option("--classes", multiple=True, callback=class_names, metavar="NAMES", help="Only these: cat,dog.")
@click.option(
    "--max-per-image", type=click.IntRange(min=1), default=100, show_default=True, help="The surest ones of an image."
)
@click.option("--no-pictures", is_flag=True, help="Write the results only, draw nothing.")
@click.option(
    "--on-error", type=click.Choice(["raise", "skip"]), default="raise", show_default=True, help="Unreadable images."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, mps.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def command(
    model: str, images: tuple[str, ...], folder: str | None, dataset: str | None, split: str | None, out: str,
    threshold: float, classes: tuple[str, ...], max_per_image: int, no_pictures: bool, on_error: str, batch_size: int,
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Find the objects in images by the detector MODEL (a run, or an exported folder).

    \b
    The folder --out gets
      pictures/      every image with boxes, masks and keypoints, class names and scores
      results.json   COCO's results format: image_id, category_id, bbox x y width height, score, segmentation
      images.json    what the ids mean: COCO's images and categories

    Ids are those of the annotation file where the data set has one, else counted from 1. To search by objects, put
    them into a gallery: bowerbird gallery add GALLERY --detect MODEL.
    """
    from bowerbird.errors import DataError, InputError

    if sum([bool(images), folder is not None, dataset is not None]) != 1:
        raise InputError("say where to look, one of: image files, --folder, --dataset")
    if split is not None and dataset is None:
        raise InputError("--split goes with --dataset")
    target = Path(out)
    if target.is_file():
        raise InputError(f"--out {out}: there is a file of that name; name a folder")

    from bowerbird.coco import coco_results
    from bowerbird.detect import ObjectFinder
    from bowerbird.draw import draw_objects
    from bowerbird.files import write_json

    ids, sources, built = _sources(images, folder, dataset, split)
    image_ids = getattr(built, "image_ids", range(1, len(ids) + 1))
    finder = ObjectFinder(model, threshold=threshold, classes=classes, max_per_image=max_per_image, device=device)
    categories, category_ids = _categories(finder.classes, built)
    skipped: dict[str, str] = {}

    def bad(position: int, error: Exception) -> None:
        if on_error == "raise":
            raise DataError(f"{error} No results were written; to leave such images out: --on-error skip") from error
        skipped[ids[position]] = str(error)
        if advance is not None:
            advance(1)

    entries: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    places = _places(ids)
    target.mkdir(parents=True, exist_ok=True)
    with progress_bar("detecting", len(ids), "images", as_json) as advance:
        for found in finder.find(sources, batch_size=batch_size, on_error=bad):
            position, (width, height) = found.position, found.image.size
            entry = {"id": image_ids[position], "file_name": ids[position], "width": width, "height": height}
            entries.append(entry)
            results += coco_results(found.objects, image_ids[position], category_ids)
            counts.update(finder.classes[label] for label in found.objects.labels.tolist())
            if not no_pictures:
                _save(draw_objects(found.image, found.objects, finder.classes), target / PICTURES / places[position])
            if advance is not None:
                advance(1)
    write_json(target / IMAGES, {"images": entries, "categories": categories})
    write_json(target / RESULTS, results)
    if as_json:
        summary = {"out": str(target), "images": len(entries), "objects": len(results), "classes": dict(counts),
                   "fingerprint": finder.loaded.fingerprint, "skipped": skipped}  # fmt: skip
        click.echo(json.dumps(summary))
        return
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(8))
    click.echo(f"{len(results)} objects in {len(entries)} images" + (f": {listed}" if listed else ""))
    click.echo(f"{target / RESULTS}" + ("" if no_pictures else f", pictures in {target / PICTURES}"))
    for reason in skipped.values():
        click.echo(f"skipped: {reason}", err=True)


def _sources(
    images: Sequence[str], folder: str | None, dataset: str | None, split: str | None
) -> tuple[Sequence[str], Sequence[Any], Any]:
    """Ids, what is opened, and the data set where there is one."""
    if dataset is None:
        ids, sources, _ = images_from(images, folder, None, None)
        return ids, sources, None
    from bowerbird.data import images_of
    from bowerbird.data.uris import open_dataset

    built, _ = open_dataset(dataset, split)
    return list(built.item_ids), images_of(built), built


def _categories(classes: Sequence[str], dataset: Any) -> tuple[list[dict[str, Any]], list[int]]:
    """COCO's categories, and the id of every class of the detector.

    Where the data set was read from annotations (it has ``category_ids``), a class has the id of theirs of that name;
    classes of other names get ids that are free. Else ids are counted from 1.
    """
    own = getattr(dataset, "category_ids", ())
    known = dict(zip(dataset.classes, own, strict=True)) if own else {}
    free = max(own, default=0)
    ids = []
    for name in classes:
        if name not in known:
            free += 1
        ids.append(known.get(name, free))
    return [{"id": number, "name": name} for name, number in zip(classes, ids, strict=True)], ids


def _places(ids: Sequence[str]) -> list[str]:
    """Where each picture is drawn, below one folder whatever the ids are, and no two in one place."""
    places: list[str] = []
    taken: set[str] = set()
    for name in ids:
        parts = [part.replace(":", "_").replace("#", "_") for part in PurePosixPath(name).parts if part != "/"]
        stem = "/".join("_" if part == ".." else part for part in parts) or "_"
        number, place = 1, f"{stem}.png"
        while place in taken:
            number += 1
            place = f"{stem}-{number}.png"
        taken.add(place)
        places.append(place)
    return places


def _save(picture: Any, path: Path) -> None:
    import io

    from bowerbird.files import write_atomically

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
