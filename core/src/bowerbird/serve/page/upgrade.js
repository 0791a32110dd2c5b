// The upgrade as it happens: where it is, what it did to quality so far, what the plan foresaw, and what can be done now.

import { chart } from "./chart.js";
import { button, capital, count, decimal, duration, el, failure, fill, icon, number, percent, shortId } from "./dom.js";
import { lineName, short, spaceNames } from "./names.js";
import { planning } from "./plan.js";

const RANK = { read: 0, write: 1, admin: 2 };

export function mount(root, context) {
  const { api, toast, confirm } = context;
  const may = () => RANK[context.gallery?.role ?? "read"] >= RANK.admin && !context.gallery?.read_only;
  let view = null;
  let busy = false;
  let acting = null; // the button whose answer is awaited
  let over = false;

  // ------------------------------------------------------------------------------------------------ skeleton

  const title = el("h1", { data: { testid: "upgrade-state" } });
  const sentence = el("p", { class: "muted", data: { testid: "upgrade-sentence" } });
  const spoken = el("p", { class: "hidden-text", "aria-live": "polite" });
  const bar = el("div", { class: "progress-new" });
  const progress = el(
    "div",
    { class: "progress", role: "progressbar", "aria-label": "Share of the items that have moved", "aria-valuemin": "0", "aria-valuemax": "100", data: { testid: "upgrade-progress" } },
    bar,
  );
  const sides = el("div", { class: "progress-sides small-text" });
  const tiles = el("dl", { class: "tiles", data: { testid: "upgrade-facts" } });
  const trouble = el("div", { class: "stack trouble" });
  const actions = el("div", { class: "row actions" });
  const buttons = {
    pause: button("Pause", () => pause(), { data: { testid: "upgrade-pause" } }),
    resume: button("Resume", () => resume(), { kind: "primary", data: { testid: "upgrade-resume" } }),
    finish: button("Finish", () => finish(), { kind: "primary", symbol: "check", data: { testid: "upgrade-finish" } }),
    rollback: button("Roll back", () => rollback(), { data: { testid: "upgrade-rollback" } }),
  };
  actions.append(...Object.values(buttons));
  const now = el("section", { class: "panel stack", "aria-label": "State" }, el("div", { class: "stack tight" }, title, sentence), spoken, progress, sides, tiles, trouble, actions);

  const curveTitle = el("h2");
  const curveNote = el("p", { class: "muted small-text" });
  const curveBox = el("div");
  const curve = el("section", { class: "panel stack", "aria-label": "Curve", hidden: true }, el("div", { class: "stack tight" }, curveTitle, curveNote), curveBox);
  const curveChart = chart(curveBox);

  const failed = el("section", { class: "panel stack", "aria-label": "Failures", hidden: true });
  const planner = planning(context, { act, changed: () => shown(), spent: (plan) => view?.last === "finished" && ledTo(plan) });
  fill(root, el("div", { class: "stack upgrade" }, now, planner.root, curve, failed));
  fill(title, el("span", { class: "skeleton line" }));

  // -------------------------------------------------------------------------------------------------- acting

  const moving = () => view !== null && view.state !== "none";

  /** Name of a space of this upgrade. */
  function nameOf(space) {
    return spaceNames([view.old, view.new].filter(Boolean)).get(space.fingerprint);
  }

  async function act(path, body, done, by = null) {
    if (busy) return false;
    busy = true;
    acting = by;
    shown();
    try {
      const answer = await api.post(path, body);
      if (done) toast(done, "right");
      busy = false;
      apply(answer);
      return true;
    } catch (error) {
      busy = false;
      refused(error);
      return false;
    }
  }

  async function refused(error) {
    toast(error.message, "wrong");
    try {
      apply(await api.get("/v1/upgrade"));
    } catch {
      shown();
    }
  }

  async function pause() {
    const { id, new_items: moved, items } = view;
    const text = `The worker commits what it has in hand, then stops at about ${percent(view.share, 0)}. Searches go on as now: ${count(moved, "item")} by the new vectors, ${number(items - moved)} by the old ones. Nothing is lost; resume at any time.`;
    if (await confirm({ title: "Pause the upgrade?", text, action: "Pause" })) await act("/v1/upgrade/pause", { id }, "The upgrade is paused.", buttons.pause);
  }

  async function resume() {
    const { id, items, new_items: moved, worker } = view;
    const rate = worker.rate ? ` At the last rate that takes about ${duration((items - moved) / worker.rate)}.` : "";
    const text = `A background worker goes on: \u201c${nameOf(view.new)}\u201d has ${count(items - moved, "item")} still to encode.${rate} Searches go on.`;
    if (await confirm({ title: "Resume the upgrade?", text, action: "Resume" })) await act("/v1/upgrade/resume", { id }, "The upgrade goes on.", buttons.resume);
  }

  async function finish() {
    const { id, items, failed: lost } = view;
    const left = items - view.new_items;
    const accept = lost > 0 && left > 0;
    const cost = accept ? `\n\n${count(left, "item")} could not be encoded: searches will no longer find ${left === 1 ? "it" : "them"}, until ${left === 1 ? "it gets a vector" : "they get vectors"}.` : "";
    const text = `Drops the ${count(oldVectors(), "old vector")}; there is no way back. From then on \u201c${nameOf(view.new)}\u201d alone serves ${count(items - (accept ? left : 0), "item")}.${cost}`;
    const sure = await confirm({ title: "Finish the upgrade?", text, action: accept ? `Finish without ${number(left)}` : "Finish", danger: true });
    if (sure) await act("/v1/upgrade/finish", { id, accept_failed: accept }, `Finished: ${nameOf(view.new)} serves the gallery.`, buttons.finish);
  }

  async function rollback() {
    const { id, new_items: moved } = view;
    const back = nameOf(view.old); // now: the events may be faster than the answer
    const text = `Drops the ${count(moved, "new vector")} made so far. \u201c${back}\u201d serves every item again, with exactly the results of before.`;
    if (!(await confirm({ title: "Roll the upgrade back?", text, action: "Roll back", danger: true }))) return;
    busy = true;
    acting = buttons.rollback;
    shown();
    try {
      const answer = await api.post("/v1/upgrade/rollback", { id, leave_pending: false });
      busy = false;
      toast(`Rolled back: ${back} serves the gallery.`, "right");
      apply(answer);
    } catch (error) {
      busy = false;
      shown();
      const pending = [409, 422].includes(error.status) && /pending/i.test(error.message);
      if (!pending) return refused(error);
      const more = `${error.message}\n\nLeave such items without a vector? They stay in the gallery, and searches will not find them until they get one.`;
      if (await confirm({ title: "Some items have no old vector", text: more, action: "Leave them pending", danger: true })) {
        await act("/v1/upgrade/rollback", { id, leave_pending: true }, `Rolled back: ${back} serves the gallery.`, buttons.rollback);
      }
    }
  }

  const oldVectors = () => view.old_vectors || view.items;

  // ------------------------------------------------------------------------------------------------- showing

  function apply(next) {
    const before = view?.state;
    view = next;
    shown();
    if (before !== undefined && before !== view.state) {
      spoken.textContent = title.textContent;
      planner.load();
    }
  }

  function shown() {
    if (over || !view) return;
    if (moving()) showMoving();
    else showNone();
    showCurve();
    showFailures();
    for (const one of Object.values(buttons)) one.disabled = busy;
    for (const one of [...Object.values(buttons), planner.startButton]) one.setAttribute("aria-busy", String(busy && one === acting));
  }

  function showMoving() {
    const { state, worker, items, new_items: moved, share } = view;
    const to = nameOf(view.new);
    const left = items - moved;
    fill(
      title,
      { paused: "Paused on the way to ", complete: view.failed > 0 ? "Every item that can be moved is in " : "Every item is in " }[state] ?? "Moving to ",
      el("span", { class: "name-new" }, to),
    );
    fill(sentence, sentenceOf({ state, worker, left, to, from: nameOf(view.old) }));
    progress.hidden = sides.hidden = tiles.hidden = false;
    bar.style.inlineSize = `${100 * share}%`;
    progress.setAttribute("aria-valuenow", (100 * share).toFixed(1));
    progress.setAttribute("aria-valuetext", `${number(moved)} of ${number(items)} items have moved`);
    progress.classList.toggle("still", !(state === "running" && worker.state === "working"));
    fill(
      sides,
      el("span", { class: "name-new" }, `${number(moved)} in ${to}`),
      el("span", { class: "name-old" }, `${number(left)} in ${nameOf(view.old)}`),
    );
    const last = view.curve.at(-1);
    const labelled = last && last.quality !== null;
    const paced = state === "running" && worker.state !== "none"; // of another process the rate is not known
    const gone = last && labelled && view.level_before !== null ? last.quality - view.level_before : null;
    fill(
      tiles,
      tile("Moved", percent(share), `${number(moved)} of ${number(items)}`, "share"),
      paced && tile("Rate", worker.rate ? rateText(worker.rate) : "\u2013", "items per second", "rate"),
      paced && tile("Time left", worker.seconds_left !== null ? duration(worker.seconds_left) : "\u2013", "at this rate", "left"),
      labelled && tile("Quality, mAP@100", decimal(last.quality), gone === null ? "" : `${gone < 0 ? "\u2212" : "+"}${decimal(Math.abs(gone))} since the start`, "quality", gone === null ? "" : gone < 0 ? "wrong" : "right"),
      last && tile(labelled ? "Negative flips" : "First results changed", percent(last.nfr), labelled ? `positive flips ${percent(last.pfr)}` : "of the watched queries", "flips"),
    );
    fill(
      trouble,
      worker.state === "failed" && troubleOf("The worker stopped", worker.error ?? "The log of the service says why.", "worker-error"),
      view.stopped_by && troubleOf("Paused by the limit on negative flips", `${capital(view.stopped_by)}. Resume to accept them, or roll back.`, "stopped-by"),
      !may() && onlyLook(),
    );
    actions.hidden = !may();
    buttons.pause.hidden = state !== "running";
    const stalled = state === "running" && ["failed", "none"].includes(worker.state);
    buttons.resume.hidden = !(state === "paused" || stalled);
    buttons.resume.lastChild.textContent = !stalled ? "Resume" : worker.state === "none" ? "Start a worker here" : "Start the worker again";
    buttons.finish.hidden = state !== "complete";
    buttons.rollback.hidden = false;
    planner.root.hidden = true;
    putCurve(false);
  }

  function sentenceOf({ state, worker, left, to, from }) {
    const how = [short(view.strategy), view.merger && `merger ${short(view.merger)}`, view.order && `order ${short(view.order)}`].filter(Boolean).join(", ");
    const by = how ? ` (${how})` : "";
    if (state === "complete") {
      const lost = view.failed > 0 ? ` ${count(view.failed, "item")} could not be encoded and ${view.failed === 1 ? "stays" : "stay"} on the old vector.` : "";
      return `Nothing is left to move.${lost} Finish drops the vectors of ${from} for good; until then you can go back.`;
    }
    if (state === "paused") return `${count(left, "item")} still ${left === 1 ? "waits" : "wait"} in ${from}. Searches look at both parts${by}.`;
    if (worker.state === "starting") return `The worker is loading ${to}. Searches look at both parts${by}.`;
    if (worker.state === "stopping") return `The worker finishes what it has in hand${by}.`;
    if (worker.state === "working") {
      const time = worker.seconds_left === null ? "" : `, about ${duration(worker.seconds_left)} to go`;
      return `${count(left, "item")} to move${time}. Meanwhile searches look at both parts${by}.`;
    }
    if (worker.state === "none") return `No worker of this service is at it; another process may be. ${count(left, "item")} to move${by}.`;
    return `${count(left, "item")} to move${by}.`;
  }

  function troubleOf(what, why, testid) {
    return el(
      "div",
      { class: "notice wrong", role: "alert", data: { testid } },
      icon("alert"),
      el("div", { class: "grow" }, el("strong", {}, what), el("p", {}, why)),
    );
  }

  const onlyLook = () =>
    el("p", { class: "muted small-text" }, context.gallery?.read_only ? "This service is read-only: the upgrade can be watched, not changed." : "Your token may watch the upgrade; changing it needs the role admin.");

  function showNone() {
    const serving = context.gallery?.spaces.find((space) => space.fingerprint === context.gallery.serving);
    fill(title, "No upgrade is under way");
    fill(
      sentence,
      serving ? ["All ", count(context.gallery.items, "item"), context.gallery.items === 1 ? " is served by " : " are served by ", el("strong", {}, serving.encoder), ". "] : "",
      view.last ? `The last upgrade was ${view.last}.` : "",
    );
    progress.hidden = sides.hidden = tiles.hidden = true;
    actions.hidden = true;
    fill(trouble, !may() && onlyLook());
    planner.root.hidden = !may();
    if (!may()) return;
    planner.show({ busy, acting });
    putCurve(planner.beside.isConnected && !pastCurve()); // a forecast is beside the plan that it belongs to
  }

  // --------------------------------------------------------------------------------------------------- curve

  /** Into the column of the plan, or below all of it. Where it is already it stays, with its focus. */
  function putCurve(beside) {
    if (beside && curve.parentNode !== planner.beside) planner.beside.append(curve);
    if (!beside && curve.previousSibling !== planner.root) planner.root.after(curve);
  }

  /** Whether nothing is under way and there is no newer plan: then the last upgrade is shown. */
  function pastCurve() {
    const offered = planner.plan();
    return !moving() && (offered === null || ledTo(offered));
  }

  function showCurve() {
    const past = pastCurve();
    const plan = moving() || past ? view.plan : planner.plan();
    const line = plan ? lineOf(plan) : null;
    const measured = moving() || past ? view.curve : [];
    curve.hidden = !line && measured.length === 0;
    if (curve.hidden) return;
    const byFirst = plan?.metric === "r1";
    // A forecast of another measure than what is watched would lie beside the curve without meaning anything.
    const foreign = measured.length > 0 && plan !== null && !["map@100", "r1"].includes(plan.metric);
    const metric = byFirst ? "R@1" : measured.length > 0 || plan?.metric !== "map" ? "mAP@100" : "mAP";
    const before = measured.length > 0 && !byFirst ? view.level_before : (plan?.old_quality ?? null);
    const labelled = line !== null || measured.some((point) => point.quality !== null);
    curveTitle.textContent = moving() ? "Quality on the way" : measured.length ? `The last upgrade, ${view.last ?? "ended"}` : "What the plan foresees";
    const watched = "Measured on the watched queries";
    if (!line) curveNote.textContent = measured.length > 0 ? `${watched}.` : "";
    else if (foreign) curveNote.textContent = `${watched}. The plan's forecast is of ${plan.metric === "map" ? "mAP over all results" : plan.metric}, another measure, and is left out.`;
    else curveNote.textContent = `${measured.length > 0 ? `${watched}, over the plan's forecast` : "Forecast"} of ${lineName(line)}${line.low ? "; the shaded band is its 95\u00a0% interval." : "."}`;
    const point = (key) => measured.map((entry) => ({ x: entry.share, y: entry[key] }));
    const of = (values) => values.map((y, place) => ({ x: line.shares[place], y }));
    const panels = [];
    if (labelled) {
      panels.push({
        title: `Quality, ${metric}`,
        height: 200,
        least: 0.05, // a change in the third digit must not look like a cliff
        format: (value) => decimal(value),
        lines: [
          line && !foreign && { name: "Forecast", tone: measured.length ? "forecast" : "quality", dashed: true, points: of(line.quality), band: line.low && line.high ? line.shares.map((x, place) => ({ x, low: line.low[place], high: line.high[place] })) : null },
          measured.length > 0 && { name: "Measured", tone: "quality", dots: true, points: point(byFirst ? "r1" : "quality") },
        ].filter(Boolean),
        levels: before === null ? [] : [{ name: "Before the upgrade", tone: "old", y: before }],
      });
    }
    if (measured.length > 0 || line?.nfr) {
      panels.push({
        title: labelled ? "Flips: first results that became wrong or right" : "First results that changed",
        height: 120,
        zero: true,
        format: (value) => percent(value),
        lines: [
          line?.nfr && { name: "Forecast of negative flips", tone: "forecast-negative", dashed: true, points: of(line.nfr) },
          measured.length > 0 && { name: labelled ? "Negative flips" : "Changed", tone: "negative", dots: true, points: point("nfr") },
          measured.length > 0 && labelled && { name: "Positive flips", tone: "positive", dots: true, points: point("pfr") },
        ].filter(Boolean),
        levels: [],
      });
    }
    curveChart.draw({ label: `${curveTitle.textContent}.`, now: moving() ? view.share : null, panels });
  }

  /** Whether the last upgrade was begun after this plan. */
  const ledTo = (plan) => !moving() && view !== null && view.curve.length > 0 && plan.created_at < view.curve[0].time;

  /** The line of a plan that belongs to what is under way, or to what is chosen. */
  function lineOf(plan) {
    if (!moving()) return planner.lineOf(plan);
    const same = (a, b) => short(a) === short(b);
    return plan.lines.find((line) => same(line.strategy, view.strategy) && same(line.merger, view.merger)) ?? null;
  }

  // ------------------------------------------------------------------------------------------------ failures

  function showFailures() {
    const rows = view.failures ?? [];
    failed.hidden = !moving() || rows.length === 0;
    if (failed.hidden) return;
    fill(
      failed,
      el("h2", {}, `${count(view.failed, "item")} could not be encoded`),
      el("p", { class: "muted small-text" }, "Each is tried three times. It stays on its old vector and is still found.", view.failed > rows.length && ` The first ${number(rows.length)} are listed.`),
      el(
        "div",
        { class: "table-scroll" },
        el(
          "table",
          { class: "table", data: { testid: "upgrade-failures" } },
          el("thead", {}, el("tr", {}, ["Item", "Tried", "Why"].map((name) => el("th", { scope: "col" }, name)))),
          el("tbody", {}, rows.map((row) => el("tr", {}, el("td", { class: "mono", title: row.id }, shortId(row.id)), el("td", { class: "number" }, row.attempts), el("td", {}, row.error)))),
        ),
      ),
    );
  }

  // ---------------------------------------------------------------------------------------------------- live

  context.on("upgrade", apply);
  context.on("gallery", () => shown());
  (async () => {
    try {
      if (context.upgrade) apply(context.upgrade);
      const [first] = await Promise.all([api.get("/v1/upgrade"), planner.load()]);
      if (!over) apply(first);
    } catch (error) {
      if (!over && view === null) fill(root, failure(error, () => context.navigate("upgrade")));
    }
  })();
  return () => {
    over = true;
    planner.close();
    curveChart.close();
  };
}

function tile(name, value, note, key, tone = "") {
  return el("div", { class: "tile", data: { testid: `fact-${key}` } }, el("dt", {}, name), el("dd", { class: "number" }, value), el("dd", { class: `tile-note ${tone}` }, note));
}

const rateText = (rate) => (rate < 10 ? rate.toFixed(1) : number(Math.round(rate)));
