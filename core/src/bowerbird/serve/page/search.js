// Search: by a picture, a text or an item; the wall of what was found. Writers add items here.

import { addPictures, summary } from "./add.js";
import { button, count, el, empty, failure, fill, icon, number, took } from "./dom.js";
import { failed, filtersOf, queryBar, queryOf, remember, send } from "./query.js";
import { createWall } from "./wall.js";

const PAGE = 30;
const MOST = 1000; // of a search, over all pages

export function mount(root, context) {
  const { gallery } = context;
  const writer = gallery.role !== "read" && !gallery.read_only && gallery.accepts.image;
  let adding = writer && gallery.items === 0; // what dropped pictures are for
  let work = new AbortController(); // of the search under way
  let shown = null; // the last answer

  const drops =
    writer &&
    dropChoice(adding, (add) => {
      adding = add;
      tellDrops();
    });
  const tellDrops = () => (root.dataset.dropText = adding ? "Drop pictures to add them to the gallery" : "Drop a picture to search by it");
  tellDrops();
  const bar = queryBar(context, { view: "search", end: [drops], take: (files) => take(files) });
  const status = el("p", { class: "status", role: "status", data: { testid: "status" } });
  const stale = el("button", { type: "button", class: "link", hidden: true, data: { testid: "again" }, on: { click: () => search(context.params) } }, "The gallery has changed: search again");
  const place = el("div", { class: "stack" });
  const report = el("div", { class: "report" });
  const wall = createWall(context, {
    label: "Results",
    deleted: (epoch) => {
      if (shown !== null) shown = { ...shown, epoch };
      stale.hidden = true;
    },
  });
  const more = button("More", () => page(), { "data-testid": "more", hidden: true });
  root.append(el("h1", { class: "hidden-text" }, "Search"), bar.element, report, status, place);

  async function search(params) {
    bar.update(params);
    work.abort();
    work = new AbortController();
    shown = null;
    stale.hidden = true;
    more.hidden = true;
    status.textContent = "";
    const query = queryOf(params);
    status.hidden = query === null || query.lost === true;
    if (status.hidden) {
      await browse(query, work.signal);
      return;
    }
    const { signal } = work;
    const waiting = setTimeout(() => {
      fill(place, wall.element);
      wall.loading(12);
    }, shown === null && place.childElementCount === 0 ? 0 : 150); // what is quick does not flicker
    try {
      const answer = await send(context, "/v1/search", query, { k: PAGE, signal });
      clearTimeout(waiting);
      if (signal.aborted) return;
      shown = answer;
      fill(place, answer.hits.length > 0 ? [wall.element, el("div", { class: "row center" }, more)] : nothing(query));
      wall.show(answer.hits);
      tell(answer);
    } catch (error) {
      clearTimeout(waiting);
      if (signal.aborted) return;
      status.hidden = true;
      fill(place, failed(context, error, query, () => search(context.params)));
    }
  }

  async function page() {
    const { signal } = work;
    const query = queryOf(context.params);
    more.disabled = true;
    more.setAttribute("aria-busy", "true");
    try {
      const offset = shown.offset ?? shown.hits.length;
      const answer = await send(context, "/v1/search", query, { k: Math.min(PAGE, MOST - offset), offset, signal });
      if (signal.aborted) return;
      const here = new Set(wall.items().map((hit) => hit.id));
      const first = wall.items().length;
      // Between two pages the gallery may have changed; what was there already is not shown twice.
      wall.append(answer.hits.filter((hit) => !here.has(hit.id)));
      shown = { ...answer, offset: offset + answer.hits.length };
      tell(answer);
      wall.element.children[first]?.querySelector(".card")?.focus({ preventScroll: true });
    } catch (error) {
      if (!signal.aborted) context.toast(error.message, "wrong");
    }
    more.disabled = false;
    more.removeAttribute("aria-busy");
  }

  function tell(answer) {
    const n = wall.items().length;
    stale.hidden = context.gallery.epoch <= answer.epoch; // it may have changed while the answer was on its way
    more.hidden = !answer.more || (shown.offset ?? shown.hits.length) >= MOST;
    fill(
      status,
      el("span", { class: "number" }, el("strong", {}, count(n, "result")), ` of ${count(context.gallery.items, "item")}`),
      el("span", { class: "number", title: `The gallery as of its change number ${number(answer.epoch)}` }, took(answer.milliseconds)),
      new Set(wall.items().map((hit) => hit.side)).size > 1 && el("span", {}, "scores of old and new have different scales"),
      stale,
    );
  }

  /** Without a query: some items to begin with. */
  async function browse(query, signal) {
    const hint = query?.lost
      ? "The picture of this address is not here any more. Drop it again."
      : Object.keys(filtersOf(context.params)).length > 0
        ? "The filter holds for the next search."
        : null;
    fill(place, wall.element);
    wall.loading(12);
    try {
      const answer = await context.api.get("/v1/items?limit=24", { signal });
      if (signal.aborted) return;
      if (answer.items.length === 0) {
        fill(place, emptyGallery());
        return;
      }
      fill(place, el("div", { class: "begin" }, el("h2", {}, ways()), el("p", { class: "muted" }, hint ?? "Or begin with one of the gallery's items.")), wall.element);
      wall.show(answer.items);
    } catch (error) {
      if (!signal.aborted) fill(place, failure(error, () => search(context.params)));
    }
  }

  function ways() {
    const { image, text } = context.gallery.accepts;
    if (image && text) return "Drop a picture anywhere, or type what you are looking for";
    if (image) return "Drop a picture anywhere, paste one, or choose one";
    return text ? "Type what you are looking for" : "Search by one of the items";
  }

  function emptyGallery() {
    return empty({
      title: "This gallery is empty",
      text: writer ? "Drop pictures anywhere on this page to add them." : "Somebody who may write has to add items first.",
      actions: writer ? [button("Choose pictures", bar.choose, { kind: "primary", symbol: "plus" })] : [],
    });
  }

  const nothing = (query) =>
    empty({
      symbol: "search",
      title: "Nothing was found",
      text: Object.keys(query.where).length > 0 ? "No item has this metadata. Remove a filter." : "There is no item that could be searched this way.",
      actions: Object.keys(query.where).length > 0 ? [button("Remove the filters", () => context.navigate("search", { ...context.params, where: null }))] : [],
    });

  async function take(files) {
    if (!adding) {
      context.navigate("search", { picture: remember(files[0]), where: context.params.where });
      if (files.length > 1) context.toast(`Searching by ${files[0].name}, the first of ${files.length}.`);
      return;
    }
    const line = el("p", { role: "status" }, `Adding ${count(files.length, "picture")}…`);
    fill(report, el("div", { class: "notice" }, line));
    try {
      const result = await addPictures(context, files, { progress: (done, all) => (line.textContent = `Adding pictures: ${done} of ${all}…`) });
      fill(report, result && outcome(result));
      if (queryOf(context.params) === null) search(context.params);
    } catch (error) {
      fill(report, failure(error, () => take(files)));
    }
  }

  function outcome(result) {
    const refused = Object.entries(result.failed);
    return el(
      "div",
      { class: `notice ${refused.length > 0 ? "wrong" : "right"}`, data: { testid: "added" } },
      icon(refused.length > 0 ? "alert" : "check"),
      el("div", { class: "grow" }, el("strong", {}, summary(result)), refused.length > 0 && el("ul", { class: "plain" }, refused.slice(0, 20).map(([id, why]) => el("li", {}, `${id}: ${why}`)))),
      button("Close", () => fill(report), { kind: "ghost" }),
    );
  }

  context.on("params", search);
  context.on("pictures", (files) => {
    take(files);
  });
  context.on("gallery", (info) => {
    if (shown === null || info.epoch === shown.epoch) return;
    stale.hidden = false;
  });
  search(context.params);
  return () => {
    work.abort();
    wall.stop();
  };
}

/** Whether pictures that are dropped, pasted or chosen are searched by, or added. */
function dropChoice(adding, choose) {
  const option = (value, label, checked) =>
    el("label", {}, el("input", { type: "radio", name: "drops", value, checked, data: { testid: `drops-${value}` }, on: { change: () => choose(value === "add") } }), label);
  return el(
    "fieldset",
    { class: "segmented" },
    el("legend", { class: "hidden-text" }, "What to do with pictures that are dropped, pasted or chosen"),
    el("span", { class: "segmented-name", "aria-hidden": "true" }, "Drop to"),
    option("search", "Search", !adding),
    option("add", "Add", adding),
  );
}
