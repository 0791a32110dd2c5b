// Compare: what the old system finds, what the new one finds as far as it is filled, and what is served. The same query
// in three columns, asked again while an upgrade moves items from the one to the other.

import { animated, button, count, decimal, el, empty, failure, fill, icon, number, percent, shortId } from "./dom.js";
import { failed, queryBar, queryOf, remember, send } from "./query.js";
import { createWall, frame, idBeside, labelOf, openItem, sideBadge } from "./wall.js";

const K = 20;
const PAUSE = 2500; // milliseconds between two comparisons while the gallery changes
const COLUMNS = ["old", "new", "merged"];

export function mount(root, context) {
  let work = new AbortController();
  let shown = null;
  let timer = null;
  let asked = 0;
  let upgradeSeen = context.gallery.upgrade?.id ?? null;
  let wall = null; // of items to begin with

  const bar = queryBar(context, { view: "compare", end: [followSwitch()] });
  const place = el("div", { class: "stack" });
  root.append(el("h1", { class: "hidden-text" }, "Compare"), bar.element, place);

  function followSwitch() {
    return el("label", { class: "switch" }, el("input", { type: "checkbox", role: "switch", checked: true, data: { testid: "follow" } }), "Follow the upgrade");
  }
  const following = () => root.querySelector("[data-testid=follow]").checked;

  async function compare(params, { quiet = false } = {}) {
    bar.update(params);
    clearTimeout(timer);
    timer = null;
    work.abort();
    work = new AbortController();
    const { signal } = work;
    const query = queryOf(params);
    const { upgrade } = context.gallery;
    bar.element.hidden = upgrade === null;
    if (upgrade === null) {
      shown = null;
      fill(place, noUpgrade());
      return;
    }
    if (query === null || query.lost) {
      shown = null;
      await begin(query);
      return;
    }
    if (!quiet) {
      shown = null;
      fill(place, waiting());
    }
    asked = performance.now();
    try {
      const answer = await send(context, "/v1/compare", query, { k: K, signal });
      if (signal.aborted) return;
      draw(answer, quiet);
    } catch (error) {
      if (signal.aborted || quiet) return;
      shown = null;
      fill(place, failed(context, error, query, () => compare(context.params)));
    }
  }

  function noUpgrade() {
    return empty({
      symbol: "compare",
      title: "There is nothing to compare now",
      text: "One model answers every search. During an upgrade, this shows side by side what the old model finds, what the new one finds, and what is served.",
      actions: [button("To the upgrade", () => context.navigate("upgrade"), { kind: "primary" }), button("Search instead", () => context.navigate("search", context.params))],
    });
  }

  async function begin(query) {
    const { signal } = work;
    wall?.stop();
    wall = createWall(context, { label: "Items to begin with", pick: (item) => context.navigate("compare", { item: item.id }) });
    const text = query?.lost ? "The picture of this address is not here any more. Drop it again, or pick an item." : "Pick an item, drop a picture, or type. You see what the old model finds, what the new one finds, and what is served meanwhile.";
    fill(place, el("div", { class: "begin" }, el("h2", {}, "Compare the old and the new model"), el("p", { class: "muted" }, text)), wall.element);
    wall.loading(12);
    try {
      const { items } = await context.api.get("/v1/items?limit=24", { signal });
      if (!signal.aborted) wall.show(items);
    } catch (error) {
      if (!signal.aborted) fill(place, failure(error, () => compare(context.params)));
    }
  }

  function waiting() {
    return el(
      "div",
      { class: "columns", "aria-busy": "true" },
      COLUMNS.map((name) => el("section", { class: "column", data: { column: name } }, el("div", { class: "line skeleton" }), Array.from({ length: 6 }, () => el("div", { class: "found skeleton" })))),
    );
  }

  // ------------------------------------------------------------------------------------------------- the answer

  let lists = null; // {old, new, merged: <ol>}
  let head = null;
  let names = null;

  function frameOfColumns(answer) {
    head = el("div", { class: "stack", "aria-atomic": "true" });
    lists = {};
    names = {};
    const chosen = place.querySelector(".columns")?.dataset.shown ?? "merged";
    const columns = el(
      "div",
      { class: "columns", data: { shown: chosen, testid: "columns" } },
      COLUMNS.map((name) => {
        lists[name] = el("ol", { class: "found-list", "aria-label": titleOf(name), data: { testid: `column-${name}` } });
        names[name] = el("div", { class: "column-head" });
        return el("section", { class: "column", data: { column: name } }, names[name], lists[name]);
      }),
    );
    const tabs = el(
      "fieldset",
      { class: "segmented tabs" },
      el("legend", { class: "hidden-text" }, "Column"),
      COLUMNS.map((name) =>
        el("label", {}, el("input", { type: "radio", name: "column", value: name, checked: name === chosen, data: { testid: `tab-${name}` }, on: { change: () => (columns.dataset.shown = name) } }), { old: "Old", new: "New", merged: "Served" }[name]),
      ),
    );
    columns.addEventListener("pointerover", mark);
    columns.addEventListener("focusin", mark);
    columns.addEventListener("pointerleave", mark);
    columns.addEventListener("keydown", walk);
    fill(place, head, tabs, columns);
  }

  /** The same item in the other columns. */
  function mark(event) {
    const id = event.type === "pointerleave" ? null : event.target.closest?.("[data-id]")?.dataset.id;
    for (const each of place.querySelectorAll(".found")) each.classList.toggle("same", each.dataset.id === id);
  }

  function walk(event) {
    const here = event.target.closest(".found");
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const column = COLUMNS.indexOf(here.closest("[data-column]").dataset.column);
    const at = [...here.closest("ol").querySelectorAll(".found")].indexOf(here);
    const step = { ArrowDown: [0, 1], ArrowUp: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const rows = [...(lists[COLUMNS[column + step[0]]] ?? here.closest("ol")).querySelectorAll(".found")];
    rows[Math.min(Math.max(at + step[1], 0), rows.length - 1)]?.focus();
  }

  function draw(answer, quiet) {
    if (shown === null) frameOfColumns(answer);
    shown = answer;
    const focused = document.activeElement?.closest?.(".found");
    const focus = focused && { id: focused.dataset.id, column: focused.closest("[data-column]").dataset.column };
    head.setAttribute("aria-live", quiet ? "off" : "polite"); // what follows by itself every other second is not read out
    fill(head, verdict(answer));
    const merged = new Map(answer.merged.map((hit) => [hit.id, hit.rank]));
    for (const name of COLUMNS) {
      fill(names[name], el("h2", {}, titleOf(name)), el("p", { class: "muted small-text ellipsis" }, subtitleOf(name, answer)));
      const before = places(lists[name]);
      fill(
        lists[name],
        answer[name].length > 0
          ? answer[name].map((hit, at) => row(name, hit, at, answer, merged))
          : el("li", {}, el("p", { class: "muted column-empty" }, name === "new" ? "Nothing has moved yet." : "Nothing was found.")),
      );
      slide(lists[name], before);
    }
    if (focus) [...(lists[focus.column]?.querySelectorAll(".found") ?? [])].find((each) => each.dataset.id === focus.id)?.focus({ preventScroll: true });
  }

  function row(name, hit, at, answer, merged) {
    const label = labelOf(context, hit);
    const firstFlips = at === 0 && name !== "new" && (answer.flip === "positive" || answer.flip === "negative");
    return el(
      "li",
      { data: { key: hit.id } },
      el(
        "button",
        {
          type: "button",
          class: `found ${firstFlips ? `flip ${hit.right ? "right" : "wrong"}` : ""}`.trim(),
          data: { testid: "found", id: hit.id },
          on: { click: () => openItem(context, answer[name], at, () => compare(context.params, { quiet: true })) },
        },
        el("span", { class: "found-rank number" }, hit.rank),
        frame(context, hit, 128),
        el(
          "span",
          { class: "found-text" },
          el("strong", { class: "ellipsis", title: hit.id }, label ?? shortId(hit.id)),
          label !== null && el("span", { class: "muted small-text ellipsis" }, idBeside(label, hit.id)),
          el(
            "span",
            { class: "row found-badges" },
            hit.right !== null && el("span", { class: `badge ${hit.right ? "right" : "wrong"}`, data: { testid: "right" } }, icon(hit.right ? "check" : "close"), hit.right ? "right" : "wrong"),
            name !== "new" && hit.moved && el("span", { class: "badge new", title: `Its vector is of the new model; found here by the ${hit.side} one`, data: { testid: "moved" } }, "moved"),
            name === "merged" && !hit.moved && sideBadge(context, hit),
          ),
        ),
        el("span", { class: "found-end" }, el("span", { class: "number small-text" }, decimal(hit.score)), change(name, hit, merged)),
      ),
    );
  }

  /** What became of the rank: in the old column on the way to what is served, in the others since the old list. */
  function change(name, hit, merged) {
    const [from, to] = name === "old" ? [hit.rank, merged.get(hit.id) ?? null] : [hit.rank_before, hit.rank];
    const [kind, text, title] =
      to === null
        ? ["down", "leaves", "Not among what is served"]
        : from === null
          ? ["up", "enters", "Not among what the old system finds"]
          : to < from
            ? ["up", `↑ ${from - to}`, `From rank ${from} to ${to}`]
            : to > from
              ? ["down", `↓ ${to - from}`, `From rank ${from} to ${to}`]
              : ["same-rank", "=", "The same rank"];
    return el("span", { class: `change ${kind} number`, title, data: { testid: "change" } }, text);
  }

  // ------------------------------------------------------------------------------------------- changes in motion

  const places = (list) => new Map([...list.children].map((item) => [item.dataset.key, item.getBoundingClientRect().top]));

  function slide(list, before) {
    if (!animated() || before.size === 0) return;
    for (const item of list.children) {
      const was = before.get(item.dataset.key);
      const now = item.getBoundingClientRect().top;
      if (was === undefined) item.animate({ opacity: [0, 1] }, { duration: 300, easing: "ease-out" });
      else if (was !== now) item.animate({ transform: [`translateY(${was - now}px)`, "none"] }, { duration: 350, easing: "ease-in-out" });
    }
  }

  context.on("params", (params) => compare(params));
  context.on("pictures", (files) => {
    context.navigate(context.gallery.upgrade ? "compare" : "search", { picture: remember(files[0]), where: context.params.where });
  });
  context.on("gallery", (info) => {
    if ((info.upgrade?.id ?? null) !== upgradeSeen) {
      upgradeSeen = info.upgrade?.id ?? null; // one has begun or ended
      compare(context.params);
      return;
    }
    if (shown === null || timer !== null || info.epoch === shown.epoch || !following() || document.hidden) return;
    timer = setTimeout(() => compare(context.params, { quiet: true }), Math.max(0, asked + PAUSE - performance.now()));
  });
  compare(context.params);
  return () => {
    clearTimeout(timer);
    work.abort();
    wall?.stop();
  };
}

const titleOf = (name) => ({ old: "Old model", new: "New model", merged: "Served now" })[name];

function subtitleOf(name, answer) {
  return { old: answer.old_name, new: `${answer.new_name} · ${percent(answer.share)} of the items`, merged: "Both, merged: what searches get" }[name];
}

/** The sentences that say what changed. */
function verdict(answer) {
  const { flip, kept, old, merged } = answer;
  const entered = merged.filter((hit) => hit.rank_before === null).length;
  const climbed = merged.filter((hit) => hit.rank_before !== null && hit.rank < hit.rank_before).sort((a, b) => b.rank_before - b.rank - (a.rank_before - a.rank))[0];
  const sentences = [
    kept === old.length && entered === 0 ? `All ${old.length} results of the old system are still served` : `${count(kept, "result")} of the old ${old.length} ${kept === 1 ? "is" : "are"} still served, ${number(entered)} ${entered === 1 ? "is" : "are"} new`,
    climbed ? `; “${shortId(climbed.id)}” climbed most, from rank ${climbed.rank_before} to ${climbed.rank}` : "",
    `. ${percent(answer.share)} of the items have moved to the new model.`,
  ];
  const [kind, title] = {
    positive: ["right", "Positive flip: the first result was wrong and is right now."],
    negative: ["wrong", "Negative flip: the first result was right and is wrong now."],
  }[flip] ?? ["", flip === "none" ? (merged[0]?.right ? "No flip: the first result was right and still is." : "No flip: the first result was wrong and still is.") : null];
  return el(
    "div",
    { class: `notice ${kind}`, data: { testid: "verdict", flip: flip ?? "unknown" } },
    icon(kind === "right" ? "check" : kind === "wrong" ? "alert" : "compare"),
    el("div", { class: "grow" }, title && el("strong", { data: { testid: "flip" } }, title), el("p", {}, sentences.join("")), answer.label !== null && el("p", { class: "muted small-text" }, `The query's label is “${answer.label}”.`)),
  );
}
