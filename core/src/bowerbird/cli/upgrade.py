"""``bowerbird upgrade``: plan, serve, run, watch, finish, rollback; and status, pause, resume."""

from __future__ import annotations

import json
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from bowerbird.cli import examples
from bowerbird.cli.gallery import parse_where
from bowerbird.cli.lift import lift
from bowerbird.cli.upgrade_parts import (
    GAIN_STEP,
    WORKER_LOADER,
    as_images,
    encoder_of,
    executor_of,
    exit_if_failed,
    gain_is_there,
    latest_plan,
    moving_bar,
    old_encoder_of,
    open_at,
    planned_merger,
    print_results,
    print_status,
    queries_of,
    refuse_out,
    saved_plan,
    settings_of,
    steps_bar,
    terminated_like_ctrl_c,
    together,
    what_to_ask,
    work_silently,
)

if TYPE_CHECKING:
    from bowerbird.upgrade import RunReport
    from bowerbird.upgrade.worker import Job

gallery_argument = click.argument("gallery", type=click.Path(file_okay=False))
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0.")
batch_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images per call of an encoder."
)
old_option = click.option("--old", metavar="ENCODER", help="The old encoder; default: what the gallery's space names.")
label_option = click.option("--label-key", metavar="KEY", help="Metadata key that holds the label of an item.")
queries_option = click.option(
    "--queries",
    metavar="SOURCE",
    help="Labelled queries: a folder with one subfolder per label, a data set's name, or vectors:OLD_FILE,NEW_FILE.",
)
split_option = click.option("--split", help="Split of the data set with the queries.")
seed_option = click.option("--seed", type=int, default=0, show_default=True)


@click.group(
    "upgrade",
    epilog=examples(
        "bowerbird upgrade plan photos --to runs/new --label-key label",
        "bowerbird upgrade run photos --to runs/new --strategy rank-merge",
        "bowerbird upgrade serve photos --image query.png",
        "bowerbird upgrade finish photos",
    ),
)
def command() -> None:
    """Move a gallery to another encoder while it serves.

    Plan it (reads only), run it (resumable, as many workers as you like), serve and watch meanwhile; then finish it, or
    roll it back to the exact old state.
    """


@command.command(
    epilog=examples(
        "bowerbird upgrade plan photos --to runs/new --label-key label",
        "bowerbird upgrade plan photos --to runs/new --queries labelled/ --label-key label --sample 2000",
        "bowerbird upgrade plan photos --to runs/new --label-key label --price-per-hour 1.20 --out plan.html",
        "bowerbird upgrade plan photos --to runs/new --label-key label --order random --order uncertainty",
        "bowerbird upgrade plan photos --to vectors:new.parquet --old vectors:old.parquet --label-key label",
    )
)
@gallery_argument
@click.option("--to", "to", required=True, metavar="ENCODER", help="The new encoder.")
@old_option
@label_option
@queries_option
@split_option
@click.option("--sample", type=click.IntRange(min=1), default=2000, show_default=True, help="Items to encode.")
@click.option(
    "--num-queries", type=click.IntRange(min=1), default=500, show_default=True, help="Sampled items as queries."
)
@click.option("--strategy", "strategies", multiple=True, help="A strategy to forecast; default: all.")
@click.option("--merger", "mergers", multiple=True, help="A merger to forecast with; default: all.")
@click.option("--order", "order", multiple=True, help="Backfill order of the forecast; several are compared. "
              "[default: core:random]")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the orders (TOML).")
@click.option("--metric", type=click.Choice(["map", "map@100", "r1"]), default="map", show_default=True)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of the machine that encodes, in any currency.")
@seed_option
@batch_option
@device_option
@click.option(
    "--out",
    "outs",
    type=click.Path(dir_okay=False),
    multiple=True,
    help="Where to save the plan: .json (for run --plan), .html or .svg. [default: GALLERY/plan/latest.json]",
)
@json_option
def plan(gallery: str, to: str, old: str | None, queries: str | None, split: str | None, batch_size: int, device: str,
         outs: tuple[str, ...], as_json: bool, strategies: tuple[str, ...], mergers: tuple[str, ...],
         order: tuple[str, ...], overrides: tuple[str, ...], **settings: Any) -> None:  # fmt: skip
    """Whether to upgrade, by which strategy, and what it costs. Changes nothing.

    A sample is encoded by the new encoder; labelled queries (or sampled items, each without itself) then measure both
    systems and forecast every strategy. Ends with one recommendation, which may be not to upgrade.
    """
    from bowerbird.upgrade.plan import plan as make_plan

    for out in outs:
        refuse_out(out)
    with open_at(gallery, readonly=True) as opened:
        new_encoder = encoder_of(to, batch_size, device)
        old_encoder = old_encoder_of(opened, old, batch_size, device, required=as_images(queries))
        with steps_bar(show_it=sys.stderr.isatty()) as progress:
            made = make_plan(
                opened,
                new_encoder,
                old_encoder=old_encoder,
                queries=queries_of(queries, split),
                strategies=strategies or None,
                mergers=mergers or None,
                order=order or "core:random",
                order_settings=settings_of(overrides) or None,
                progress=progress,
                **settings,
            )
        for out in outs or latest_plan(opened):
            made.save(out)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
        return
    from bowerbird.upgrade.tables import plan_table, show

    show(plan_table(made))
    command = made.next_command()
    if command is not None:
        click.echo(f"next: {command}")  # not broken into lines: it is to be copied


@command.command(
    epilog=examples(
        "bowerbird upgrade serve photos --image query.png",
        "bowerbird upgrade serve photos --image a.png --image b.png --k 5 --where year=2024 --json",
        "bowerbird upgrade serve photos --image query.png --watch",
        "bowerbird upgrade serve clips --text 'a red boot moves left'",
    )
)
@gallery_argument
@click.option("--image", "images", multiple=True, type=click.Path(exists=True, dir_okay=False),
              help="A query image.")  # fmt: skip
@click.option("--text", "texts", multiple=True, help="A sentence, for encoders that take texts; may be repeated.")
@click.option("--video", "videos", multiple=True, metavar="VIDEO",
              help="A query video, or a moment of it: VIDEO#t=START,END.")  # fmt: skip
@click.option("--queries", metavar="VECTORS", help="Query vectors instead: vectors:OLD_FILE,NEW_FILE, "
              "or vectors:NEW_FILE where the strategy encodes a query once.")  # fmt: skip
@click.option("--k", "-k", type=click.IntRange(min=1), default=10, show_default=True, help="Results per query.")
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="Only items with this metadata.")
@click.option("--old", metavar="ENCODER", help="The old encoder; default: what its space names.")
@click.option("--to", "to", metavar="ENCODER", help="The new encoder; default: what its space names.")
@click.option("--watch", "follow", is_flag=True, help="Search again whenever the gallery changed, until Ctrl-C.")
@batch_option
@device_option
@json_option
def serve(gallery: str, images: tuple[str, ...], texts: tuple[str, ...], videos: tuple[str, ...], queries: str | None,
          k: int, where: tuple[str, ...], old: str | None, to: str | None, follow: bool, batch_size: int, device: str,
          as_json: bool) -> None:  # fmt: skip
    """Search a gallery with images, texts or videos, before, during and after an upgrade.

    Each result is shown with the side that found it: old or new.
    """
    from bowerbird.upgrade.serve import serve as make_service

    filters = parse_where(where)
    if sum([bool(images or videos), bool(texts), queries is not None]) != 1:
        raise click.UsageError(
            "say what to search for: --image or --video, or --text, or --queries vectors:OLD_FILE,NEW_FILE"
        )
    with open_at(gallery, readonly=True) as opened:
        ask = what_to_ask(opened, (*images, *videos), texts, queries)
        given = [encoder_of(ref, batch_size, device) for ref in (old, to) if ref is not None]
        service = make_service(opened, given, loader=lambda space: encoder_of(space.encoder, batch_size, device, space))
        seen = -1
        while True:
            state = service.state()
            if state.epoch != seen:
                names, what = ask()
                found = service.search(**what, k=k, where=filters)
                print_results(opened, names, found, state, as_json)
                seen = state.epoch
            if not follow:
                return
            time.sleep(0.5)


@command.command(
    epilog=examples(
        "bowerbird upgrade run photos --to runs/new",
        "bowerbird upgrade run photos --to runs/new --order uncertainty --label-key label --stop-at-share 0.5",
        "bowerbird upgrade run photos --to runs/new --label-key label --watch-every 0.05 --max-nfr 0.02",
        "bowerbird upgrade run photos --rate 50      (goes on with the upgrade under way)",
        "bowerbird upgrade run photos --to runs/new --workers 4",
        "torchrun --nproc-per-node 2 -m bowerbird upgrade run photos --to runs/new --engine torchrun",
    )
)
@gallery_argument
@click.option("--to", "to", metavar="ENCODER", help="The new encoder; may be left out once the upgrade is under way.")
@old_option
@click.option("--strategy", help="How the old part is searched. [default: rank-merge]")
@click.option("--on-top", is_flag=True, help="Begin on top of another upgrade that is under way.")
@click.option("--compatible", is_flag=True, help="The new encoder was trained for the old one: register that relation.")
@click.option("--order", help="What is moved first. [default: core:random]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of the order (TOML).")
@click.option("--merger", help="What joins the hits of old and new vectors. "
              "[default: that of the last plan for these encoders and this strategy, else the strategy's]")  # fmt: skip
@click.option("--transform", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="The map of adapter or reverse-transform. [default: fitted on a sample; for reverse-transform the "
              "one that was trained together with the new encoder, if there is one]")  # fmt: skip
@click.option("--accept-poor-transform", is_flag=True,
              help="Also a map that held-out pairs say is of no use, or that nothing shows to be of any.")  # fmt: skip
@click.option("--plan", "plan_file", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
              help="Take strategy, merger, order and map from a saved plan.")  # fmt: skip
@click.option("--seed", type=int, help="Of the order. [default: 0]")
@click.option(
    "--task-items",
    type=click.IntRange(min=1),
    help="Items per commit. [default: 512, fewer or more by the number of items]",
)
@label_option
@queries_option
@split_option
@click.option("--rate", type=float, help="At most so many items per second.")
@click.option("--stop-after", type=int, help="End once so many items are moved.")
@click.option("--stop-at-share", type=float, help="End once this share of the gallery is moved, 0 to 1.")
@click.option("--stop-at-gain", type=click.FloatRange(0, 1, min_open=True), help="End once this share of the gain is "
              "there: the plan (--plan, or the last one) forecasts it, and the watched queries show it.")  # fmt: skip
@click.option("--watch-every", type=float, help="Measure after each such share of the gallery, such as 0.05.")
@click.option("--max-nfr", type=float, help="Pause above this rate of negative flips against the old system.")
@click.option("--store-patience", type=click.FloatRange(min=0), default=300.0, show_default=True,
              help="Seconds to wait for a store that went away; then exit code 75.")  # fmt: skip
@click.option("--retry-failed", is_flag=True, help="Try items again that failed three times.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that share the work. [default: 1]")
@click.option("--engine", default="local", show_default=True, help="What starts them: local, torchrun or ray.")
@batch_option
@device_option
@json_option
def run(gallery: str, to: str | None, old: str | None, on_top: bool, compatible: bool, overrides: tuple[str, ...],
        plan_file: str | None, stop_at_gain: float | None, accept_poor_transform: bool, queries: str | None,
        split: str | None, retry_failed: bool, batch_size: int, device: str, as_json: bool,
        rate: float | None, stop_after: int | None, stop_at_share: float | None, watch_every: float | None,
        max_nfr: float | None, store_patience: float, workers: int | None, engine: str,
        **begin_settings: Any) -> None:  # fmt: skip
    """Move the gallery to the new encoder. Begins the upgrade if none is under way.

    Safe to stop at any moment and to start again: Ctrl-C gives the task in hand back, a kill loses one task of
    encoding. --workers shares the work over processes of this machine; so does starting it in several terminals.
    Limits hold for all workers of one command together.
    """
    from bowerbird.errors import InputError
    from bowerbird.upgrade import Upgrade
    from bowerbird.upgrade.fitting import check_compatible, trained_transform
    from bowerbird.upgrade.run import Limits
    from bowerbird.upgrade.strategies import load_strategy
    from bowerbird.upgrade.tables import show, watch_table

    Limits(stop_after, None, stop_at_share, rate)  # refused here, before an encoder is loaded or a map fitted
    begin_settings = {name: value for name, value in begin_settings.items() if value is not None}
    executor = executor_of(engine, workers)
    with open_at(gallery) as opened, terminated_like_ctrl_c():
        if executor is not None and not executor.speaks:
            work_silently(opened, executor)
        state = opened.store.upgrade_state()
        if state is None and to is None:
            raise InputError(f"no upgrade is under way in {opened.path}: name the new encoder, --to ENCODER")
        space = None if state is None or to is not None else opened.snapshot().spaces[state.new]
        if space is not None and space.lifted:
            raise InputError(
                f"the upgrade under way in {opened.path} is a lift; `bowerbird upgrade lift {opened.path}` goes on"
            )
        new_encoder = encoder_of(to or (space.encoder if space else ""), batch_size, device, space)
        begins = state is None or (on_top and state.new != new_encoder.space.fingerprint)
        old_encoder = None
        if plan_file is not None:
            begin_settings = {**saved_plan(plan_file, new_encoder.space).begin_settings(), **begin_settings}
            if not begins:
                begin_settings.pop("transform", None)  # it was registered when the upgrade began
        if stop_at_gain is not None:
            from bowerbird.upgrade.saved_plan import share_for_gain

            if stop_at_share is not None:
                raise InputError("--stop-at-gain and --stop-at-share are two limits of one kind; give one")
            saved = saved_plan(plan_file or next(iter(latest_plan(opened)), None), new_encoder.space)
            strategy = begin_settings.get("strategy") or (state.strategy if state is not None else saved.strategy)
            stop_at_share = share_for_gain(saved, stop_at_gain, strategy)
            click.echo(f"{stop_at_gain:.0%} of the gain are forecast at {stop_at_share:.1%} of the gallery", err=True)
        if begins and "merger" not in begin_settings:
            planned = planned_merger(opened, new_encoder.space, begin_settings.get("strategy", "rank-merge"))
            if planned is not None:
                begin_settings["merger"] = planned
                click.echo(f"merger {planned}, as the last plan for these encoders says", err=True)
        if begins and "transform" not in begin_settings:
            chosen = load_strategy(begin_settings.get("strategy", "rank-merge"))[1]
            if trained_transform(chosen, new_encoder, opened.snapshot().write_space) is not None:
                click.echo("the map was trained together with the new encoder: none is fitted", err=True)
        settings: dict[str, Any] = dict(begin_settings)
        if overrides:
            settings["order_settings"] = settings_of(overrides)
        if begins:
            old_encoder = old_encoder_of(opened, old, batch_size, device, required=as_images(queries))
            settings["on_top"] = on_top
            settings["accept_poor_transform"] = accept_poor_transform
            if queries is not None:
                settings["queries"] = queries_of(queries, split)
            if compatible:
                check_compatible(opened, new_encoder)
                stored = opened.snapshot().write_space.fingerprint
                opened.register_space(new_encoder.space)
                opened.relate(new_encoder.space.fingerprint, stored, evidence={"declared": "upgrade run --compatible"})
        elif queries is not None:
            raise InputError("queries to watch are frozen when an upgrade begins, and one is under way; leave them out")
        upgrade = Upgrade(opened, new_encoder, old=old_encoder)
        if retry_failed:
            upgrade.status()
            opened.store.retry_failed()
        limits: dict[str, Any] = {"rate": rate, "stop_after": stop_after, "stop_at_share": stop_at_share}
        limits["store_patience"] = store_patience
        watched = {"watch_every": watch_every, "max_nfr": max_nfr}

        def work() -> RunReport:
            with moving_bar(show_it=sys.stderr.isatty() and not as_json) as progress:
                if executor is None:
                    return upgrade.run(**limits, **watched, progress=progress, **settings)
                from bowerbird.upgrade.engines import make_job, run_workers

                def begin() -> Job:
                    label = begin_settings.get("label_key")
                    begun = upgrade.join(watch=any(v is not None for v in (label, *watched.values())), **settings)
                    encoder = {
                        "ref": to or opened.snapshot().spaces[begun.new].encoder,
                        "batch_size": batch_size,
                        "device": device,
                    }
                    return make_job(opened, gallery, begun, WORKER_LOADER, encoder, **limits)

                return run_workers(opened, begin, executor, **watched, progress=progress)

        report = work()
        while stop_at_gain is not None and report.reason == "stop-at-share":
            if gain_is_there(opened, saved, stop_at_gain, report.share):
                break
            settings = {}  # it has begun
            limits["stop_at_share"] = min(1.0, report.share + GAIN_STEP)
            report = together(report, work())
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        exit_if_failed(report)
        return
    if report.watched:
        show(watch_table(report.watched))
    click.echo(
        f"{report.reason}: moved {report.encoded} items in {report.seconds:.1f} s ({report.rate:.1f} items/s); "
        f"{report.share:.1%} of the gallery is new"
    )
    for share in report.workers:
        again = f", started again {share.restarts} times" if share.restarts else ""
        click.echo(f"  worker {share.index}: {share.encoded} items in {share.seconds:.1f} s{again}")
        if share.error is not None:
            click.echo(f"worker {share.index} failed: {share.error}", err=True)
    for item, attempts, error in report.failures[:10]:
        click.echo(f"failed ({attempts} of 3 attempts): {item}: {error}", err=True)
    exit_if_failed(report)
    named = shlex.quote(str(opened.path))  # a URL has characters that mean something to a shell
    stuck = any(attempts >= 3 for _, attempts, _ in report.failures)
    follow = {
        "complete": f"bowerbird upgrade run {named} --retry-failed, when what failed is repaired"
        if stuck
        else f"bowerbird upgrade finish {named}",
        "stop-rule": f"bowerbird upgrade rollback {named}, or resume",
    }.get(report.reason)
    if follow:
        click.echo(f"next: {follow}")


@command.command(
    epilog=examples(
        "bowerbird upgrade watch photos",
        "bowerbird upgrade watch photos --max-nfr 0.02 --every 60",
        "bowerbird upgrade watch photos --history --json",
    )
)
@gallery_argument
@click.option("--max-nfr", type=click.FloatRange(0, 1), help="Pause the upgrade above this rate of negative flips.")
@click.option(
    "--every", type=click.FloatRange(min=0, min_open=True), help="Measure every so many seconds until it ends."
)
@click.option("--history", "only_history", is_flag=True, help="Show what was measured so far, and measure nothing.")
@json_option
def watch(gallery: str, max_nfr: float | None, every: float | None, only_history: bool, as_json: bool) -> None:
    """Measure quality, flips, churn and calibration on the queries that were frozen when the upgrade began.

    Works beside `run` in another process; above --max-nfr the upgrade is paused and workers stop after their task.
    """
    from bowerbird.upgrade.tables import show, watch_table
    from bowerbird.upgrade.watch import history
    from bowerbird.upgrade.watch import watch as measure

    with open_at(gallery, readonly=only_history) as opened:
        if only_history:
            entries = history(opened)
            if not entries and not as_json:
                click.echo(f"nothing was measured in {opened.path} yet")
                return
            click.echo(json.dumps(entries)) if as_json else show(watch_table(entries))
            return
        while True:
            entry = measure(opened, max_nfr=max_nfr)
            click.echo(json.dumps(entry.to_dict())) if as_json else show(watch_table([entry]))
            if every is None or entry.stopped or entry.share >= 1:
                break
            time.sleep(every)
            if opened.store.upgrade_state() is None:
                break
    if entry.stopped:
        click.echo(f"paused: {entry.nfr:.2%} negative flips, more than {max_nfr:.2%}", err=True)


@command.command(
    epilog=examples("bowerbird upgrade finish photos", "bowerbird upgrade finish photos --accept-failed --json")
)
@gallery_argument
@click.option("--accept-failed", is_flag=True, help="Items that could not be encoded are no longer found by searches.")
@click.option("--skip-canary", is_flag=True, help="Do not load the new encoder to check a sample of the new vectors.")
@click.option("--to", "to", metavar="ENCODER", help="The new encoder; default: what its space names.")
@batch_option
@device_option
@json_option
def finish(gallery: str, accept_failed: bool, skip_canary: bool, to: str | None, batch_size: int, device: str,
           as_json: bool) -> None:  # fmt: skip
    """Serve the new encoder only and drop the old vectors. There is no way back.

    Refused until every item is new, every checksum holds, and the new encoder reproduces a sample of the new vectors.
    """
    from bowerbird.upgrade import finish as finish_it
    from bowerbird.upgrade import status as status_of
    from bowerbird.upgrade.lift import lifter

    with open_at(gallery) as opened:
        now = status_of(opened)
        space = opened.snapshot().spaces[now.new["fingerprint"]]
        if skip_canary or space.lifted:
            encoder = None if skip_canary else lifter(opened)
        else:
            encoder = encoder_of(to or space.encoder, batch_size, device, space)
        ended = finish_it(opened, encoder=encoder, accept_failed=accept_failed)
    if as_json:
        click.echo(json.dumps(ended))
        return
    click.echo(f"finished: {ended['items']} items are served by {now.new['encoder']}; the old vectors are gone")
    if ended["pending"]:
        click.echo(f"{ended['pending']} items have no vector and are not found until they get one", err=True)


@command.command(
    epilog=examples("bowerbird upgrade rollback photos", "bowerbird upgrade rollback photos --old runs/old")
)
@gallery_argument
@click.option("--old", metavar="ENCODER", help="The old encoder, for items that were added during the upgrade.")
@click.option("--leave-pending", is_flag=True, help="Leave such items without a vector instead.")
@batch_option
@device_option
@json_option
def rollback(gallery: str, old: str | None, leave_pending: bool, batch_size: int, device: str, as_json: bool) -> None:
    """Back to the exact old state, at any time before finish: same vectors, same results, bit for bit."""
    from bowerbird.upgrade import rollback as roll_back
    from bowerbird.upgrade import status as status_of

    with open_at(gallery) as opened:
        now = status_of(opened)
        space = opened.snapshot().spaces[now.old["fingerprint"]]
        encoder = None if old is None else encoder_of(old, batch_size, device, space)
        pending = roll_back(opened, encode_old=encoder, leave_pending=leave_pending)
    if as_json:
        click.echo(json.dumps({"items": now.items, "pending": pending}))
        return
    if now.covered:
        click.echo(f"rolled back: the upgrade to {now.old['encoder']} below it is as it was, paused")
        click.echo(f"next: bowerbird upgrade resume {shlex.quote(gallery)}, or rollback again")
    else:
        click.echo(f"rolled back: {now.items - pending} items are served by {now.old['encoder']}")
    if pending:
        click.echo(f"{pending} items have no vector of it and are not found until they get one", err=True)


@command.command(epilog=examples("bowerbird upgrade status photos", "bowerbird upgrade status photos --json"))
@gallery_argument
@json_option
def status(gallery: str, as_json: bool) -> None:
    """How far the upgrade is, and which items failed."""
    from bowerbird.upgrade import status as status_of

    with open_at(gallery, readonly=True) as opened:
        print_status(status_of(opened), str(opened.path), as_json)


@command.command(epilog=examples("bowerbird upgrade pause photos"))
@gallery_argument
@json_option
def pause(gallery: str, as_json: bool) -> None:
    """Let workers stop after the task in hand. Serving goes on."""
    from bowerbird.upgrade import pause as pause_it

    with open_at(gallery) as opened:
        print_status(pause_it(opened), str(opened.path), as_json)


@command.command(epilog=examples("bowerbird upgrade resume photos"))
@gallery_argument
@json_option
def resume(gallery: str, as_json: bool) -> None:
    """Let workers take tasks again; `bowerbird upgrade run` starts one."""
    from bowerbird.upgrade import resume as resume_it

    with open_at(gallery) as opened:
        print_status(resume_it(opened), str(opened.path), as_json)


command.add_command(lift)
