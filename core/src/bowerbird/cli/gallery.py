"""``bowerbird gallery``: create, fill, search and check a gallery."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bowerbird.cli import examples
from bowerbird.cli.matrix import matrix
from bowerbird.cli.parts import SAME_VECTOR, class_names, images_from, progress_bar, shown_times, times_of

if TYPE_CHECKING:
    from bowerbird.gallery import Gallery

CALL_ITEMS = 50_000  # vectors per call of Gallery.add: bounds memory, and what an interruption repeats

gallery_argument = click.argument("path", type=click.Path(file_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, mps.")


@click.group(
    "gallery",
    epilog=examples(
        "bowerbird gallery create photos --encoder 'core:efficientnet-lite?model=lite0'",
        "bowerbird gallery add photos --folder ~/Pictures",
        "bowerbird gallery search photos --image cat.jpg -k 5",
        "bowerbird gallery verify photos",
    ),
)
def command() -> None:
    """Create, fill and search a gallery. To move it to another model see `bowerbird upgrade`."""


@command.command(
    epilog=examples(
        "bowerbird gallery create photos --encoder runs/old",
        "bowerbird gallery create photos --encoder 'core:efficientnet-lite?model=lite0' --dtype float16",
        "bowerbird gallery create vectors --dim 768 --name hosted-model-v2",
        "bowerbird gallery create vectors --encoder 'vectors:v2.parquet?space=hosted-model-v2'",
    )
)
@gallery_argument
@click.option("--encoder", metavar="ENCODER", help="A run, an exported folder, a name with settings, or vectors:FILE.")
@click.option("--dim", type=click.IntRange(min=1), help="Width of vectors that come from elsewhere.")
@click.option("--name", help="Identity of the encoder that makes them; vectors of another name are another space.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@device_option
@json_option
def create(
    path: str, encoder: str | None, dim: int | None, name: str | None, dtype: str, device: str, as_json: bool
) -> None:
    """Create the gallery PATH, for the images of an encoder or for ready vectors."""
    import hashlib

    from bowerbird.errors import InputError
    from bowerbird.gallery import Space, create_gallery
    from bowerbird.gallery.open import folder_of, safe_url
    from bowerbird.gallery.storage import refuse_occupied

    if (encoder is None) == (dim is None) or (name is not None and dim is None):
        raise InputError(
            "a gallery needs either --encoder, or --dim (with --name) for vectors that come from elsewhere"
        )
    folder = folder_of(path)
    if folder is not None:
        refuse_occupied(folder)  # before the encoder is loaded, which takes seconds
    if encoder is not None:
        space, _ = _described(encoder, device)
    else:
        assert dim is not None
        name = name or "vectors"
        space = Space(hashlib.sha256(f"black box {name} {dim}".encode()).hexdigest(), f"black-box:{name}", dim)
    with create_gallery(path, space, dtype=dtype):
        pass
    if as_json:
        click.echo(
            json.dumps(
                {"path": safe_url(path), "fingerprint": space.fingerprint, "encoder": space.encoder, "dim": space.dim}
            )
        )
    else:
        click.echo(f"created {safe_url(path)} for vectors of {space}")


@command.command(
    epilog=examples(
        "bowerbird gallery add photos cat.jpg dog.jpg",
        "bowerbird gallery add photos --folder ~/Pictures --on-error skip --metadata labels.csv",
        "bowerbird gallery add styles --dataset emoji:styles --split unseen-gallery",
        "bowerbird gallery add things --folder ~/Pictures --detect runs/detector --threshold 0.6",
        "bowerbird gallery add clips --folder ~/Videos --clip-seconds 10",
        "bowerbird gallery add vectors --vectors vectors.npy --ids ids.txt",
        "bowerbird gallery add vectors --vectors vectors.parquet",
    )
)
@gallery_argument
@click.argument("images", nargs=-1, type=click.Path())
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False),
    help="Every image below it (and every video, if the encoder takes videos); the id is the path in it, the first "
    "subfolder the `label`.",
)
@click.option("--dataset", help="A data set by name, or with settings: 'core:market-1501?root=FOLDER'.")
@click.option("--split", help="Split of the data set.")
@click.option("--vectors", type=click.Path(exists=True, dir_okay=False), help="Ready vectors: .npy of shape "
              "(N, D), or with their ids .parquet, .safetensors, or .npy beside NAME.ids.txt.")  # fmt: skip
@click.option("--ids", "ids_file", type=click.Path(exists=True, dir_okay=False), help="Their ids: a text file, one per "
              "line. Default: those of the file; then its labels become the metadata `label`.")  # fmt: skip
@click.option(
    "--space", metavar="FINGERPRINT", help="Space of the vectors, or its first letters; needed during an upgrade."
)
@click.option(
    "--metadata",
    type=click.Path(exists=True, dir_okay=False),
    help="Metadata for search --where: .csv or .jsonl with a column or key `id`.",
)
@click.option("--existing", type=click.Choice(["error", "skip", "update"]), help="Ids that are there already; update: "
              "replace what changed. Default: update for images, error for vectors.")  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(["raise", "skip"]), default="raise", show_default=True, help="Unreadable images."
)
@click.option("--clip-seconds", type=click.FloatRange(min=0.001), help="Of longer videos, a vector for "
              "every so many seconds; ids are VIDEO#t=start,end. Default: one vector per video.")  # fmt: skip
@click.option("--detect", "detector", metavar="MODEL", help="Add the objects that this detector finds, a vector each; "
              "ids are IMAGE#xywh=x,y,w,h, metadata label, score, box, image.")  # fmt: skip
@click.option("--threshold", type=click.FloatRange(0, 1), help="With --detect: least score of an object. Default: 0.5.")
@click.option(
    "--classes", multiple=True, callback=class_names, metavar="NAMES", help="With --detect: only these; cat,dog."
)
@click.option(
    "--max-per-image", type=click.IntRange(min=1), help="With --detect: most objects of an image. Default: 100."
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Pictures, or frames of videos, at once.",
)
@click.option("--lock-timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for another writer.")
@device_option
@json_option
def add(
    path: str, images: tuple[str, ...], folder: str | None, dataset: str | None, split: str | None, vectors: str | None,
    ids_file: str | None, space: str | None, metadata: str | None, existing: str | None, on_error: str,
    clip_seconds: float | None, detector: str | None, threshold: float | None, classes: tuple[str, ...],
    max_per_image: int | None, batch_size: int, lock_timeout: float, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Add images or videos (files, a folder, a data set), the objects in images (--detect), or ready vectors to the
    gallery PATH.

    Repeat an interrupted call: what is there already is not encoded again. A part of an image is added as
    IMAGE#xywh=x,y,w,h (pixels), a moment of a video as VIDEO#t=start,end (seconds).
    """
    from bowerbird.errors import InputError
    from bowerbird.gallery import open_gallery
    from bowerbird.gallery.images import Added, add_images
    from bowerbird.gallery.objects import AddedObjects, add_objects

    if sum([bool(images), folder is not None, dataset is not None, vectors is not None]) != 1:
        raise InputError("say what to add, one of: image files, --folder, --dataset, --vectors")
    if (ids_file is not None and vectors is None) or (split is not None and dataset is None):
        raise InputError("--ids goes with --vectors, and --split goes with --dataset")
    if space is not None and vectors is None:
        raise InputError("--space goes with --vectors; images are encoded by the encoder of the space that is written")
    chosen = {"threshold": threshold, "classes": classes or None, "max_per_image": max_per_image}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if detector is not None and vectors is not None:
        raise InputError("--detect finds objects in images; --vectors has none")
    if clip_seconds is not None and (vectors is not None or detector is not None):
        raise InputError("--clip-seconds cuts videos; it goes neither with --vectors nor with --detect")
    if detector is None and chosen:
        raise InputError(f"--{next(iter(chosen)).replace('_', '-')} goes with --detect")
    with open_gallery(path, lock_timeout=lock_timeout) as gallery:
        if vectors is not None:
            if ids_file is not None:
                ids, array, own = _lines(ids_file), _npy(vectors), None
            else:
                from bowerbird.upgrade.vectors_encoder import read_vectors

                table = read_vectors(vectors)
                ids, array = list(table.ids), table.vectors
                own = None if table.labels is None else [{"label": label} for label in table.labels]
            rows = _metadata(metadata, ids, own)
            named = _space(gallery, space)
            _refuse_foreign(gallery, vectors, array, ids, named)
            with progress_bar("adding", len(ids), "vectors", as_json) as progress:
                result: Added = _add_vectors(gallery, vectors, array, ids, rows, named, existing or "error", progress)
        else:
            encoder = _encoder_of(gallery, device)
            of_videos = encoder.frames is not None and detector is None
            if clip_seconds is not None and not of_videos:
                raise InputError(f"--clip-seconds cuts videos, and the encoder {encoder.name} takes pictures")
            ids, sources, labels = images_from(images, folder, dataset, split, videos=of_videos)
            rows = _metadata(metadata, ids, labels)
            if clip_seconds is not None:
                from bowerbird.data.videos import cut_into_clips

                described, names = rows or [None] * len(ids), ids
                ids, sources, whence = cut_into_clips(ids, sources, clip_seconds)
                rows = [{**(described[i] or {}), "video": names[i]} for i in whence]
            given: dict[str, Any] = {"ids": ids, "metadata": rows, "existing": existing or "update"}
            given |= {"on_error": on_error, "batch_size": batch_size}
            finder = None if detector is None else _finder(detector, device, chosen)
            with progress_bar("adding", len(ids), "videos" if of_videos else "images", as_json) as progress:
                if finder is None:
                    result = add_images(gallery, encoder, sources, **given, progress=progress)
                else:
                    result = add_objects(gallery, encoder, finder, sources, **given, progress=progress)
        total = len(gallery)
    if as_json:
        click.echo(json.dumps({**vars(result), "items": total}))
        return
    looked = removed = ""
    if isinstance(result, AddedObjects):
        looked = f"looked at {result.pictures} images, {result.empty} of them without objects; "
        removed = f", removed {result.removed}" if result.removed else ""
    click.echo(
        f"{looked}added {result.added}, replaced {result.replaced}, unchanged {result.unchanged}{removed}; "
        f"{total} items in {gallery.path}"
    )
    for name, reason in result.skipped.items():
        click.echo(f"skipped {name}: {reason}", err=True)


@command.command(
    epilog=examples("bowerbird gallery delete photos 2019/cat.jpg", "bowerbird gallery delete photos --ids gone.txt")
)
@gallery_argument
@click.argument("names", nargs=-1, metavar="[ID]...")
@click.option(
    "--ids", "ids_file", type=click.Path(exists=True, dir_okay=False), help="A text file with one id per line."
)
@json_option
def delete(path: str, names: tuple[str, ...], ids_file: str | None, as_json: bool) -> None:
    """Delete items by id: all of them, or none if one is not there."""
    from bowerbird.errors import InputError
    from bowerbird.gallery import open_gallery

    wanted = [*names, *(_lines(ids_file) if ids_file else [])]
    if not wanted:
        raise InputError("say which items to delete: ids, or --ids FILE")
    with open_gallery(path) as gallery:
        deleted, total = gallery.delete(wanted), len(gallery)
    click.echo(
        json.dumps({"deleted": deleted, "items": total})
        if as_json
        else f"deleted {deleted}; {total} items in {gallery.path}"
    )


@command.command(
    epilog=examples(
        "bowerbird gallery search photos --image cat.jpg -k 5",
        "bowerbird gallery search things --image 'street.jpg#xywh=160,120,64,64' --where label=car",
        "bowerbird gallery search photos --id 2019/cat.jpg --where year=2019 --where year=2020",
        "bowerbird gallery search vectors --vector query.npy --json",
        "bowerbird gallery search clips --text 'a red boot moves left' -k 5",
        "bowerbird gallery search clips --video 'match.mp4#t=12.5,20'",
    )
)
@gallery_argument
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Query image, or a part of it: IMAGE#xywh=x,y,w,h; may be repeated.",
)
@click.option("--text", "texts", multiple=True, help="Query sentence, for encoders that take texts; may be repeated.")
@click.option(
    "--video", "videos", multiple=True, metavar="VIDEO",
    help="Query video, or a moment of it: VIDEO#t=start,end; may be repeated.",
)  # fmt: skip
@click.option("--id", "ids", multiple=True, help="Use a stored item as the query; may be repeated.")
@click.option(
    "--vector", type=click.Path(exists=True, dir_okay=False), help="Query vectors: .npy of shape (Q, D) or (D,)."
)
@click.option("-k", type=int, default=10, show_default=True, help="Results per query.")
@click.option(
    "--where", multiple=True, metavar="KEY=VALUE", help="Only items with this metadata; the same key again: or."
)
@device_option
@json_option
def search(
    path: str, images: tuple[str, ...], texts: tuple[str, ...], videos: tuple[str, ...], ids: tuple[str, ...],
    vector: str | None, k: int, where: tuple[str, ...], device: str, as_json: bool,
) -> None:  # fmt: skip
    """The nearest items of images, of sentences, of videos, of stored items, or of vectors.

    Of a video or a clip the result says from where to where it reaches, in seconds.
    """
    from bowerbird.errors import InputError
    from bowerbird.gallery import open_gallery
    from bowerbird.gallery.images import search_images, search_texts

    if sum([bool(images), bool(texts), bool(videos), bool(ids), vector is not None]) != 1:
        raise InputError("say what to search with, one of: --image, --text, --video, --id, --vector")
    wanted = parse_where(where)
    with open_gallery(path, readonly=True) as gallery:
        queries: Sequence[str] = images or texts or videos or ids
        if texts:
            found = search_texts(gallery, _encoder_of(gallery, device), texts, k, where=wanted)
        elif images or videos:
            encoder = _encoder_of(gallery, device)
            if videos and encoder.frames is None:
                raise InputError(f"the encoder {encoder.name} takes pictures, not videos; search with --image")
            found = search_images(gallery, encoder, queries, k, where=wanted)
        elif ids:
            found = gallery.search(gallery.vectors_of(ids), k, where=wanted)
        else:
            assert vector is not None
            found = gallery.search(_npy(vector), k, where=wanted)
            queries = [f"{vector}[{row}]" for row in range(len(found))]
        items = {
            name: item for names in found.ids for name, item in zip(names, gallery.get_many(names), strict=True) if item
        }
    results: list[dict[str, Any]] = [
        {"query": query, "hits": [_hit(name, distance, items.get(name))
                                  for name, distance in zip(names, distances, strict=False)]}
        for query, names, distances in zip(queries, found.ids, found.distances, strict=True)
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps({"epoch": found.epoch, "results": results}))
        return
    for result in results:
        click.echo(str(result["query"]))
        for rank, hit in enumerate(result["hits"], 1):
            label = f"  {hit['label']}" if "label" in hit else ""
            click.echo(f"  {rank:>3}  {hit['distance']:.4f}  {hit['id']}{shown_times(hit)}{label}")
        if not result["hits"]:
            click.echo("  nothing found" + (": no item matches --where" if where else ": the gallery is empty"))


@command.command(
    epilog=examples(
        "bowerbird gallery index photos --kind ivf",
        "bowerbird gallery index photos",
        "bowerbird gallery index photos --kind exact --json",
    )
)
@gallery_argument
@click.option("--kind", metavar="KIND", help="exact, ivf or hnsw. Default: what the gallery has; it is built again.")
@click.option("--target-recall", type=float, help="Recall@10 to reach, measured on a sample. Default: 0.95.")
@json_option
def index(path: str, kind: str | None, target_recall: float | None, as_json: bool) -> None:
    """Build the approximate index of the gallery PATH, or return to exact searches.

    It keeps up with the gallery by itself, also during an upgrade. Needs FAISS.
    """
    from bowerbird.gallery import open_gallery

    with open_gallery(path) as gallery:
        current = gallery.index()
        config = {} if kind not in (None, current["kind"]) else current["config"]
        if target_recall is not None:
            config = {**config, "target_recall": target_recall}
        say = None if as_json else lambda text: click.echo(text, err=True)
        gallery.set_index(kind or current["kind"], progress=say, **config)
        found = {**gallery.index(), "items": len(gallery)}
    if as_json:
        click.echo(json.dumps(found))
        return
    for file in found["files"]:
        recall = "not measured" if file["recall"] is None else f"{file['recall']:.3f}"
        click.echo(f"{file['kind']} of {file['items']} items in {file['space'][:12]}: recall@10 {recall}")
        click.echo(f"  {file['path']}")
    if not found["files"]:
        click.echo(
            f"searches of {gallery.path} are exact" + ("" if found["kind"] == "exact" else ": it has no items yet")
        )


@command.command(
    epilog=examples(
        "bowerbird gallery copy photos --to postgresql://localhost/images?gallery=photos",
        "bowerbird gallery copy postgresql://localhost/images?gallery=photos --to photos-copy",
    )
)
@gallery_argument
@click.option("--to", "url", required=True, metavar="URL", help="Path or URL of the copy.")
@click.option("--lock-timeout", type=float, default=10.0, show_default=True, help="Seconds to wait for another writer.")
@json_option
def copy(path: str, url: str, lock_timeout: float, as_json: bool) -> None:
    """Copy the gallery PATH to another place or store, and verify the copy item by item.

    Repeat an interrupted call: it goes on where it was. Repeat a finished one to bring the copy up to date.
    """
    from dataclasses import asdict

    from bowerbird.gallery import open_gallery
    from bowerbird.gallery.copy import copy_gallery
    from bowerbird.gallery.open import safe_url

    with open_gallery(path, readonly=True) as gallery:
        total = 2 * len(gallery)  # written once, then read once more in both
        with progress_bar("copying and verifying", total, "items", as_json) as advance:
            weight = {"copying": 1.0, "verifying": 0.5}
            tell = None if advance is None else lambda what, count: advance(weight[what] * count)
            copied = copy_gallery(gallery, url, progress=tell, lock_timeout=lock_timeout)
    if as_json:
        click.echo(json.dumps({"to": safe_url(url), **asdict(copied)}))
        return
    click.echo(
        f"added {copied.added}, replaced {copied.replaced}, deleted {copied.deleted}, unchanged {copied.unchanged}; "
        f"{copied.items} items in {safe_url(url)}, verified (digest {copied.digest})"
    )


@command.command(epilog=examples("bowerbird gallery verify photos", "bowerbird gallery verify photos --json"))
@gallery_argument
@json_option
@click.pass_context
def verify(ctx: click.Context, path: str, as_json: bool) -> None:
    """Check every checksum and invariant. Exit code 1 if something is damaged."""
    from dataclasses import asdict

    from bowerbird.gallery import open_gallery

    with open_gallery(path, readonly=True) as gallery:
        report = gallery.verify()
    if as_json:
        click.echo(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        for problem in report.problems:
            click.echo(f"{problem.kind}: {problem.message}")
        for note in report.notes:
            click.echo(f"note: {note}")
        click.echo(
            f"{report.items} items, {report.rows} rows, {report.batches} batches: {'ok' if report.ok else 'DAMAGED'}"
        )
    ctx.exit(0 if report.ok else 1)


@command.command(epilog=examples("bowerbird gallery stats photos --json"))
@gallery_argument
@json_option
def stats(path: str, as_json: bool) -> None:
    """Items, spaces, rows and bytes."""
    from bowerbird.gallery import open_gallery

    with open_gallery(path, readonly=True) as gallery:
        found = gallery.stats()
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['path']}: {found['items']} items, {found['bytes'] / 1e6:.1f} MB, epoch {found['epoch']}")
    for space in found["spaces"]:
        serving = " (serving)" if space["fingerprint"] == found["serving"] else ""
        click.echo(
            f"  {space['items']:>10} in {space['fingerprint'][:12]} {space['encoder']}, {space['dim']}-d{serving}"
        )
    click.echo(f"  {found['rows']} rows in {found['segments']} segments, {found['dead_rows']} of them dead")
    if found["pending"]:
        click.echo(f"  {found['pending']} items wait for a vector")
    if found["upgrade"]:
        click.echo(f"  upgrade to {found['upgrade']['new'][:12]}: {found['upgrade']['state']}")
    for file in found["index"]["files"]:
        click.echo(f"  {file['kind']} index of {file['items']} items in {file['space'][:12]}")
    for problem in found["problems"]:
        click.echo(f"  damaged: {problem}")


@command.command(epilog=examples("bowerbird gallery info photos 2019/cat.jpg", "bowerbird gallery info photos --json"))
@gallery_argument
@click.argument("item", required=False)
@json_option
def info(path: str, item: str | None, as_json: bool) -> None:
    """What is known of one ITEM; without it, the spaces, relations and upgrades of the gallery."""
    from dataclasses import asdict

    from bowerbird.gallery import open_gallery

    with open_gallery(path, readonly=True) as gallery:
        if item is not None:
            found: dict[str, Any] = asdict(gallery.get(item))
        else:
            found = {
                "items": len(gallery),
                "spaces": [asdict(space) for space in gallery.spaces()],
                "relations": [asdict(relation) for relation in gallery.relations()],
                "upgrades": gallery.store.history(),
            }
    click.echo(json.dumps(found, indent=None if as_json else 2, ensure_ascii=False, default=str))


@command.command(
    epilog=examples(
        "bowerbird gallery relate photos --new runs/new",
        "bowerbird gallery relate photos --new runs/new --evidence measured.json",
        "bowerbird gallery relate photos --new runs/new --remove",
    )
)
@gallery_argument
@click.option("--new", required=True, metavar="ENCODER", help="The encoder that was trained to be compatible; "
              "with --remove also its fingerprint, or the first letters of it.")  # fmt: skip
@click.option(
    "--evidence",
    type=click.Path(exists=True, dir_okay=False),
    help="What was measured elsewhere: a JSON object. Default: what the encoder's training recorded.",
)
@click.option("--remove", is_flag=True, help="Take the relation back.")
@device_option
def relate(path: str, new: str, evidence: str | None, remove: bool, device: str) -> None:
    """Register that queries of an encoder may be compared with the vectors that the gallery serves.

    Where items can be encoded, it is measured on some of them, and refused where the encoder's vectors are not nearer
    to the stored ones of the same items than to others. --remove takes the relation back, unless searches rely on it.
    """
    from bowerbird.cli.upgrade_parts import encoder_of
    from bowerbird.errors import InputError
    from bowerbird.gallery import open_gallery
    from bowerbird.upgrade.fitting import check_compatible

    if remove:
        if evidence is not None:
            raise InputError("--evidence is of a relation that is registered; with --remove leave it out")
        with open_gallery(path) as gallery:
            old, fingerprint = gallery.snapshot().serving, _related(gallery, new)
            gallery.unrelate(fingerprint, old)
        click.echo(f"removed: {new} is no longer registered as compatible with {old[:12]}")
        return
    encoder = encoder_of(new, 64, device)
    given = _json_object(evidence) if evidence else None
    with open_gallery(path) as gallery:
        serving = gallery.snapshot().serving
        measured = check_compatible(gallery, encoder, serving)
        spec = getattr(encoder.encoder, "spec", None)  # vectors:FILE has none
        recorded: dict[str, Any] = next(
            (r["evidence"] for r in getattr(spec, "relations", ()) if (r["kind"], r["to"]) == ("compatible", serving)),
            {},
        )
        told = dict(recorded if given is None else given)
        if measured is not None:
            told["measured"] = measured
        gallery.register_space(encoder.space)
        gallery.relate(encoder.space.fingerprint, serving, evidence=told)
    click.echo(f"registered: {encoder.space} is compatible with {serving[:12]}")
    if measured is None:
        click.echo("declared, not measured: too few items of the gallery can be encoded by it", err=True)
    else:
        click.echo(
            f"measured on {measured['items']} items: mean cosine {measured['cosine_same_item']:.3f} with the stored "
            f"vectors of the same items, {measured['cosine_other_items']:.3f} with those of others"
        )


command.add_command(matrix)


# ------------------------------------------------------------------------------------------------------- helpers


def _hit(name: str, distance: float, item: Any) -> dict[str, Any]:
    """One result. Of an object (``gallery add --detect``) also its picture, where it is in it, and what it is; of a
    video its ``start`` and ``end`` in seconds."""
    hit = {"id": name, "distance": round(float(distance), 6), "uri": None if item is None else item.uri}
    if item is not None and "box" in item.metadata:
        hit |= {key: item.metadata[key] for key in ("image", "label", "box") if key in item.metadata}
    return hit | times_of(item)


def _related(gallery: Gallery, named: str) -> str:
    """The fingerprint of the space with a relation that ``named`` is: its encoder as the gallery calls it, also where
    that is gone, or the beginning of its fingerprint; else the encoder is loaded."""
    from bowerbird.errors import InputError

    spaces = gallery.snapshot().spaces
    related = sorted({relation.new for relation in gallery.relations() if relation.kind == "compatible"})
    names = (named, str(Path(named).resolve()))
    found = [name for name in related if spaces[name].encoder in names or name.startswith(named)]
    if len(found) > 1:
        listed = ", ".join(str(spaces[name]) for name in found)
        raise InputError(f"--new {named!r} names {len(found)} spaces of {gallery.path}: {listed}; give a fingerprint")
    return found[0] if found else _described(named, "cpu")[0].fingerprint


def _finder(ref: str, device: str, chosen: Mapping[str, Any]) -> Any:
    from bowerbird.detect import ObjectFinder

    return ObjectFinder(ref, device=device, **chosen)


def _described(ref: str, device: str) -> tuple[Any, Sequence[Any]]:
    """Space of an encoder, and the relations that its training recorded."""
    from bowerbird.upgrade.vectors_encoder import is_vectors_ref, load_vectors_encoder

    if is_vectors_ref(ref):
        return load_vectors_encoder(ref).space, ()
    from bowerbird.encoders import load_encoder

    encoder = load_encoder(ref, device=device)
    return encoder.space(), encoder.spec.relations


def _encoder_of(gallery: Gallery, device: str) -> Any:
    """The encoder of the space that is written now, loaded by the reference that the gallery keeps."""
    from bowerbird.errors import SpaceError

    space = gallery.snapshot().write_space
    if space.lifted:
        raise SpaceError(
            f"the vectors of gallery {gallery.path} were lifted by a transform: no encoder makes them from images. "
            f"Search with images through `bowerbird upgrade serve {gallery.path}`; to add images, begin an upgrade to "
            f"the new encoder, `bowerbird upgrade run {gallery.path} --to ENCODER`"
        )
    if space.encoder.startswith(("black-box:", "vectors:")):
        raise SpaceError(
            f"gallery {gallery.path} holds vectors of {space.encoder}, which cannot be loaded here; use vectors"
        )
    from bowerbird.encoders import load_encoder  # after the refusal: it brings torch

    return load_encoder(space.encoder, device=device)


def _add_vectors(
    gallery: Gallery,
    file: str,
    vectors: Any,
    ids: list[str],
    metadata: Sequence[Mapping[str, Any] | None] | None,
    space: str | None,
    existing: str,
    progress: Callable[[int], None] | None,
) -> Any:
    """Add ``vectors``, the rows of ``file``. Everything is checked first: all are added or none, unless the
    process or the disk fails."""
    import numpy as np

    from bowerbird.errors import InputError
    from bowerbird.gallery.images import Added
    from bowerbird.gallery.vectors import checked_ids, unit_vectors

    if vectors.ndim != 2 or len(vectors) != len(ids):
        raise InputError(f"{file} has shape {vectors.shape}; {len(ids)} ids need ({len(ids)}, D)")
    checked_ids(ids)
    known = _there_already(gallery, ids) if existing == "error" else []
    if known:
        raise InputError(
            f"{len(known)} of {len(ids)} ids are in the gallery already ({', '.join(map(repr, known[:5]))}"
            f"{', ...' if len(known) > 5 else ''}); nothing was added. Leave them out, or say what to do with them: "
            "--existing skip, or --existing update"
        )
    snapshot = gallery.snapshot()
    dim = (snapshot.spaces[space] if space else snapshot.write_space).dim
    for start in range(0, len(ids), CALL_ITEMS):
        unit_vectors(vectors[start : start + CALL_ITEMS], dim, what=f"the vectors of {file}", first_row=start)
    result = Added()
    for start in range(0, len(ids), CALL_ITEMS):
        chunk = slice(start, start + CALL_ITEMS)
        there = np.array([item is not None for item in gallery.get_many(ids[chunk])]) if existing != "error" else None
        keep = np.arange(len(ids[chunk])) if there is None or existing == "update" else np.flatnonzero(~there)
        rows = vectors[chunk] if len(keep) == len(ids[chunk]) else vectors[chunk][keep]
        gallery.add(
            [ids[start + i] for i in keep.tolist()],
            rows,
            metadata=None if metadata is None else [metadata[start + i] for i in keep.tolist()],
            space=space,
            replace=existing == "update",
        )
        replaced = int(there.sum()) if there is not None and existing == "update" else 0
        result.replaced += replaced
        result.added += len(keep) - replaced
        result.unchanged += len(ids[chunk]) - len(keep)
        if progress is not None:
            progress(len(ids[chunk]))
    return result


def _refuse_foreign(gallery: Gallery, file: str, vectors: Any, ids: list[str], named: str | None) -> None:
    """Vectors of another model of the same width, where the space is known by a file (``vectors:FILE``) that is still
    there: ids that the file has, too, must have its vectors.

    Raises:
        SpaceError: If half of them, or more, have others.
    """
    import numpy as np

    from bowerbird.errors import BowerbirdError, SpaceError
    from bowerbird.gallery.vectors import unit_vectors
    from bowerbird.upgrade.vectors_encoder import is_vectors_ref, load_vectors_encoder

    snapshot = gallery.snapshot()
    space = snapshot.spaces[named] if named else snapshot.write_space
    if not is_vectors_ref(space.encoder) or vectors.ndim != 2 or vectors.shape[1] != space.dim:
        return
    try:
        known = load_vectors_encoder(space.encoder, space=space).encoder.table
    except BowerbirdError:
        return  # the file has gone or has changed: there is nothing to compare with
    both = [row for row, name in enumerate(ids) if name in known.rows]
    if not both:
        return
    own = unit_vectors(vectors[both], space.dim, what=f"the vectors of {file}")
    cosines = np.einsum("nd,nd->n", own, known.vectors[[known.rows[ids[row]] for row in both]])
    if np.median(cosines) < SAME_VECTOR:
        raise SpaceError(
            f"the vectors of {file} are not of space {space}: of {len(both)} ids that {known.source} has as well, "
            f"{(cosines < SAME_VECTOR).sum()} have other vectors there (median cosine {np.median(cosines):.2f}); "
            f"nothing was added. If {file} is right, write its vectors into {known.source} first"
        )


def _space(gallery: Gallery, named: str | None) -> str | None:
    """The fingerprint that begins with ``named``."""
    from bowerbird.errors import SpaceError

    if named is None:
        return None
    spaces = gallery.spaces()
    found = [space.fingerprint for space in spaces if space.fingerprint.startswith(named)]
    if len(found) != 1:
        listed = ", ".join(map(str, spaces))
        raise SpaceError(f"--space {named!r} names {len(found)} spaces of {gallery.path}; it has {listed}")
    return found[0]


def _there_already(gallery: Gallery, ids: list[str]) -> list[str]:
    chunks = (ids[start : start + CALL_ITEMS] for start in range(0, len(ids), CALL_ITEMS)) if len(gallery) else ()
    return [item.id for chunk in chunks for item in gallery.get_many(chunk) if item is not None]


def _npy(file: str) -> Any:
    import numpy as np

    from bowerbird.errors import DataError

    try:
        with Path(file).open("rb") as stream:
            if stream.read(2) == b"PK":  # numpy would open it and give a mapping
                raise ValueError("it is an archive, as numpy.savez makes them; save one array with numpy.save")
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise DataError(f"{file} cannot be read as a .npy file of numbers: {exc}") from exc


def _lines(file: str) -> list[str]:
    from bowerbird.errors import DataError

    try:
        text = Path(file).read_text("utf-8-sig")
        return text.removesuffix("\n").split("\n") if text else []  # splitlines would cut ids at exotic characters
    except UnicodeDecodeError as exc:
        raise DataError(f"{file} is not UTF-8 text: {exc}") from exc


def _metadata(
    file: str | None, ids: Sequence[str], own: list[dict[str, Any]] | None
) -> Sequence[Mapping[str, Any] | None] | None:
    """One object per id: what the source has, overridden by the file's row with that id."""
    if file is None:
        return own
    rows = _metadata_rows(file)
    unknown = rows.keys() - set(ids)
    if unknown:
        click.echo(f"note: {len(unknown)} rows of {file} have ids that are not being added", err=True)
    return [{**(own[i] if own else {}), **rows.get(name, {})} for i, name in enumerate(ids)]


def _metadata_rows(file: str) -> dict[str, dict[str, Any]]:
    """``id`` -> the other columns. Numbers in a .csv become numbers."""
    import csv

    from bowerbird.errors import DataError

    if Path(file).suffix not in (".csv", ".jsonl"):
        raise DataError(f"metadata {file}: accepted are .csv and .jsonl")
    rows: list[dict[str, Any]] = []
    try:
        if Path(file).suffix == ".jsonl":
            rows = [json.loads(line) for line in _lines(file) if line.strip()]
        else:
            with Path(file).open(newline="", encoding="utf-8-sig") as stream:
                rows = [{k: _scalar(v) if k != "id" else v for k, v in row.items()} for row in csv.DictReader(stream)]
    except (ValueError, csv.Error) as exc:
        raise DataError(f"metadata {file} cannot be read: {exc}") from exc
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise DataError(f"metadata {file}: row {number} has no text `id`: {row!r}")
        if None in row:
            raise DataError(f"metadata {file}: row {number} ({row['id']!r}) has more columns than the header")
        if row["id"] in found:
            raise DataError(f"metadata {file}: row {number} has the id {row['id']!r} of an earlier row")
        found[row["id"]] = {key: value for key, value in row.items() if key != "id"}
    return found


def _json_object(file: str) -> dict[str, Any]:
    from bowerbird.errors import DataError

    try:
        value = json.loads(Path(file).read_text("utf-8"))
    except ValueError as exc:
        raise DataError(f"{file} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise DataError(f"{file} must hold a JSON object")
    return value


def _scalar(text: Any) -> Any:
    """The JSON value that ``text`` spells (a number, true, false, null), or the text itself."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return text
    return text if isinstance(value, dict | list) else value


def parse_where(pairs: tuple[str, ...]) -> dict[str, Any] | None:
    """``key=value`` options; a key that is given again accepts any of its values."""
    from bowerbird.errors import InputError

    wanted: dict[str, list[Any]] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--where {pair!r}: expected KEY=VALUE, for example --where year=2024")
        # As text, too: the label of an object may be the digit 5, which metadata holds as "5".
        wanted.setdefault(key, []).extend(dict.fromkeys((_scalar(value), value)))
    return wanted or None
