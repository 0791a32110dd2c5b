"""The page and the picture of a plan: what an operator reads off them."""

from __future__ import annotations

import html
import re
import shlex
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from upgrade_world import FakeEncoder, by_item, item_id, make_gallery, new_encoder, old_encoder

from bowerbird.cli import main
from bowerbird.registry import get_registry
from bowerbird.upgrade.plan import plan

pytest.importorskip("matplotlib")
from bowerbird.upgrade.plan_page import plan_page, plan_svg

BLUE = "#0072b2"  # what is recommended
LINE = re.compile(r'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: (#[0-9a-f]{6})[^"]*"')


@pytest.fixture(scope="module", autouse=True)
def world():
    get_registry().register_module("world", sys.modules["upgrade_world"])
    yield
    get_registry().unregister("world")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    with make_gallery(tmp_path_factory.mktemp("plan") / "a gallery", 240) as gallery:
        yield gallery


def planned(gallery, new, **settings):
    return plan(gallery, by_item(new), label_key="label", strategies=["world:two-queries"], **settings)


@pytest.fixture(scope="module")
def better(gallery):
    return planned(gallery, new_encoder())


@pytest.fixture(scope="module")
def worse(gallery):
    return planned(gallery, FakeEncoder("worse", 24, 6.0))


def rows(page):
    """Cells of the table of strategies, without tags."""
    table = page.split('class="wide"')[1].split("</table>")[0]
    found = [re.findall(r"<td.*?</td>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]]
    return [[re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in found]


def test_the_table_is_in_the_order_of_what_a_way_gains_over_waiting(better, worse):
    for made in (better, worse):
        gains = [float(row[2].partition(" ")[0]) for row in rows(plan_page(made))]
        assert gains == sorted(gains, reverse=True) and len(gains) == len([c for c in made.curves if not c.unavailable])
    assert rows(plan_page(worse))[0][0] == "do-not-upgrade recommended", "before what is worth the same"


def test_exactly_what_is_recommended_is_marked(better):
    marked = [row for row in rows(plan_page(better)) if "recommended" in row[0]]
    verdict = better.recommendation
    assert [(row[0], row[1]) for row in marked] == [("two-queries recommended", verdict.merger.partition(":")[2])]
    gain = better.curve(verdict.strategy, verdict.merger).gain
    assert marked[0][2] == f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def test_waiting_is_drawn_as_a_step_at_the_very_end(better):
    paths = [points for points, color in LINE.findall(plan_svg(better)) if color == "#000000" and points.count("L") > 5]
    assert len(paths) == 1
    points = np.array([[float(n) for n in pair.split()] for pair in re.split(r"[ML]", paths[0])[1:]])
    steps = np.diff(points, axis=0)
    assert ((steps == 0).any(axis=1)).all(), "each piece is level or upright"
    upright = points[:-1][steps[:, 1] != 0]
    assert (upright[:, 0] == points[:, 0].max()).all() and len(upright) == 1


def test_no_two_lines_have_one_colour_and_the_recommended_one_has_its_own(better, worse):
    for made, blue in ((better, 1), (worse, 0)):
        colors = [color for points, color in LINE.findall(plan_svg(made)) if points.count("L") > 5]
        assert len(colors) == len(set(colors)) >= 3
        assert colors.count(BLUE) == blue


def test_the_band_is_the_interval_of_the_difference_to_the_old_model(better):
    verdict = better.recommendation
    curve = better.curve(verdict.strategy, verdict.merger)
    assert len(curve.differences) == len(curve.shares)
    for share, quality, one in zip(curve.shares, curve.quality, curve.differences, strict=True):
        assert one.low <= one.mean <= one.high
        assert better.old_old.mean + one.mean == pytest.approx(quality), share
    assert "Shaded" in plan_page(better)
    assert not any(other.differences for other in better.curves if other is not curve)


def test_the_picture_stands_on_white_and_the_page_follows_the_reader(better):
    assert "fill: #ffffff" in plan_svg(better) and "var(" not in plan_svg(better)
    page = plan_page(better)
    assert "prefers-color-scheme: dark" in page and "var(--ink" in page.split("<svg")[1]
    assert "http" not in re.sub(r'(xmlns(:\w+)?="|http://www\.w3\.org)[^"\s]*', "", page), "one file, nothing from afar"


def test_a_plan_that_advises_against_it_names_no_command(worse):
    assert worse.recommendation.decision == "do-not-upgrade"
    assert worse.next_command() is None
    assert "bowerbird upgrade" not in plan_page(worse)


def test_a_plan_without_labels_is_a_page_of_what_it_takes(gallery):
    page = plan_page(plan(gallery, by_item(new_encoder()), sample=50))
    assert "No verdict" in page and "What it takes" in page and "<svg" not in page


def test_the_next_command_is_one_that_runs_and_the_page_has_the_same(tmp_path):
    files = {name: tmp_path / f"{name}.npy" for name in ("old", "new")}
    for file, encoder in zip(files.values(), (old_encoder(), new_encoder()), strict=True):
        np.save(file, encoder.vectors(range(200)))
        file.with_suffix(".ids.txt").write_text("".join(f"{item_id(n)}\n" for n in range(200)))
    folder = tmp_path / "my photos"
    make_gallery(folder, 200).close()

    def invoke(*args):
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = invoke("upgrade", "plan", folder, "--to", f"vectors:{files['new']}", "--label-key", "label", "--seed", 3,
                   "--strategy", "two-queries", "--order", "core:uncertainty", "--set", "temperature=0.2",
                   "--out", tmp_path / "plan.html")  # fmt: skip
    command = shown.strip().splitlines()[-1].removeprefix("next: ")
    page = (tmp_path / "plan.html").read_text()
    assert html.unescape(re.search(r"<pre><code>(.*?)</code>", page, re.DOTALL)[1]) == command
    assert "no image is read" in page and "images" not in page.split("What it takes")[1]
    first, *rest = shlex.split(command)
    assert first == "bowerbird"
    invoke(*rest)
    shown = invoke("upgrade", "pause", folder)
    assert shlex.split(shown.strip().splitlines()[-1])[1:] == ["bowerbird", "upgrade", "resume", str(folder)]
    assert "next: bowerbird upgrade finish" in invoke("upgrade", "resume", folder)
    now = invoke("upgrade", "status", folder, "--json")
    assert '"world:two-queries"' in now and '"core:uncertainty"' in now and '"complete": true' in now
